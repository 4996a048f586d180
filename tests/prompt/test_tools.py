"""Tools are told to a model as Meta's prompts tell them, and calls are written as Meta's code writes them."""

import json

import pytest
from llama_models.datatypes import ToolCall as MetaCall
from llama_models.datatypes import ToolPromptFormat
from llama_models.llama3.tool_utils import ToolUtils

from herd.errors import PromptError
from herd.prompt.tools import ToolCall, calls_of, tools_text, write

CALLS = [
    ToolCall("get_weather", {"city": "São Paulo", "days": 3, "hourly": True, "unit": None, "at": [1.5, "x"]}),
    ToolCall("now", {}),
    ToolCall("brave_search", {"query": "llama herd"}),
    ToolCall("wolfram_alpha", {"query": "1+1"}),
    ToolCall("photogen", {"query": "a llama"}),
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
@pytest.mark.parametrize(("form", "meta"), [("pythonic", "python_list"), ("json", "json"), ("tag", "function_tag")])
def test_calls_are_written_as_meta_does(call, form, meta):
    theirs = ToolUtils.encode_tool_call(
        MetaCall(call_id="1", tool_name=call.name, arguments=call.arguments), ToolPromptFormat[meta]
    )
    assert write([call], form) == [theirs]


def test_several_calls():
    made = [
        ToolCall("f", {"a": 'say "x"\n', "my b": {"k": False}}),
        ToolCall("g", {}),
        CALLS[2],
        ToolCall("h", {"c": -1}),
    ]
    search = 'brave_search.call(query="llama herd")'
    assert write(made) == ['[f(a="say \\"x\\"\\n", **{"my b": {"k": False}}), g()]', search, "[h(c=-1)]"]
    assert write(made[1:], "tag") == ["<function=g>{}</function>", search, '<function=h>{"c": -1}</function>']
    code = ToolCall("code_interpreter", {"code": "1 + 1"})
    assert write([code, made[1]]) == ["<|python_start|>", "1 + 1", "<|python_end|>", "[g()]"]
    assert write([]) == []


@pytest.mark.parametrize(
    "call",
    [
        ToolCall("f g", {}),
        ToolCall("f", {"a": float("nan")}),
        ToolCall("f", {"a": {1: 2}}),
        ToolCall("f", {"a": object()}),
        ToolCall("f", {"a": b"x"}),
    ],
)
def test_what_cannot_be_written(call):
    with pytest.raises(PromptError, match="tool"):
        write([call])


WEATHER = {
    "name": "get_weather",
    "description": "Weather of a city {today}",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


@pytest.mark.parametrize(
    ("form", "shown"), [("pythonic", "[function_name("), ("json", '{"name"'), ("tag", "<function=")]
)
def test_tools_are_told(form, shown):
    text = tools_text([{"type": "function", "function": WEATHER}, {"name": "now"}], form)
    assert shown in text
    listed = json.loads(text[text.index("[\n    {") :])
    assert listed == [
        {**WEATHER, "parameters": {**WEATHER["parameters"], "type": "dict"}},
        {"name": "now", "parameters": {"type": "dict", "required": [], "properties": {}}},
    ]


@pytest.mark.parametrize(
    "tool", [{}, {"name": "a b"}, {"name": 1}, {"function": 3}, "f", {"name": "f", "parameters": [1]}]
)
def test_bad_tools(tool):
    with pytest.raises(PromptError, match="tool"):
        tools_text([tool])


def test_calls_of_messages():
    f = ToolCall("f", {"a": 1})
    plain = {"name": "f", "arguments": {"a": 1}}
    openai = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    assert calls_of({"tool_calls": [f, plain, openai]}) == [f, f, f]
    assert calls_of({"content": "x"}) == calls_of({"tool_calls": None}) == []
    for wrong in (3, [3], [{}], [{"name": "f"}], [{"name": "f", "arguments": "{"}], [{"name": "f", "arguments": "[]"}]):
        with pytest.raises(PromptError, match="call"):
            calls_of({"tool_calls": wrong})
    with pytest.raises(PromptError, match="pythonic, json, tag; got 'xml'"):
        write([f], "xml")
