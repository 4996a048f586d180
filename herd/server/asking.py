"""What a request asks, as the service is asked for it: prompts, guides and limits."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from herd.api import Context
from herd.engine import Guide
from herd.prompt.ask import ask_prompt
from herd.prompt.tools import calls_of, tools_text, write
from herd.server import images
from herd.server.asks import Answers, Ask
from herd.server.errors import ApiError
from herd.server.say import Spec, Voice
from herd.server.schemas import ChatRequest, ImagePart, Message, NamedTool, Sampled, Tool
from herd.server.state import Client, Server
from herd.server.structured import Guided, call_schema

ANSWER, FROM_CONTEXT = 2048, 256  # tokens of an answer at most, unless asked for otherwise


@dataclass(frozen=True)
class Prompt:
    """What is gone on from. question: of an answer that is held to quotes."""

    ids: list[int]
    images: list[Tensor] = field(default_factory=list)
    contexts: tuple[Context, ...] = ()
    question: str | None = None


@dataclass(frozen=True)
class Plan:
    """All that a request wants of each of its choices."""

    request: Sampled
    prompts: list[Prompt]
    max_tokens: int | None
    spec: Spec
    logprobs: int | None = None
    schema: dict[str, Any] | bool | None = None


@dataclass(frozen=True)
class Asked:
    """A request on its way: its answers, their voices and guides."""

    answers: Answers
    voices: list[Voice]
    guides: list[Guided | None]
    prompt_tokens: int

    def check(self, index: int) -> None:
        """ApiError if the answer that ended could not keep to its schema."""
        guide = self.guides[index]
        if guide is not None and guide.failed is not None:
            raise ApiError(400, guide.failed, param="response_format", code="invalid_schema")


async def ask(server: Server, client: Client, plan: Plan) -> Asked:
    """Submit all choices of a request: `n` for each prompt, one after the other."""
    tokenizer, request = server.model.tokenizer, plan.request
    matcher = None
    if plan.schema is not None:
        matcher = await asyncio.to_thread(server.grammars.matcher, plan.schema)
    bias, n = _bias(request, len(tokenizer)), request.n or 1
    asks, guides = list[Ask](), list[Guided | None]()
    for prompt in plan.prompts:
        for choice in range(n):
            guided = None
            if bias or matcher is not None:
                guided = Guided(tokenizer.eos_ids, bias, matcher, plan.schema)
            guide: Guide | None = guided
            ask = Ask(
                prompt.ids,
                plan.max_tokens or _room(server, prompt),
                request.sampler(choice, 0.0 if prompt.contexts else 1.0, plan.logprobs),
                guide,
                prompt.images,
                Voice(tokenizer, plan.spec).stopped if plan.spec.stops or plan.spec.single else None,
                prompt.contexts,
                prompt.question,
                client.turn,
                client.scope,
            )
            asks.append(ask)
            guides.append(guided)
    answers = await server.service.submit(*asks)
    voices = [Voice(tokenizer, plan.spec) for _ in asks]
    return Asked(answers, voices, guides, sum(len(prompt.ids) for prompt in plan.prompts))


async def chat_plan(server: Server, body: ChatRequest) -> Plan:
    """What a chat asks for."""
    server.check_model(body.model)
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise ApiError(400, "max_tokens and max_completion_tokens differ; give one", param="max_tokens")
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    tools, must = _tools(body)
    schema = call_schema([(t.function.name, t.function.parameters) for t in must]) if must else _schema(body)
    contexts = await asyncio.to_thread(server.now, body.context)
    quoted = body.quote if body.quote is not None else _single(body.messages) and bool(contexts) and not tools
    if quoted:
        prompt = _question(server, body, contexts, schema)
    else:
        prompt = await asyncio.to_thread(_conversation, server, body.messages, tools, contexts)
    single = bool(must) or body.parallel_tool_calls is False
    spec = Spec(tuple(body.stops), frozenset(tool.function.name for tool in tools), single)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return Plan(body, [prompt], body.max_completion_tokens or body.max_tokens, spec, logprobs, schema)


def conversation_ids(server: Server, messages: Sequence[Message], tools: Sequence[Tool]) -> list[int]:
    """Token ids of a conversation, up to the opening of its answer.

    A chat template may say nothing of tools and calls; they are then told as Llama 4's format tells them.
    """
    tokenizer = server.model.tokenizer
    told = [_plain(message) for message in messages]
    defined = [tool.function.model_dump(exclude_none=True) for tool in tools]
    called = any(message.tool_calls for message in messages)
    if called and tokenizer.chat([_ASKS, _CALLS]) == tokenizer.chat([_ASKS, _QUIET]):
        told = [_written(message) for message in told]
    if not defined:
        return tokenizer.chat(told)
    ids = tokenizer.chat(told, tools=defined)
    if ids != tokenizer.chat(told):
        return ids
    text = tools_text(defined)
    if told and told[0]["role"] == "system" and isinstance(told[0]["content"], str):
        return tokenizer.chat([{**told[0], "content": f"{told[0]['content']}\n\n{text}"}, *told[1:]])
    return tokenizer.chat([{"role": "system", "content": text}, *told])


_ASKS: dict[str, Any] = {"role": "user", "content": "?"}
_QUIET: dict[str, Any] = {"role": "assistant", "content": ""}
_CALLS = {**_QUIET, "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}


def _written(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose calls are its text."""
    calls = message.pop("tool_calls", None)
    if not calls:
        return message
    text = "".join(write(calls_of({"tool_calls": calls})))
    return {**message, "content": f"{message['content']}\n{text}" if message["content"] else text}


