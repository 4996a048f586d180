"""Tools and JSON: whatever the weights, what must be a call is one, and what must be JSON is."""

import json
from collections.abc import Callable
from typing import Any

import pytest

import herd
from herd.engine import Token
from herd.prompt import CallPart
from herd.server.asking import conversation_ids
from herd.server.chat import calls_json
from herd.server.responses import _Output
from herd.server.say import Part, Spec, Voice
from herd.server.schemas import Message, Tool
from tests.server.served import Served, user

TURN = [user("What is the weather in Rome?")]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"$ref": "#/$defs/days"}},
            "required": ["city", "days"],
            "additionalProperties": False,
            "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
        },
    },
}
TIME = {"type": "function", "function": {"name": "get_time"}}
COUNTRY = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "people": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "people"],
    "additionalProperties": False,
}


def fits(arguments: str) -> bool:
    value = json.loads(arguments)
    return value.keys() == {"city", "days"} and value["city"] in ("Rome", "Oslo") and 1 <= value["days"] <= 9


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_tool_that_must_be_called_is(served: Served, choice: Any) -> None:
    body = {"messages": TURN, "tools": [WEATHER], "tool_choice": choice, "max_tokens": 200, "seed": 3}
    whole = served.ask(**body)["choices"][0]
    [call] = whole["message"]["tool_calls"]
    assert whole["finish_reason"] == "tool_calls" and whole["message"]["content"] is None
    assert call["type"] == "function" and call["id"] and call["function"]["name"] == "get_weather"
    assert fits(call["function"]["arguments"])
    chunks = [chunk["choices"][0] for chunk in served.events(**body)]
    first, *more = [call for chunk in chunks for call in chunk["delta"].get("tool_calls", ())]
    assert first["index"] == 0 and first["id"] and first["function"] == {"name": "get_weather", "arguments": ""}
    assert all(delta.keys() == {"index", "function"} and delta["index"] == 0 for delta in more) and len(more) > 3
    assert "".join(delta["function"]["arguments"] for delta in more) == call["function"]["arguments"]
    assert not any(chunk["delta"].get("content") for chunk in chunks)
    assert chunks[-1]["finish_reason"] == "tool_calls"


def test_of_several_tools_one_is_called(served: Served) -> None:
    for seed in range(4):
        body = {"messages": TURN, "tools": [WEATHER, TIME], "tool_choice": "required", "seed": seed}
        said = served.ask(**body, max_tokens=300)["choices"][0]
        if said["finish_reason"] == "tool_calls":
            [call] = said["message"]["tool_calls"]
            assert call["function"]["name"] == "get_time" or fits(call["function"]["arguments"])
            return
    raise AssertionError("no call was complete")


@pytest.mark.parametrize("form", ["json_object", "json_schema"])
def test_answers_that_are_json(served: Served, form: str) -> None:
    wanted: dict[str, Any] = {"type": form}
    if form == "json_schema":
        wanted["json_schema"] = {"name": "country", "schema": COUNTRY, "strict": True}
    complete = 0
    for seed in range(3):
        body = {"messages": TURN, "response_format": wanted, "seed": seed, "max_tokens": 300, "temperature": 0.7}
        choice = served.ask(**body)["choices"][0]
        if choice["finish_reason"] == "stop":
            value = json.loads(choice["message"]["content"])
            assert isinstance(value, dict)
            if form == "json_schema":
                assert value.keys() == {"name", "people"} and 0 <= value["people"] <= 99 and len(value["name"]) <= 8
            complete += 1
    assert complete or form == "json_object", "answers of this schema are short"


def test_a_schema_found_impossible_while_it_is_kept_ends_its_own_answer_only(served: Served) -> None:
    never = {"allOf": [{"type": "string", "pattern": "^a+$"}, {"type": "string", "pattern": "^b+$"}]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": never}}
    reply = served.http.post("/v1/chat/completions", json={"messages": TURN, "response_format": form, "max_tokens": 9})
    assert reply.status_code == 400 and "schema" in reply.json()["error"]["message"]
    served.alive()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "bad name"}}]}, "tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format"),
    ],
)
def test_tools_that_cannot_be(served: Served, fields: dict[str, Any], param: str) -> None:
    error = served.ask(messages=TURN, status=400, **fields)["error"]
    assert (error["param"] or "").startswith(param)


def tool(value: dict[str, Any]) -> Tool:
    return Tool.model_validate(value)


