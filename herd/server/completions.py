"""`/v1/completions`."""

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from herd.engine import Token
from herd.prompt import Tokenizer
from herd.prompt.llama4 import BEGIN
from herd.server.asking import Asked, Plan, Prompt, ask
from herd.server.asks import End
from herd.server.chat import usage
from herd.server.errors import ApiError
from herd.server.say import Spec, completion_logprobs, saying
from herd.server.schemas import CompletionRequest
from herd.server.state import Server, client, server
from herd.server.streaming import DONE, EventStream, event, unless_gone

router = APIRouter()
ANSWER = 16  # tokens at most, unless asked for otherwise, as in OpenAI's API


@router.post("/v1/completions")
async def complete(body: CompletionRequest, request: Request) -> Response:
    """Go on from texts or token ids."""
    its = server(request)
    its.service.expect(client(request).turn)
    its.check_model(body.model)
    if body.echo and body.logprobs is not None:
        raise ApiError(400, "logprobs of prompts are not given; leave out echo or logprobs", param="echo")
    prompts = _prompts(its, body)
    spec = Spec(tuple(body.stops))
    plan = Plan(body, [Prompt(ids) for ids in prompts], body.max_tokens or ANSWER, spec, body.logprobs)
    asked = await unless_gone(request, ask(its, client(request), plan))
    tokenizer = its.model.tokenizer
    shown = [tokenizer.decode(ids) if body.echo else "" for ids in prompts for _ in range(body.n or 1)]
    head = {
        "id": f"cmpl-{secrets.token_hex(12)}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": its.settings.name,
        "system_fingerprint": f"fp_{its.model.fingerprint[:12]}",
    }
    if body.stream:
        with_usage = body.stream_options is not None and body.stream_options.include_usage is True
        return EventStream(asked.answers, _events(tokenizer, asked, head, shown, with_usage))
    return JSONResponse(await unless_gone(request, _whole(tokenizer, asked, head, shown)))


def text_ids(server: Server, text: str) -> list[int]:
    """Token ids of a text as a model knows the beginning of one: those of Llama 4 have a token for that."""
    tokenizer = server.model.tokenizer
    begin = tokenizer.special_tokens.get(BEGIN)
    return [*([] if begin is None else [begin]), *tokenizer.encode(text)]


def _prompts(server: Server, body: CompletionRequest) -> list[list[int]]:
    given: Any = body.prompt
    many = isinstance(given, list) and len(given) > 0 and not isinstance(given[0], int)
    return [text_ids(server, one) if isinstance(one, str) else one for one in (given if many else [given])]


async def _whole(tokenizer: Tokenizer, asked: Asked, head: dict[str, Any], shown: list[str]) -> dict[str, Any]:
    count = len(asked.voices)
    texts, ends = list(shown), dict[int, End]()
    tokens: list[list[Token]] = [[] for _ in range(count)]
    async with asked.answers:
        async for said in saying(asked.answers, asked.voices):
            texts[said.index] += "".join(str(part) for part in said.parts)
            tokens[said.index] += said.tokens
            if said.end is not None:
                ends[said.index] = said.end
    choices = [
        {
            "index": index,
            "text": texts[index],
            "logprobs": completion_logprobs(tokenizer, tokens[index], 0),
            "finish_reason": ends[index].finish,
        }
        for index in range(count)
    ]
    return {**head, "choices": choices, "usage": usage(asked.prompt_tokens, sum(map(len, tokens)), ends.values())}


async def _events(
    tokenizer: Tokenizer, asked: Asked, head: dict[str, Any], shown: list[str], with_usage: bool
) -> AsyncIterator[str]:
    extra = {"usage": None} if with_usage else {}

    def chunk(index: int, text: str, logprobs: dict[str, Any] | None = None, finish: str | None = None) -> str:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
        return event({**head, "choices": [choice], **extra})

    for index, text in enumerate(shown):
        if text:
            yield chunk(index, text)
    count, offsets, ends = 0, [0] * len(shown), list[End]()
    async for said in saying(asked.answers, asked.voices):
        count += len(said.tokens)
        text = "".join(str(part) for part in said.parts)
        logprobs = completion_logprobs(tokenizer, said.tokens, offsets[said.index])
        offsets[said.index] += sum(map(len, (logprobs or {}).get("tokens", ())))
        if said.end is not None:
            ends.append(said.end)
        if text or logprobs is not None or said.end is not None:
            yield chunk(said.index, text, logprobs, None if said.end is None else said.end.finish)
    if with_usage:
        yield event({**head, "choices": [], "usage": usage(asked.prompt_tokens, count, ends)})
    yield DONE
