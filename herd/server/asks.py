"""What the service is asked for, and what it says."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from herd.api import Context
from herd.context.citations import Citation
from herd.engine import Finish, Guide, Sampler, Token
from herd.errors import HerdError, PromptError

RETRY_S = 5  # until it is worth to ask again, where nothing says when


class Busy(HerdError):
    """As many requests wait as may, or the server is stopping."""

    def __init__(self, message: str, *, stopping: bool = False, retry_s: int = RETRY_S) -> None:
        """retry_s: seconds until it is worth to ask again."""
        super().__init__(message)
        self.stopping, self.retry_s = stopping, retry_s


class TooLong(PromptError):
    """Prompt and answer need more positions than the model has, or more memory than the service."""


@dataclass(frozen=True, eq=False)
class Ask:
    """An answer that is wanted: token ids to go on from.

    guide, images: see `herd.engine.Request`. stopped: told each token, says whether the answer ends there, as at a stop
    string. contexts: what it sees besides its prompt, as they are now (`Contexts.now`). question: holds the answer to
    quotes of the contexts; it is then greedy, and guide, sampler and stopped are not used. client: clients take turns.
    scope: what was seen for one scope is never used for another one. here: what is seen of it is to be had from this
    process later, so no other one may answer. made: see `herd.engine.Request`.
    """

    ids: Sequence[int]
    max_tokens: int
    sampler: Sampler = field(default_factory=Sampler)
    guide: Guide | None = None
    images: Sequence[Tensor] = ()
    stopped: Callable[[Token], bool] | None = None
    contexts: tuple[Context, ...] = ()
    question: str | None = None
    client: str = ""
    scope: str = ""
    here: bool = False
    made: Sequence[int] = ()


@dataclass(frozen=True)
class End:
    """How an answer ended. cached_tokens: of the prompt that the model had seen before. missed_mass: see `Answer`."""

    finish: Finish
    cached_tokens: int = 0
    citations: tuple[Citation, ...] = ()
    missed_mass: float = 0.0


@dataclass(frozen=True)
class Told:
    """Ask `index` of a request goes on with these tokens, an end token included; end: how it ends with them."""

    index: int
    tokens: tuple[Token, ...]
    end: End | None = None


class Answers:
    """What is said to the asks of one request, as it comes.

    Use it with `async with`: what is left before all have ended is cancelled.
    """

    def __init__(self, count: int, cancel: Callable[["Answers"], None]) -> None:
        self.loop, self.queue = asyncio.get_running_loop(), asyncio.Queue[Told | BaseException]()
        self.cancel: Callable[[], None] = lambda: cancel(self)
        self._open = count

    async def __aenter__(self) -> "Answers":
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._open:
            self.cancel()

    async def __aiter__(self) -> AsyncIterator[Told]:
        while self._open:
            told = await self.queue.get()
            if isinstance(told, BaseException):
                raise told
            self._open -= told.end is not None
            yield told


News = tuple[Answers, Told | BaseException]


def pass_on(said: Sequence[News]) -> None:
    """Tell answers what is said to them; called by the service's thread. Each event loop is woken once: to be woken
    takes it longer than to pass on a token."""

    def put(its: Sequence[News]) -> None:
        for answers, told in its:
            answers.queue.put_nowait(told)

    for loop in dict.fromkeys(answers.loop for answers, _ in said):
        its = [one for one in said if one[0].loop is loop]
        try:
            loop.call_soon_threadsafe(put, its)
        except RuntimeError:  # it is closed, so nobody listens
            for answers, _ in its:
                answers.cancel()
