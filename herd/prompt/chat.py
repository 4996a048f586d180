"""Llama 4's chat format as Meta's code writes it, for models whose folder has no chat template."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from herd.errors import PromptError
from herd.prompt import llama4
from herd.prompt.images import IMAGE
from herd.prompt.special import Special
from herd.prompt.tools import ToolCall, ToolForm, calls_of, tools_text, write

Message = Mapping[str, Any]
_HEADERS = {"system": "system", "user": "user", "assistant": "assistant", "tool": "ipython", "ipython": "ipython"}
_TOKENS = (llama4.BEGIN, llama4.HEADER_START, llama4.HEADER_END, llama4.END_OF_MESSAGE, llama4.END_OF_TURN)


def is_known(special: Mapping[str, int]) -> bool:
    """Whether a vocabulary has the special tokens of this format."""
    return special.keys() >= set(_TOKENS)


def pieces(
    messages: Sequence[Message],
    add_generation_prompt: bool = True,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    tool_form: ToolForm = "pythonic",
    **unknown: Any,
) -> Iterator[str]:
    """A conversation as special tokens and texts to be encoded one by one.

    tools: told to the model in the system prompt; tool_form: in which calls are written. A message of an assistant ends
    with end-of-message if it calls tools, or if its `stop_reason` is "end_of_message"; results of tools always do.
    """
    if unknown:
        raise PromptError(f"Llama 4's chat format takes tools and tool_form; got {', '.join(unknown)}")
    yield Special(llama4.BEGIN)
    for message in _with_tools(messages, tools, tool_form) if tools else messages:
        yield from _message(message, tool_form)
    if add_generation_prompt:
        yield from _header("assistant")


def images(messages: Sequence[Message]) -> list[Message]:
    """The image parts of a conversation, in the order of their tokens in its prompt."""
    contents = [message.get("content") for message in messages]
    parts = [part for content in contents if isinstance(content, list | tuple) for part in content]
    return [part for part in parts if isinstance(part, Mapping) and part.get("type") == "image"]


def plain_calls(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages whose tool calls are as chat templates expect them."""
    return [
        {**message, "tool_calls": [_plain(*both) for both in zip(message["tool_calls"], calls, strict=True)]}
        if (calls := calls_of(message))
        else dict(message)
        for message in messages
    ]


def _plain(given: Any, call: ToolCall) -> dict[str, Any]:
    more = given if isinstance(given, Mapping) else {}  # such as its id
    return {**more, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _with_tools(messages: Sequence[Message], defined: Sequence[Mapping[str, Any]], form: ToolForm) -> list[Message]:
    told = tools_text(defined, form)
    if not messages or messages[0].get("role") != "system":
        return [{"role": "system", "content": told}, *messages]
    content = messages[0].get("content")
    both = f"{content}\n\n{told}" if isinstance(content, str) else [*_parts(messages[0]), f"\n\n{told}"]
    return [{**messages[0], "content": both}, *messages[1:]]


def _message(message: Message, form: ToolForm) -> Iterator[str]:
    role = message.get("role")
    if role not in _HEADERS:
        raise PromptError(f"the role of a message is one of {', '.join(_HEADERS)}; got {role!r}")
    calls = calls_of(message)
    if calls and role != "assistant":
        raise PromptError(f"only an assistant calls tools; a message of the role {role!r} has tool_calls")
    yield from _header(_HEADERS[role])
    yield from _parts(message)
    yield from write(calls, form)
    more = bool(calls) or (role == "assistant" and message.get("stop_reason") == "end_of_message")
    yield Special(llama4.END_OF_MESSAGE if more or _HEADERS[role] == "ipython" else llama4.END_OF_TURN)


def _header(role: str) -> Iterator[str]:
    yield from (Special(llama4.HEADER_START), role, Special(llama4.HEADER_END), "\n\n")


def _parts(message: Message) -> Iterator[str]:
    content = message.get("content")
    if isinstance(content, Mapping) and _HEADERS[message["role"]] == "ipython":
        content = json.dumps(content, ensure_ascii=False)
    if content is None and message.get("tool_calls"):
        return
    for part in content if isinstance(content, list | tuple) else [content]:
        kind = part.get("type") if isinstance(part, Mapping) else "text" if isinstance(part, str) else None
        text = part.get("text") if isinstance(part, Mapping) else part
        if kind == "image":
            yield Special(IMAGE)
        elif kind == "text" and isinstance(text, str):
            yield text
        else:
            raise PromptError(
                f"content of a message is a text, or a list of text and image parts; got {kind or type(part).__name__}"
            )
