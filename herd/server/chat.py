"""`/v1/chat/completions`."""

import secrets
import time
from collections.abc import AsyncIterator, Iterable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from herd.context.citations import Citation
from herd.engine import Token
from herd.prompt import CallPart, Tokenizer
from herd.server.asking import Asked, Plan, ask, chat_plan
from herd.server.asks import End
from herd.server.say import Part, chat_logprobs, finish_of, saying
from herd.server.schemas import ChatRequest
from herd.server.state import client, server
from herd.server.streaming import DONE, EventStream, event, unless_gone

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation, from contexts if they are named."""
    its = server(request)
    asked = await unless_gone(request, _begin(request, body))
    head = {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "created": int(time.time()),
        "model": its.settings.name,
        "system_fingerprint": f"fp_{its.model.fingerprint[:12]}",
    }
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage is True
        return EventStream(asked.answers, _events(its.model.tokenizer, asked, head, usage))
    return JSONResponse(await unless_gone(request, _whole(its.model.tokenizer, asked, head)))


async def _begin(request: Request, body: ChatRequest) -> Asked:
    server(request).service.expect(client(request).turn)
    plan: Plan = await chat_plan(server(request), body)
    return await ask(server(request), client(request), plan)


async def _whole(tokenizer: Tokenizer, asked: Asked, head: dict[str, Any]) -> dict[str, Any]:
    count = len(asked.voices)
    parts: list[list[Part]] = [[] for _ in range(count)]
    tokens: list[list[Token]] = [[] for _ in range(count)]
    ends = dict[int, End]()
    async with asked.answers:
        async for said in saying(asked.answers, asked.voices):
            parts[said.index] += said.parts
            tokens[said.index] += said.tokens
            if said.end is not None:
                asked.check(said.index)
                ends[said.index] = said.end
    choices = [
        {
            "index": index,
            "message": _message(parts[index], ends[index]),
            "logprobs": chat_logprobs(tokenizer, tokens[index]),
            "finish_reason": finish_of(ends[index], asked.voices[index]),
        }
        for index in range(count)
    ]
    used = usage(asked.prompt_tokens, sum(map(len, tokens)), ends.values())
    return {**head, "object": "chat.completion", "choices": choices, "usage": used}


async def _events(tokenizer: Tokenizer, asked: Asked, head: dict[str, Any], with_usage: bool) -> AsyncIterator[str]:
    head = {**head, "object": "chat.completion.chunk"}
    extra = {"usage": None} if with_usage else {}

    def chunk(index: int, delta: dict[str, Any], tokens: tuple[Token, ...] = (), finish: str | None = None) -> str:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": chat_logprobs(tokenizer, tokens),
            "finish_reason": finish,
        }
        return event({**head, "choices": [choice], **extra})

    for index in range(len(asked.voices)):
        yield chunk(index, {"role": "assistant", "content": ""})
    called, count, ends = [0] * len(asked.voices), 0, list[End]()
    async for said in saying(asked.answers, asked.voices):
        count += len(said.tokens)
        tokens = said.tokens
        for part in said.parts:
            if isinstance(part, str):
                delta: dict[str, Any] = {"content": part}
            else:
                called[said.index] += part.name is not None
                begun = {} if part.name is None else call_json(part.name)
                function = {**begun.get("function", {}), "arguments": part.arguments}
                delta = {"tool_calls": [{**begun, "index": called[said.index] - 1, "function": function}]}
            yield chunk(said.index, delta, tokens)
            tokens = ()
        if tokens and chat_logprobs(tokenizer, tokens) is not None:
            yield chunk(said.index, {}, tokens)
        if said.end is not None:
            asked.check(said.index)
            ends.append(said.end)
            yield chunk(said.index, _cited(said.end), (), finish_of(said.end, asked.voices[said.index]))
    if with_usage:
        yield event({**head, "choices": [], "usage": usage(asked.prompt_tokens, count, ends)})
    yield DONE


def _message(parts: list[Part], end: End) -> dict[str, Any]:
    calls = calls_json(parts)
    text = "".join(part for part in parts if isinstance(part, str))
    if not calls:
        return {"role": "assistant", "content": text, "refusal": None, **_cited(end)}
    return {"role": "assistant", "content": text.strip() or None, "refusal": None, "tool_calls": calls, **_cited(end)}


def _cited(end: End) -> dict[str, Any]:
    return {"citations": [citation_json(citation) for citation in end.citations]} if end.citations else {}


def citation_json(citation: Citation) -> dict[str, Any]:
    """Where an answer comes from; context: the id of the one that holds the source."""
    first, last = citation.lines
    return {
        "source": citation.source,
        "lines": [first, last],
        "weight": citation.weight,
        "context": citation.context.parent.name,
    }


def call_json(name: str) -> dict[str, Any]:
    """A tool call that begins, with a new id."""
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": {"name": name, "arguments": ""}}


def calls_json(parts: Iterable[Part]) -> list[dict[str, Any]]:
    """Tool calls whose parts these are; those without an end were none."""
    calls = list[dict[str, Any]]()
    call = call_json("")
    for part in parts:
        if isinstance(part, CallPart):
            call = call if part.name is None else call_json(part.name)
            call["function"]["arguments"] += part.arguments
            calls += [call] if part.ends else []
    return calls


def usage(prompt: int, generated: int, ends: Any) -> dict[str, Any]:
    """How many tokens a request took; cached_tokens: of its prompt, those that none of its choices computed."""
    cached = min((end.cached_tokens for end in ends), default=0)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": cached, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
    }
