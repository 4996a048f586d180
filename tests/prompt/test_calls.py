"""Calls of all forms are found however their text is cut, nothing else is, and no character is ever lost."""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd.prompt.calls import Called, CallParser, Event, parse_calls
from herd.prompt.tools import CallPart, ToolCall, write

NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.-]{0,8}", fullmatch=True)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
CALLS = st.one_of(
    st.builds(ToolCall, NAMES, st.dictionaries(st.from_regex(r"[a-z_]{1,6}", fullmatch=True) | st.text(), VALUES)),
    st.builds(ToolCall, st.sampled_from(["brave_search", "wolfram_alpha"]), st.fixed_dictionaries({"query": VALUES})),
)
# What calls are made of, so that near misses are frequent.
BITS = st.sampled_from(
    """[f( f( g(x= ) ] , "a" 'b \'\'\' \\" \\ { } {"name": "f", "parameters": {"arguments": "type" } }
    <function=f> </function> <|python_start|> <|python_end|> < <| brave_search.call( query= 1 -2.5 True null **{ (
    """.split()  # noqa: SIM905
)
TEXTS = st.lists(BITS | st.sampled_from([" ", "\n", "é", "plain words"]) | st.text(max_size=3)).map("".join)


def cut(text: str, places: list[int], names: frozenset[str] | None = None) -> list[Event]:
    """What a parser makes of a text that comes in pieces."""
    parser, events, at = CallParser(names), [], 0
    for place in sorted(place % (len(text) + 1) for place in places):
        events += parser.push(text[at:place])
        at = place
    return [*events, *parser.push(text[at:]), *parser.finish()]


def whole(events: list[Event]) -> str:
    said = [event.text if isinstance(event, Called) else event for event in events if not isinstance(event, CallPart)]
    return "".join(said)


def calls(events: list[Event]) -> list[ToolCall]:
    return [call for event in events if isinstance(event, Called) for call in event.calls]


