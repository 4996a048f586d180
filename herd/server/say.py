"""From the tokens of an answer to what a client is told: text, tool calls, logprobs."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from herd.engine import Token
from herd.prompt import CallParser, CallPart, StopText, Tokenizer
from herd.prompt.calls import Event
from herd.prompt.llama4 import PYTHON_START
from herd.server.asks import Answers, End

Part = str | CallPart  # of an answer: text, or what a call goes on with


@dataclass(frozen=True)
class Spec:
    """How answers are to be understood. tools: names that may be called; single: only one call is wanted."""

    stops: tuple[str, ...] = ()
    tools: frozenset[str] = frozenset()
    single: bool = False


class Voice:
    """Turns the tokens of one answer into text, up to a stop string, and parts of calls. Nothing that was said is taken
    back: of what turns out to be no call, and becomes text, some parts may have been told, but no end."""

    def __init__(self, tokenizer: Tokenizer, spec: Spec) -> None:
        # Code is called between special tokens, which are then part of the text until it was looked through.
        marks = bool(spec.tools) and PYTHON_START in tokenizer.special_tokens
        self._ends, self._spec = frozenset(tokenizer.eos_ids), spec
        self._text, self._stops = tokenizer.stream(keep_special=marks), StopText(spec.stops)
        self._parser = CallParser(spec.tools) if spec.tools else None
        self.calls = 0

    @property
    def done(self) -> bool:
        """Whether what comes now does not matter."""
        return self._stops.found is not None or (self._spec.single and self.calls > 0)

    def push(self, token: Token) -> list[Part]:
        """What is certain with this token."""
        if token.id in self._ends or self.done:
            return []
        return self._say(self._stops.push(self._text.push(token.id)))

    def finish(self) -> list[Part]:
        """What was held back."""
        if self.done:
            return []
        said = self._say(self._stops.push(self._text.finish()) + self._stops.finish())
        return said if self._parser is None else [*said, *self._events(self._parser.finish())]

    def _say(self, text: str) -> list[Part]:
        if self._parser is None or not text:
            return [text] if text else []
        said = self._events(self._parser.push(text))
        if self._stops.found is not None:
            said += self._events(self._parser.finish())
        return said

    def _events(self, events: Sequence[Event]) -> list[Part]:
        said = list[Part]()
        for event in events:
            if isinstance(event, str):
                said.append(event)
            elif isinstance(event, CallPart) and not (self._spec.single and self.calls):
                self.calls += event.ends
                said.append(event)
        return said

    def stopped(self, token: Token) -> bool:
        """For the service's thread, which has a voice of its own: whether the answer ends with this token."""
        self.push(token)
        return self.done


@dataclass(frozen=True)
class Said:
    """What answer `index` goes on with; end: how it ends with that."""

    index: int
    parts: list[Part]
    tokens: tuple[Token, ...]
    end: End | None = None


async def saying(answers: Answers, voices: Sequence[Voice]) -> AsyncIterator[Said]:
    """What is said to the asks of a request, as it comes."""
    async for told in answers:
        voice = voices[told.index]
        parts = [part for token in told.tokens for part in voice.push(token)]
        if told.end is not None:
            parts += voice.finish()
        yield Said(told.index, parts, told.tokens, told.end)


def finish_of(end: End, voice: Voice) -> str:
    """OpenAI's name for how an answer ended."""
    return "tool_calls" if voice.calls and end.finish == "stop" else end.finish


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[Token]) -> dict[str, Any] | None:
    """Logprobs as chats have them; None if none were asked for."""
    if all(token.logprob is None for token in tokens):
        return None
    return {
        "content": [
            {**_entry(tokenizer, t.id, t.logprob), "top_logprobs": [_entry(tokenizer, *top) for top in t.top]}
            for t in tokens
            if t.id not in tokenizer.eos_ids
        ],
        "refusal": None,
    }


def completion_logprobs(tokenizer: Tokenizer, tokens: Sequence[Token], begun: int) -> dict[str, Any] | None:
    """Logprobs as completions have them; None if none were asked for. begun: characters before them."""
    if all(token.logprob is None for token in tokens):
        return None
    said = [tokenizer.decode([token.id], keep_special=True) for token in tokens]
    return {
        "tokens": said,
        "token_logprobs": [_finite(token.logprob) for token in tokens],
        "top_logprobs": [
            {tokenizer.decode([id], keep_special=True): _finite(value) for id, value in token.top} for token in tokens
        ],
        "text_offset": [begun + sum(map(len, said[:at])) for at in range(len(said))],
    }


def _entry(tokenizer: Tokenizer, id: int, logprob: float | None) -> dict[str, Any]:
    text = tokenizer.decode([id], keep_special=True)
    data = tokenizer.raw([id]) if tokenizer.byte_level and "�" in text else text.encode()
    return {"token": text, "logprob": _finite(logprob), "bytes": list(data)}


def _finite(logprob: float | None) -> float:
    """JSON has no infinity; OpenAI says -9999 of what cannot be."""
    return max(-9999.0, logprob or 0.0)
