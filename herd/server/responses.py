"""`/v1/responses`: OpenAI's newer way to say what chats say. Nothing is stored; requests bring their conversations."""

import json
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field, JsonValue, ValidationError

from herd.prompt import CallPart
from herd.server.asking import Asked, ask, chat_plan
from herd.server.asks import End
from herd.server.chat import citation_json
from herd.server.errors import ApiError, told
from herd.server.say import Part, saying
from herd.server.schemas import Body, ChatRequest, Choice, Definition, Name, Text, TextPart
from herd.server.state import client, server
from herd.server.streaming import EventStream, event, unless_gone

router = APIRouter()


class InputImage(Body):
    """An image of a message, as a data URL."""

    type: Literal["input_image"]
    image_url: str
    detail: Literal["auto", "low", "high", "original"] | None = None


class InputMessage(Body):
    """One turn."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Annotated[TextPart | InputImage, Field(discriminator="type")]]
    id: str | None = None
    status: str | None = None
    citations: list[JsonValue] | None = None
    phase: str | None = None


class InputCall(Body):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: Name
    name: Name
    arguments: Text
    id: str | None = None
    status: str | None = None


class InputOutput(Body):
    """What a call came to."""

    type: Literal["function_call_output"]
    call_id: Name
    output: Text
    id: str | None = None
    status: str | None = None


class FunctionTool(Definition):
    """A tool that may be called."""

    type: Literal["function"]


class NamedTool(Body):
    """A tool that must be called."""

    type: Literal["function"]
    name: Name


class Format(Body):
    """What the text of the answer is."""

    type: Literal["text", "json_object", "json_schema"]
    name: Name = "answer"
    description: Text | None = None
    schema_: Annotated[dict[str, Any] | bool | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextSettings(Body):
    """See Format."""

    format: Format | None = None


class ResponsesRequest(Body):
    """Of /v1/responses. context, quote: see `ChatRequest`."""

    input: Text | Annotated[list[InputMessage | InputCall | InputOutput], Field(min_length=1, max_length=100_000)]
    model: Name | None = None
    instructions: Text | None = None
    max_output_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: float | None = None
    stream: bool | None = None
    text: TextSettings | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=128)] | None = None
    tool_choice: Choice | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    context: Name | Annotated[list[Name], Field(max_length=64)] | None = None
    quote: bool | None = None
    store: bool | None = None  # nothing is stored either way, and previous_response_id is refused
    truncation: Literal["disabled"] | None = None
    user: str | None = None  # these have no meaning here
    metadata: dict[str, JsonValue] | None = None


@dataclass
class _Output:
    """The items of a response as they come about. An item is open until the next one begins."""

    items: list[dict[str, Any]] = field(default_factory=list)
    open: dict[str, Any] | None = None

    def take(self, part: Part) -> Iterator[tuple[str, dict[str, Any]]]:
        """Go on with text or a call; the events of that."""
        if isinstance(part, CallPart):
            yield from self._call(part)
            return
        if self.open is None or self.open["type"] != "message":
            yield from self.close()
            content = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            self.open = {
                "type": "message",
                "id": _id("msg"),
                "status": "in_progress",
                "role": "assistant",
                "content": [],
            }
            self.items.append(self.open)
            yield "output_item.added", {"output_index": self._at, "item": self.open}
            self.open["content"].append(content)
            yield "content_part.added", {**self._where(), "part": content}
        self.open["content"][0]["text"] += part
        yield "output_text.delta", {**self._where(), "delta": part, "logprobs": []}

    def close(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """End the item that is open."""
        if self.open is None:
            return
        if self.open["type"] == "function_call":
            yield from self._end_call("incomplete")
            return
        part, self.open["status"] = self.open["content"][0], "completed"
        yield "output_text.done", {**self._where(), "text": part["text"], "logprobs": []}
        yield "content_part.done", {**self._where(), "part": part}
        yield "output_item.done", {"output_index": self._at, "item": self.open}
        self.open = None

    def cite(self, end: End) -> None:
        """Say where an answer comes from."""
        if end.citations and self.open is not None and self.open["type"] == "message":
            self.open["citations"] = [citation_json(citation) for citation in end.citations]

    def _call(self, part: CallPart) -> Iterator[tuple[str, dict[str, Any]]]:
        if part.name is not None:
            yield from self.close()
            item = {"type": "function_call", "id": _id("fc"), "call_id": _id("call"), "name": part.name}
            self.open = {**item, "arguments": "", "status": "in_progress"}
            self.items.append(self.open)
            yield "output_item.added", {"output_index": self._at, "item": dict(self.open)}
        assert self.open is not None and self.open["type"] == "function_call"
        if part.arguments:
            self.open["arguments"] += part.arguments
            place = {"output_index": self._at, "item_id": self.open["id"]}
            yield "function_call_arguments.delta", {**place, "delta": part.arguments}
        if part.ends:
            yield from self._end_call("completed")

    def _end_call(self, status: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """End the call that is open. An incomplete one was none, and comes as text, too."""
        assert self.open is not None
        item, self.open = self.open, None
        item["status"] = status
        said = {"name": item["name"], "arguments": item["arguments"]}
        yield "function_call_arguments.done", {"output_index": self._at, "item_id": item["id"], **said}
        yield "output_item.done", {"output_index": self._at, "item": item}

    @property
    def _at(self) -> int:
        return len(self.items) - 1

    def _where(self) -> dict[str, Any]:
        assert self.open is not None
        return {"output_index": self._at, "item_id": self.open["id"], "content_index": 0}


@router.post("/v1/responses")
async def respond(body: ResponsesRequest, request: Request) -> Response:
    """Answer a conversation."""
    its = server(request)
    its.service.expect(client(request).turn)
    plan = await unless_gone(request, chat_plan(its, _chat(body)))
    asked = await unless_gone(request, ask(its, client(request), plan))
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or []]
    head = {
        "id": _id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "model": its.settings.name,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "tool_choice": body.model_dump(exclude_none=True).get("tool_choice", "auto"),
        "tools": tools,
        "store": False,
        "truncation": "disabled",
        "metadata": body.metadata or {},
    }
    if body.stream:
        return EventStream(asked.answers, _events(asked, head))
    return JSONResponse(await unless_gone(request, _whole(asked, head)))


async def _whole(asked: Asked, head: dict[str, Any]) -> dict[str, Any]:
    async with asked.answers:
        async for kind, value in _happenings(asked, head):
            if kind in ("completed", "incomplete"):
                said = dict(value["response"])
                return {**said, "output": [item for item in said["output"] if item["status"] != "incomplete"]}
    raise AssertionError("an answer ends")


async def _events(asked: Asked, head: dict[str, Any]) -> AsyncIterator[str]:
    number = -1

    def numbered(kind: str, value: dict[str, Any]) -> str:
        nonlocal number
        number += 1
        name = f"response.{kind}"
        return event({"type": name, "sequence_number": number, **value}, name)

    try:
        async for kind, value in _happenings(asked, head):
            yield numbered(kind, value)
    except Exception as error:
        said = told(error).body["error"]
        failed = {"code": said["code"] or "server_error", "message": said["message"]}
        yield numbered("failed", {"response": _response(head, "failed", [], error=failed)})


async def _happenings(asked: Asked, head: dict[str, Any]) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """The events of a response, by their names."""
    output, generated = _Output(), 0
    begun = _response(head, "in_progress", [])
    yield "created", {"response": begun}
    yield "in_progress", {"response": begun}
    async for said in saying(asked.answers, asked.voices):
        generated += len(said.tokens)
        for part in said.parts:
            for one in output.take(part):
                yield one
        if said.end is not None:
            asked.check(said.index)
            output.cite(said.end)
            for one in output.close():
                yield one
            status = "incomplete" if said.end.finish == "length" else "completed"
            usage = {
                "input_tokens": asked.prompt_tokens,
                "input_tokens_details": {"cached_tokens": said.end.cached_tokens},
                "output_tokens": generated,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": asked.prompt_tokens + generated,
            }
            yield status, {"response": _response(head, status, output.items, usage=usage)}


def _response(head: dict[str, Any], status: str, items: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
    said = {**head, "status": status, "incomplete_details": cut, "error": None, "output": items, "usage": None, **more}
    return json.loads(json.dumps(said))  # a copy: items go on


def _chat(body: ResponsesRequest) -> ChatRequest:
    """The same as a chat. ApiError if it cannot be one."""
    messages: list[dict[str, Any]] = []
    if body.instructions is not None:
        messages.append({"role": "system", "content": body.instructions})
    given = body.input if isinstance(body.input, list) else [InputMessage(role="user", content=body.input)]
    for item in given:
        messages += _messages(item, messages)
    form = body.text.format if body.text is not None else None
    chat: dict[str, Any] = {
        "messages": messages,
        **body.model_dump(
            include={"model", "temperature", "top_p", "parallel_tool_calls", "context", "quote"}, exclude_none=True
        ),
        "max_tokens": body.max_output_tokens,
        "tools": [_tool(tool) for tool in body.tools or []],
        "tool_choice": body.tool_choice,
    }
    if isinstance(body.tool_choice, NamedTool):
        chat["tool_choice"] = {"type": "function", "function": {"name": body.tool_choice.name}}
    if form is not None:
        chat["response_format"] = {"type": form.type}
        if form.type == "json_schema":
            chat["response_format"]["json_schema"] = {"name": form.name, "schema": form.schema_}
    try:
        return ChatRequest.model_validate(chat)
    except ValidationError as error:
        first = error.errors()[0]
        raise ApiError(400, f"{'.'.join(map(str, first['loc']))}: {first['msg']}", param="input") from error


def _messages(item: InputMessage | InputCall | InputOutput, before: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """An item as messages of a chat; calls that follow each other are of one message."""
    match item:
        case InputCall():
            function = {"name": item.name, "arguments": item.arguments}
            call = {"id": item.call_id, "type": "function", "function": function}
            if before and before[-1]["role"] == "assistant":
                before[-1].setdefault("tool_calls", []).append(call)
                return []
            return [{"role": "assistant", "content": None, "tool_calls": [call]}]
        case InputOutput():
            return [{"role": "tool", "tool_call_id": item.call_id, "content": item.output}]
        case InputMessage():
            if isinstance(item.content, str):
                return [{"role": item.role, "content": item.content}]
            parts = [
                {"type": "text", "text": part.text}
                if isinstance(part, TextPart)
                else {"type": "image_url", "image_url": {"url": part.image_url}}
                for part in item.content
            ]
            return [{"role": item.role, "content": parts}]


def _tool(tool: FunctionTool) -> dict[str, Any]:
    return {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}


def _id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(12)}"