def test_tools_are_told_where_the_template_does_not(served: Served) -> None:
    """The tiny model's template knows of no tools and calls."""
    server = served.app.state.server
    turns = [
        user("What is the weather in Rome?"),
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
    ]
    ids = conversation_ids(server, [Message.model_validate(turn) for turn in turns], [tool(WEATHER)])
    text = served.model.tokenizer.decode(ids, keep_special=True)
    assert text.startswith("<|im_start|>system\nYou can call functions") and '"name": "get_weather"' in text
    assert '<|im_start|>assistant\n[get_weather(city="Rome")]<|im_end|>' in text
    assert "<|im_start|>tool\nsunny<|im_end|>" in text
    told = served.ask(messages=turns, tools=[WEATHER], max_tokens=3)
    assert told["usage"]["prompt_tokens"] == len(ids)
    untold = served.ask(messages=turns, tools=[WEATHER], tool_choice="none", max_tokens=3)
    assert untold["usage"]["prompt_tokens"] < len(ids)


@pytest.fixture
def say(model: herd.Model) -> Callable[..., tuple[list[Part], Voice]]:
    """What a voice makes of a text that the model says."""

    def said(text: str, **spec: Any) -> tuple[list[Part], Voice]:
        voice = Voice(model.tokenizer, Spec(**spec))
        parts = [part for id in model.tokenizer.encode(text) for part in voice.push(Token(0, id, None))]
        return parts + voice.finish(), voice

    return said


def calls(parts: list[Part]) -> list[tuple[str, str]]:
    return [(call["function"]["name"], call["function"]["arguments"]) for call in calls_json(parts)]


def text_of(parts: list[Part]) -> str:
    return "".join(part for part in parts if isinstance(part, str))


NAMES = frozenset({"get_weather", "get_time"})
ROME, NOW = ("get_weather", '{"city": "Rome"}'), ("get_time", "{}")
FORMS = [
    '[get_weather(city="Rome")]',
    '{"name": "get_weather", "parameters": {"city": "Rome"}}',
    '<function=get_weather>{"city": "Rome"}</function>',
    '{"type": "function", "function": {"name": "get_weather", "arguments": "{\\"city\\": \\"Rome\\"}"}}',
]


@pytest.mark.parametrize("text", FORMS)
def test_calls_of_all_forms(say: Callable[..., tuple[list[Part], Voice]], text: str) -> None:
    parts, voice = say(text, tools=NAMES)
    assert calls(parts) == [ROME] and not text_of(parts) and voice.calls == 1
    parts, voice = say(text, tools=frozenset({"other"}))
    assert parts and all(isinstance(part, str) for part in parts), "a call of no tool is text"
    assert text_of(parts) == text and not voice.calls
    parts, voice = say(text)
    assert text_of(parts) == text


def test_one_call_if_one_is_wanted(say: Callable[..., tuple[list[Part], Voice]]) -> None:
    text = 'Let me see.\n[get_weather(city="Rome"), get_time()] and [get_time()]'
    parts, voice = say(text, tools=NAMES)
    assert calls(parts) == [ROME, NOW]
    parts, voice = say(text, tools=NAMES, single=True)
    assert text_of(parts) == "Let me see.\n"
    assert calls(parts) == [ROME] and voice.done


def test_what_turns_out_to_be_no_call_is_text_and_has_no_end(say: Callable[..., tuple[list[Part], Voice]]) -> None:
    text = '[get_weather(city="Rome", days=days)]'
    parts, voice = say(text, tools=NAMES)
    told = [part for part in parts if isinstance(part, CallPart)]
    assert told[0].name == "get_weather" and not any(part.ends for part in told)
    assert text_of(parts) == text and calls(parts) == [] and not voice.calls


def test_responses_say_which_call_was_none() -> None:
    output = _Output()
    parts: list[Part] = [CallPart("f"), CallPart(arguments='{"a": '), "[f(a=b)]", CallPart("g")]
    events = [one for part in [*parts, CallPart(arguments="{}", ends=True)] for one in output.take(part)]
    assert [item["status"] for item in output.items] == ["incomplete", "completed", "completed"]
    assert [item["type"] for item in output.items] == ["function_call", "message", "function_call"]
    assert output.items[2]["arguments"] == "{}"
    assert [kind for kind, _ in events[:4]] == [
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
    ]
