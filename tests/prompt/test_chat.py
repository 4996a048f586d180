"""Conversations become the ids that Meta's code and, with a chat template, transformers make of them."""

import io
import json
import shutil
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_models import datatypes as meta
from PIL import Image
from transformers.utils.chat_template_utils import render_jinja_template

from herd.errors import PromptError
from herd.prompt import Tokenizer, chat
from herd.prompt.images import expand
from herd.prompt.tools import ToolCall, tools_text
from tests.media import meta_preprocess
from tests.prompt.meta import FOLDER, converted, ours, theirs

TEMPLATE = Path(__file__).with_name("llama4.jinja").read_text("utf-8")
SPECIAL = st.sampled_from(["<|eot|>", "<|header_start|>", "<|image|>", "<|python_start|>", "<|", "|>", "eot"])
TEXT = st.lists(st.text(max_size=8) | SPECIAL, max_size=4).map("".join)
PARTS = TEXT | st.lists(st.builds(lambda text: {"type": "text", "text": text}, TEXT), max_size=3)
ARGUMENTS = st.dictionaries(st.sampled_from(["a", "b"]), st.integers() | st.booleans() | st.sampled_from(["x", "é y"]))
CALLS = st.lists(st.builds(ToolCall, st.sampled_from(["f", "get_it"]), ARGUMENTS), min_size=1, max_size=1)
MESSAGES = st.lists(
    st.one_of(
        st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": PARTS}),
        st.fixed_dictionaries({"role": st.just("assistant"), "content": TEXT, "tool_calls": CALLS}),
        st.fixed_dictionaries(
            {"role": st.just("assistant"), "content": TEXT, "stop_reason": st.just("end_of_message")}
        ),
    ),
    max_size=5,
)


@cache
def chat_format() -> ModuleType:
    return meta_preprocess.load("chat_format")


def raw(message: dict) -> meta.RawMessage:
    """A message in Meta's own classes."""
    calls = [
        meta.ToolCall(call_id="1", tool_name=call.name, arguments=call.arguments)
        for call in message.get("tool_calls", [])
    ]
    return meta.RawMessage(**{**message, "tool_calls": calls})


FORMS = {"pythonic": "python_list", "json": "json", "tag": "function_tag"}


@given(MESSAGES, st.sampled_from(sorted(FORMS)))
def test_ids_equal_meta(messages, form):
    theirs_ = (
        chat_format()
        .ChatFormat(theirs())
        .encode_dialog_prompt([raw(message) for message in messages], meta.ToolPromptFormat[FORMS[form]])
    )
    assert ours().chat(messages, tool_form=form) == theirs_.tokens
    assert ours().chat(messages, tool_form=form, add_generation_prompt=False) == theirs_.tokens[:-4]


def test_the_dialog_of_the_documentation():
    messages = [{"role": "system", "content": "You are a helpful assistant"}, {"role": "user", "content": "Hi"}]
    system = [200000, 200005, 15651, 200006, 368, 4662, 583, 262, 19933, 43910, 200008]
    user = [200005, 1556, 200006, 368, 25181, 200008]
    assert ours().chat(messages) == [*system, *user, 200005, 140680, 200006, 368]