def _plain(message: Message) -> dict[str, Any]:
    """A message as `Tokenizer.chat` takes it."""
    content: Any = message.content
    if isinstance(content, list):
        content = [{"type": "image"} if isinstance(p, ImagePart) else {"type": "text", "text": p.text} for p in content]
        if all(part["type"] == "text" for part in content):
            content = "".join(part["text"] for part in content)
    role = "system" if message.role == "developer" else message.role
    if message.tool_calls and role != "assistant":
        raise ApiError(400, f"a message of the role {role} has tool_calls", param="messages")
    if content is None and not message.tool_calls and role != "assistant":
        raise ApiError(400, f"a message of the role {role} has no content", param="messages")
    plain = {"role": role, "content": "" if content is None else content}
    calls = [call.model_dump(exclude_none=True) for call in message.tool_calls or []]
    return {**plain, "tool_calls": calls} if calls else plain


def _single(messages: Sequence[Message]) -> bool:
    return len(messages) == 1 and messages[0].role == "user"


def _conversation(
    server: Server, messages: Sequence[Message], tools: Sequence[Tool], contexts: tuple[Context, ...]
) -> Prompt:
    parts = [part for message in messages if isinstance(message.content, list) for part in message.content]
    urls = [part.image_url.url for part in parts if isinstance(part, ImagePart)]
    if len(urls) > images.MAX_IMAGES:
        raise ApiError(400, f"{len(urls):,} images are given; a request may have {images.MAX_IMAGES}", param="messages")
    if urls and contexts:
        raise ApiError(400, "contexts are asked without images; leave one of them out", param="context")
    files = [images.of_url(url) for url in urls]
    ids = conversation_ids(server, messages, tools)
    if not files:
        return Prompt(ids, contexts=contexts)
    with server.looking:
        seen, features = server.model.look(ids, files)
    return Prompt(seen, features)


def _question(server: Server, body: ChatRequest, contexts: tuple[Context, ...], schema: object) -> Prompt:
    """The prompt of a question that is answered by quotes. ApiError for whatever would not be heeded."""
    content = body.messages[-1].content
    if isinstance(content, list) and not any(isinstance(part, ImagePart) for part in content):
        content = "".join(part.text for part in content if not isinstance(part, ImagePart))
    if not contexts or not _single(body.messages) or not isinstance(content, str):
        raise ApiError(
            400,
            "quote needs a context, and one message of the user, which is the question; with quote false, the whole "
            "conversation is seen and answered in the model's own words",
            param="quote",
        )
    if not server.model.tokenizer.byte_level:
        raise ApiError(400, "quotes need a byte-level vocabulary, which this model has not", param="quote")
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
    given = [name for name in (*names, "logit_bias", "stop", "tools", "logprobs") if getattr(body, name)]
    given += ["n"] * ((body.n or 1) > 1) + ["response_format"] * (schema is not None)
    if given:
        raise ApiError(
            400,
            f"quotes are greedy, and {given[0]} has no place there; leave it out, or set quote to false",
            param=given[0],
        )
    return Prompt(ask_prompt(server.model.tokenizer, content), [], contexts, content)


def _tools(body: ChatRequest) -> tuple[list[Tool], list[Tool]]:
    """The tools that are told, and those of which one must be called."""
    tools, choice = body.tools or [], body.tool_choice
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise ApiError(400, "two tools have the same name", param="tools")
    if choice in (None, "auto"):
        return tools, []
    if choice == "none":
        return [], []
    wanted = choice.function.name if isinstance(choice, NamedTool) else None
    must = [tool for tool in tools if wanted in (None, tool.function.name)]
    if not must:
        raise ApiError(400, "tool_choice asks for a tool that is not among the tools", param="tool_choice")
    if body.response_format is not None and body.response_format.type != "text":
        raise ApiError(400, "a tool must be called and response_format is JSON; give one", param="tool_choice")
    return tools, must


def _schema(body: ChatRequest) -> dict[str, Any] | bool | None:
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return {"type": "object"}
    if wanted.json_schema is None or wanted.json_schema.schema_ is None:
        raise ApiError(400, "response_format needs json_schema with a schema", param="response_format")
    return wanted.json_schema.schema_


def _bias(request: Sampled, vocabulary: int) -> dict[int, float]:
    bias = {int(id): value for id, value in (request.logit_bias or {}).items() if id.isdecimal() and len(id) < 12}
    if len(bias) != len(request.logit_bias or {}) or not all(id < vocabulary for id in bias):
        raise ApiError(400, f"logit_bias names token ids, from 0 to {vocabulary - 1}", param="logit_bias")
    return bias


def _room(server: Server, prompt: Prompt) -> int:
    """Tokens of an answer for which nobody said how many it may have."""
    left = server.model.config.max_position_embeddings - len(prompt.ids)
    return FROM_CONTEXT if prompt.contexts else max(1, min(ANSWER, left))