def streamed(events: list[Event]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Name and arguments of the calls that parts make up: those that ended, and the others."""
    made, ended = list[list[str]](), list[bool]()
    for event in events:
        if isinstance(event, CallPart) and event.name is not None:
            made.append([event.name, ""])
            ended.append(False)
        if isinstance(event, CallPart):
            assert not ended[-1], "nothing comes behind an end"
            made[-1][1] += event.arguments
            ended[-1] = event.ends
    both = [(one[0], one[1]) for one in made]
    return [one for one, end in zip(both, ended, strict=True) if end], [
        one for one, end in zip(both, ended, strict=True) if not end
    ]


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


@given(TEXTS | st.text(), st.lists(st.integers(0, 1000), max_size=9))
def test_no_character_is_lost(text, places):
    events = cut(text, places)
    assert whole(events) == text
    assert [e for e in events if isinstance(e, Called)] == [e for e in parse_calls(text) if isinstance(e, Called)]
    ended, others = streamed(events)
    assert ended == [(call.name, call.arguments_json) for call in calls(events)]
    assert not any(is_json(arguments) for _, arguments in others), "what is no call cannot be taken for one"


@given(st.lists(CALLS, max_size=3), st.sampled_from(["pythonic", "json", "tag"]), st.lists(st.integers(0, 1000)))
def test_what_was_written_is_read(made, form, places):
    text = "".join(write(made, form))
    events = cut(f"Let me look.\n{text}", places)
    assert calls(events) == made
    assert streamed(events) == ([(call.name, call.arguments_json) for call in calls(events)], [])
    assert whole(parse_calls(text)) == text
    assert all(isinstance(event, Called) for event in parse_calls(text)), "no part of a call is given as text"


@given(st.text().filter(lambda text: text.strip() and "<|python_" not in text and not calls(parse_calls(text))))
def test_code_is_read(code):
    call = ToolCall("code_interpreter", {"code": code})
    text = "".join(write([call]))
    assert calls(parse_calls(text)) == calls(parse_calls(text.removesuffix("<|python_end|>"))) == [call]


F1 = ToolCall("f", {"a": 1})
G = ToolCall("g", {})


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[f(a=1)]", [F1]),
        ("[f(a=1), g()]", [F1, G]),
        ("[\n  f(\n    a = 1,\n  ),\n  g( ) ,\n]", [F1, G]),
        ("On it.\n\n[f(a=1)]\n[g()]", [F1, G]),
        ("[f(a=1)] [g()]", [F1, G]),
        (
            "[ns.get-it(x=[1, -2.5], y={'k': true}, z=('a', None))]",
            [("ns.get-it", [1, -2.5], {"k": True}, ["a", None])],
        ),
        ("[f(from='it\\'s', to=\"a, b)]\")]", [("f", "it's", "a, b)]")]),
        ('[f(a="""say "x"\n(y""", b="")]', [("f", 'say "x"\n(y', "")]),
        ('[f(a="\\d\\n\\u00e9é")]', [("f", "\\d\né é".replace(" ", ""))]),
        ("[f(a=\"x\n\\ty\\\\\n\", b='''u\nv''')]", [("f", "x\n\ty\\\n", "u\nv")]),
        (f"[f(a=-{'9' * 400}, b=-0.5e-3)]", [("f", -int("9" * 400), -0.0005)]),
        ('[f(**{"my arg": 1}, b=2)]', [("f", 1, 2)]),
        ('{"name": "f", "parameters": {"a": 1}}', [F1]),
        ('{"type": "function", "name": "f", "parameters": {"a": 1}}{"name": "g", "arguments": {}}', [F1, G]),
        ('{"name": "f", "parameters": {"a": 1}};\n {"name": "g", "parameters": {}}', [F1, G]),
        ('{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\\"a\\": 1}"}}', [F1]),
        ('{"name": "f", "parameters": {"a": "}{\\"\n"}}', [("f", '}{"\n')]),
        ('<function=f>{"a": 1}</function><function=g>{}</function>', [F1, G]),
        ('Now <function=f>{"a": 1} then', [F1]),
        ('brave_search.call(query="llamas, cria")', [("brave_search", "llamas, cria")]),
        ("<|python_start|>[f(a=1)]<|python_end|>", [F1]),
        ('<|python_start|>brave_search.call(query="x")<|python_end|>', [("brave_search", "x")]),
        ("<|python_start|>import os\nos.getcwd()<|python_end|>", [("code_interpreter", "import os\nos.getcwd()")]),
        ('<|python_start|>Let me see.<|python_end|>{"name": "f", "parameters": {"a": 1}}', [F1]),
        ('<|python_start|><|python_end|>{"name": "f", "parameters": {"a": 1}}', [F1]),
    ],
)
def test_forms(text, found):
    got = calls(parse_calls(text))
    assert [c if c in (F1, G) else (c.name, *c.arguments.values()) for c in got] == found


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "[f]",
        "[f()",
        "[f(1)]",
        "[f(a=1), 42]",
        "[f(a=1) g()]",
        "[[f(a=1)]]",
        "[(f(a=1),)]",
        "[f(a=1, a=2)]",
        '[f(a=1, **{"a": 2})]',
        "[f(a=)]",
        "[f(a=b)]",
        "[f(a=1e999)]",
        "[f(a=1j)]",
        "[f(a={1: 2})]",
        "[f(a={1, 2})]",
        "[f(a={'x': 1, 'x': 2})]",
        "[f(a=b'x')]",
        "[f(a=f'{x}')]",
        "[f(a=[1)]",
        "[f(a=1 + 1)]",
        "[f(a='x'.upper())]",
        "[f(a=__import__('os').system('touch /tmp/x'))]",
        "[f(a=(lambda: 1)())]",
        "[f(a=[x for x in (1,)])]",
        "f(a=1)",
        "see [f(a=1)]",
        "[text](http://x.org)",
        "[1, 2]",
        '{"title": "x"}',
        '{"name": "f"}',
        '{"name": "f", "parameters": [1]}',
        '{"name": "f", "parameters": {"a": NaN}}',
        '{"name": "f", "parameters": {"a": [1e999]}}',
        '{"name": "f", "parameters": {"a": 1, "a": 2}}',
        '{"name": "f", "parameters": {}, "arguments": {}}',
        '{"name": 1, "parameters": {}}',
        '{"type": "object", "name": "f", "parameters": {}}',
        "<function=f>(a)</function>",
        "<function=>{}",
        "print.call(query='x')",
        "<|python_start|> <|python_end|>",
        "<|python_end|>",
    ],
)
def test_what_is_no_call_is_text(text):
    assert parse_calls(text) == [text]
    events = cut(text, list(range(len(text))))
    assert whole(events) == text and not calls(events) and streamed(events)[0] == []


def test_text_comes_at_once_and_calls_when_they_end():
    parser = CallParser()
    said = ["Sure", ".\n", "[", "get", "(a='", "x", "')", ", g()", "]", " ok", " [1", "]\n", "[t](", "u)", "<", "b>"]
    got = [parser.push(piece) for piece in said]
    both = Called("[get(a='x'), g()]", (ToolCall("get", {"a": "x"}), ToolCall("g", {})))
    told = [[CallPart("get"), CallPart(arguments='{"a": ')], [CallPart(arguments='"x')], [CallPart(arguments='"')]]
    second, last = [CallPart(arguments="}", ends=True), CallPart("g")], CallPart(arguments="{}", ends=True)
    assert got[:9] == [["Sure"], [".\n"], [], [], *told, second, [last, both]]
    assert got[9:] == [[" ok"], [" [1"], ["]\n"], ["[t]("], ["u)"], [], ["<b>"]]
    assert parser.finish() == []


def test_unfinished_calls_are_given_back():
    for text in ('[f(a="x', '{"name": "f", "param', "<function=f>{", "<function", 'brave_search.call(query="x'):
        events = cut(text, [])
        assert whole(events) == text and not calls(events)
        assert not any(isinstance(event, str) for event in CallParser().push(text))


@pytest.mark.parametrize(
    "inner", ["[" * 100_000, "-" * 1_000_000 + "1", "9" * 10_000, "'a' 'b' " * 20_000, "(" * 99 + ")" * 99]
)
def test_hostile_values(inner):
    text = f"[f(a={inner})]"
    assert whole(parse_calls(text)) == text
    text = f'{{"name": "f", "parameters": {{"a": {inner}}}}}'
    assert parse_calls(text) == [text]


def test_reading_a_call_prints_no_warning():
    text = json.dumps('[f(a="\\d \\w", b=1or 2, c=0x1for x in "a"[0])]\n[f(a="\\d")]')
    program = f"from herd.prompt.calls import parse_calls; print(parse_calls({text})[1].calls[0].arguments['a'])"
    done = subprocess.run([sys.executable, "-W", "always", "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout == "\\d\n"