def test_images_equal_meta():
    """Several images in one message and across turns, of one tile and of many."""
    sizes = {"image_size": {"height": 336, "width": 336}, "patch_size": {"height": 14, "width": 14}}
    vision = chat_format().VisionArgs(
        **sizes, dim=1408, n_layers=34, n_heads=16, mlp_ratio=4.0, output_dim=4096, pixel_shuffle_ratio=0.5
    )
    data = []
    for size in ((200, 100), (700, 400), (336, 336)):
        data.append(io.BytesIO())
        Image.new("RGB", size).save(data[-1], "png")
    turns = [["What is ", 0, "and", 1], ["It is a llama."], [2, " <|image|> and this?"]]
    roles = ["user", "assistant", "user"]
    mine = [{"role": r, "content": [picture(p) for p in parts]} for r, parts in zip(roles, turns, strict=True)]
    meta_parts = [
        [
            {"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "data": data[p].getvalue()}
            for p in parts
        ]
        for parts in turns
    ]
    wanted = (
        chat_format()
        .ChatFormat(theirs(), vision)
        .encode_dialog_prompt(
            [meta.RawMessage(role=r, content=parts) for r, parts in zip(roles, meta_parts, strict=True)]
        )
    )
    assert [part["number"] for part in chat.images(mine)] == [0, 1, 2]
    grids = [(1, 1), (2, 3), (1, 1)]
    assert [len(tiles) for tiles in wanted.images] == [1, 7, 1]
    assert expand(ours().chat(mine), grids, ours().special_tokens, 144) == wanted.tokens


def picture(part: str | int) -> dict | str:
    return part if isinstance(part, str) else {"type": "image", "number": part}


TOOL = {"name": "get_it", "description": "Gets <|eot|> it", "parameters": {"type": "object", "properties": {}}}


def test_tools_are_told_in_the_system_prompt():
    user = {"role": "user", "content": "Hi"}
    told = {"role": "system", "content": tools_text([TOOL])}
    assert ours().chat([user], tools=[TOOL]) == ours().chat([told, user])
    both = {"role": "system", "content": f"Be brief.\n\n{tools_text([TOOL], 'json')}"}
    system = {"role": "system", "content": "Be brief."}
    assert ours().chat([system, user], tools=[TOOL], tool_form="json") == ours().chat([both, user])
    parts = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    assert ours().decode(ours().chat([parts, user], tools=[TOOL])).count("Be brief.\n\nYou can call") == 1


def test_results_and_code():
    code = {"role": "assistant", "content": None, "tool_calls": [ToolCall("code_interpreter", {"code": "<|eot|> 1"})]}
    result = {"role": "tool", "content": {"é": [1]}}
    text = ours().decode(ours().chat([code, result]), keep_special=True)
    head = "<|header_start|>{}<|header_end|>\n\n"
    called = "<|begin_of_text|>" + head.format("assistant") + "<|python_start|><|eot|> 1<|python_end|><|eom|>"
    assert text == called + head.format("ipython") + '{"é": [1]}<|eom|>' + head.format("assistant")
    assert ours().chat([code]).count(ours().token_id("<|eot|>")) == 0


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"role": "robot", "content": "x"}, "role of a message is one of system, user"),
        ({"content": "x"}, "role"),
        ({"role": "user"}, "content of a message"),
        ({"role": "user", "content": 3}, "content of a message"),
        ({"role": "user", "content": {"a": 1}}, "content of a message"),
        ({"role": "user", "content": [{"type": "video"}]}, "got video"),
        ({"role": "user", "content": [{"type": "text"}]}, "got text"),
        ({"role": "user", "content": "x", "tool_calls": [ToolCall("f", {})]}, "only an assistant calls tools"),
        ({"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}, "tool call needs a name"),
    ],
)
def test_bad_messages(message, error):
    with pytest.raises(PromptError, match=error):
        ours().chat([message])


def test_unknown_variables():
    with pytest.raises(PromptError, match="takes tools and tool_form; got documents"):
        ours().chat([{"role": "user", "content": "x"}], documents=[])


@pytest.fixture(scope="module")
def mine(tmp_path_factory) -> Tokenizer:
    """A model folder with the template."""
    folder = tmp_path_factory.mktemp("model")
    shutil.copy(FOLDER / "tokenizer.model", folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    return Tokenizer.load(folder)


OPENAI = {"type": "function", "function": {"name": "f", "arguments": {"a": "é", "b": [1, None]}}}
TURNS = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": [{"type": "text", "text": "Look "}, {"type": "image"}, {"type": "text", "text": "!"}]},
    {"role": "assistant", "content": "Let me see.", "tool_calls": [OPENAI, OPENAI]},
    {"role": "tool", "content": "21 °C"},
    {"role": "assistant", "content": "  It is warm.\n"},
]


@pytest.mark.parametrize("messages", [TURNS, TURNS[1:], TURNS[1:2], TURNS[:2], TURNS[3:]], ids=range(5))
@pytest.mark.parametrize(
    "options", [{}, {"tools": [TOOL]}, {"tools": [TOOL], "tools_in_user_message": False}], ids=range(3)
)
def test_templates_equal_transformers(mine, messages, options):
    options = json.loads(json.dumps(options).replace("<|eot|>", "eot"))  # transformers would take it for the token
    others = {"bos_token": "<|begin_of_text|>", "add_generation_prompt": True, **options}
    (text,), _ = render_jinja_template([messages], others.pop("tools", None), chat_template=TEMPLATE, **others)
    assert mine.chat(messages, **options) == converted().encode(text, add_special_tokens=False).ids


def test_templates_take_calls_in_any_form(mine):
    as_text = {"type": "function", "function": {"name": "f", "arguments": json.dumps(OPENAI["function"]["arguments"])}}
    as_call = ToolCall(**OPENAI["function"])
    wanted = mine.chat(TURNS[:3])
    for call in (as_text, as_call, OPENAI["function"]):
        assert mine.chat([*TURNS[:2], {**TURNS[2], "tool_calls": [call, call]}]) == wanted


@given(st.lists(TEXT, min_size=3, max_size=3))
def test_nothing_in_a_template_becomes_special(mine, texts):
    call = {"name": "f", "arguments": {texts[0]: texts[1]}}
    tool = {"name": texts[2], "parameters": {texts[0]: [texts[1]]}}
    messages = [{"role": "user", "content": texts[0]}, {"role": "assistant", "content": texts[1], "tool_calls": [call]}]
    harmless = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "x", "tool_calls": [{**call, "arguments": {}}]},
    ]
    special = [i for i in mine.chat(messages, tools=[tool]) if i >= 200_000]
    assert special == [i for i in mine.chat(harmless, tools=[TOOL["parameters"]]) if i >= 200_000]
