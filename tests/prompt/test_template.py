"""Chat templates write what they are written for, and a hostile one costs no more than its caps."""

import gc
import json
import resource
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd.errors import CheckpointError, PromptError
from herd.prompt.special import Special
from herd.prompt.template import ChatTemplate

SPECIAL = {"<|eot|>": 1, "<|image|>": 2}
USER = [{"role": "user", "content": "hi"}]


def render(source: str, messages=USER, seconds: float = 10.0, **variables) -> list[str]:
    return list(ChatTemplate(source, SPECIAL, {}, seconds).pieces(messages, True, variables))


def test_pieces():
    got = render("{{ messages[0].content }}<|eot|>\n{{ x | tojson }}", x={"a": [1, None, True, "<|eot|>"]})
    assert got == ["hi", "<|eot|>", '\n{"a": [1, null, true, "<|eot|>"]}']
    assert [isinstance(piece, Special) for piece in got] == [False, True, False]


def test_keys_and_images_are_guarded():
    parts = [{"type": "text", "text": "see <|image|>"}, {"type": "image", "pixels": object()}]
    source = "{% for p in messages[0].content %}{{ p.text if p.type == 'text' else '<|image|>' }}{% endfor %}"
    got = render(source, [{"role": "user", "content": parts}])
    assert got == ["see <|image|>", "<|image|>"]
    assert [isinstance(piece, Special) for piece in got] == [False, True]
    for value in ({"<|eot|>": "<|image|>"}, {"role": "<|eot|>"}, {"type": "image", "role": ["<|eot|>"]}):
        assert render("{{ x | tojson }}", x=value) == [json.dumps(value)]
        assert not isinstance(render("{{ messages[0].x | tojson }}", [{**USER[0], "x": value}])[0], Special)


TEMPLATE = ChatTemplate("{{ messages[0].content }}\n{{ x }}\n{{ x | tojson(ensure_ascii=true) }}", SPECIAL, {})


@given(st.lists(st.sampled_from(["<|eot|>", "<|", "|>", "\\", "ufdd0", "\\ufdd0", "é", "'"])).map("".join))
def test_text_is_what_it_was_in_whatever_form_a_template_prints_it(text):
    got = list(TEMPLATE.pieces([{"role": "user", "content": text}], True, {"x": [text]}))
    assert got == [f"{text}\n{[text]}\n{json.dumps([text])}"]
    assert not isinstance(got[0], Special)


HUNDRED_THOUSAND = "range(100000)"
HOSTILE = {
    "loops": "{% for a in R %}{% for b in R %}{% for c in R %}{% endfor %}{% endfor %}{% endfor %}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "text": "{{ 'a' * 9999999999 }}",
    "list": "{{ ([0] * 9999999999) | length }}",
    "width": "{{ '%9999999999d' % 1 }}",
    "filter": "{{ 'a' | center(9999999999) }}",
    "method": "{{ 'a'.ljust(9999999999) }}",
    "doubling": "{% set n = namespace(x='aa') %}{% for a in R %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "growing list": "{% set n = namespace(x=[1]) %}{% for a in R %}{% set n.x = n.x + n.x %}{% endfor %}",
    "output": "{% for a in R %}{% for b in R %}aaaaaaaaaaaaaaaa{% endfor %}{% endfor %}",
    "recursion": "{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(1) }}",
    "lorem": "{{ lipsum(n=100000000) }}",
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE)
def test_hostile_templates(source):
    template = ChatTemplate(source.replace("R", HUNDRED_THOUSAND), SPECIAL, {}, seconds=1.0)
    for _ in range(2):  # it also goes on after one was ended
        with pytest.raises(PromptError, match="chat template") as raised:
            list(template.pieces(USER, True, {}))
        assert "\n" not in str(raised.value)


def test_a_template_that_failed_once_can_be_used_again():
    source = "{% if messages[0].content == 'loop' %}" + HOSTILE["loops"] + "{% endif %}fine"
    template = ChatTemplate(source.replace("R", HUNDRED_THOUSAND), SPECIAL, {}, seconds=1.0)
    for content in ("hi", "loop", "hi"):
        messages = [{"role": "user", "content": content}]
        if content == "loop":
            with pytest.raises(PromptError, match=r"not done in 1 s"):
                list(template.pieces(messages, True, {}))
        else:
            assert list(template.pieces(messages, True, {})) == ["fine"]


def test_a_process_that_ended_is_replaced():
    template = ChatTemplate("{{ messages[0].content }}", SPECIAL, {})
    for _ in range(2):
        assert list(template.pieces(USER, True, {})) == ["hi"]
        child = template._renderer._child
        child.kill()
        child.wait()


def test_the_process_ends_with_its_template():
    template = ChatTemplate("x", SPECIAL, {})
    assert list(template.pieces(USER, True, {})) == ["x"]
    child = template._renderer._child
    assert child.poll() is None
    del template
    gc.collect()
    assert child.poll() is not None


def test_the_processor_time_of_the_process_is_bounded():
    template = ChatTemplate("{{ x }}", SPECIAL, {}, seconds=3.0)
    assert list(template.pieces(USER, True, {"x": 1})) == ["1"]
    child = template._renderer._child
    soft, _ = resource.prlimit(child.pid, resource.RLIMIT_CPU)
    assert 3 <= soft <= 10


def test_deep_values():
    value: list = []
    for _ in range(100_000):
        value = [value]
    with pytest.raises(PromptError, match="nested too deeply"):
        render("{{ x }}", x=value)


def test_long_conversations_are_within_the_caps():
    content = "é" * 3_000_000
    assert render(
        "{{ messages[0].content }}{{ messages[0].content | upper }}", [{"role": "user", "content": content}]
    ) == [content + content.upper()]


def test_threads_share_a_template():
    template, got = ChatTemplate("{{ messages[0].content }}", SPECIAL, {}), {}

    def ask(i: int) -> None:
        got[i] = [list(template.pieces([{"role": "user", "content": f"{i}.{n}"}], True, {})) for n in range(20)]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {i: [[f"{i}.{n}"] for n in range(20)] for i in range(4)}


@pytest.mark.parametrize("value", [object(), b"x", {1: 2}, [{"a": set()}]])
def test_only_what_json_can_say(value):
    with pytest.raises(PromptError, match="chat template cannot be given"):
        render("{{ x }}", x=value)


@pytest.mark.parametrize("source", ["{% if %}", "{{ " + "(" * 10_000, "a" * 1_000_001])
def test_templates_that_are_none(source):
    with pytest.raises(CheckpointError, match="chat template"):
        ChatTemplate(source, SPECIAL, {})
