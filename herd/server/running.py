"""Answers that one engine gives: of all requests without a context, or of those that see the same ones."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from herd.api import Model
from herd.context.cache import ContextCache, ContextRow
from herd.context.citations import Citation, cite
from herd.context.quoting import Quoting, Try
from herd.engine import Engine, Finish, Request, Token, try_again
from herd.model import KVRow, Memory
from herd.server.asks import Answers, Ask, End, News, Told, pass_on
from herd.server.metrics import Metrics

if TYPE_CHECKING:
    from herd.server.replicas import Replicas


@dataclass(eq=False)
class Job:
    """An ask on its way. ids: its prompt and, without the last one, the tokens that the model has seen of its answer.

    tries: at a question that is held to quotes, of which `told` tokens were told. memory: what it sees contexts with.
    names: of its prompt's tokens, None if it goes on from nothing that is kept.
    """

    ask: Ask
    answers: Answers
    index: int
    memory: Memory | None = None
    names: Sequence[int] | None = None
    came: float = field(default_factory=time.perf_counter)
    first: float | None = None
    ids: list[int] = field(default_factory=list)
    row: KVRow | None = None
    tries: list[Try] = field(default_factory=list)
    told: int = 0
    cached: int = 0


class Running:
    """An engine and its jobs. It belongs to one thread."""

    def __init__(self, model: Model, engine: "Engine | Replicas", metrics: Metrics) -> None:
        self.engine = engine
        self.jobs: dict[int, Job] = {}
        self._model, self._metrics = model, metrics
        self._said: list[News] = []  # in a step

    def start(self, job: Job) -> None:
        """Begin with a job, behind what the model has seen of its prompt before if that is kept."""
        ask, ends = job.ask, self._model.tokenizer.eos_ids
        job.ids = list(ask.ids)
        if ask.question is not None:
            self._try(job, Try(list(ask.ids), Quoting(ask.question, self._model.tokenizer)))
            return
        its = (job.names, ask.scope, ask.made)
        self._submit(job, Request(ask.ids, ask.max_tokens, ask.sampler, ends, ask.guide, ask.images, *its))

    def cancel(self, job: Job) -> None:
        """End a job and give its memory back."""
        for id in [id for id, its in self.jobs.items() if its is job]:
            del self.jobs[id]
            self.engine.cancel(id)

    def step(self) -> list[str]:
        """One step of the engine; what is said is told. The client of each token."""
        try:
            return self._step()
        finally:
            said, self._said = self._said, []
            pass_on(said)

    def _step(self) -> list[str]:
        try:
            tokens = self.engine.step()
        except Exception as error:
            running = set(self.engine.running)
            for id in [id for id in self.jobs if id not in running]:
                self._fail(self.jobs.pop(id), error)
            return []
        clients = [self.jobs[token.request].ask.client for token in tokens]
        self._metrics.said(len(tokens))
        for token in tokens:
            job = self.jobs[token.request]
            try:
                self._take(job, token)
            except Exception as error:  # such as a context that was cut under its reader, found when it is cited
                self.cancel(job)
                self._fail(job, error)
        return clients

    def _submit(self, job: Job, request: Request) -> None:
        id = self.engine.submit(request)
        self.jobs[id] = job
        job.row = self.engine.row(id)

    def _try(self, job: Job, one: Try) -> None:
        job.tries.append(one)
        left = job.ask.max_tokens - len(one.ids)
        ends = self._model.tokenizer.eos_ids
        self._submit(job, Request([*one.prompt, *one.ids], left, eos_ids=ends, guide=one.guided))
        one.row = job.row

    def _take(self, job: Job, token: Token) -> None:
        if job.first is None:
            job.first, job.cached = time.perf_counter(), token.cached
        if job.tries:
            self._take_try(job, token)
            return
        job.ids.append(token.id)
        finish = token.finish
        if finish is None and job.ask.stopped is not None and job.ask.stopped(token):
            finish = "stop"
        if finish is None:
            self._say(job, Told(job.index, (token,)))
            return
        del self.jobs[token.request]
        self.engine.cancel(token.request, keep=True)  # where a stop string ended it
        self._end(job, (token,), finish)

    def _take_try(self, job: Job, token: Token) -> None:
        """A token of a quote. What a later try may not begin with is not told; see `herd.api.Context`."""
        one = job.tries[-1]
        if token.id not in self._model.tokenizer.eos_ids:
            one.take(token.id)
        if token.finish is None:
            if len(job.tries) == 1:
                self._tell(job, one.ids[: one.kept])
            return
        del self.jobs[token.request]
        again = None
        if len(job.tries) == 1:
            assert isinstance(job.memory, ContextCache)
            (again,) = try_again(self._model.transformer, job.memory, [one], job.ask.max_tokens)
        if again is not None:
            self._try(job, again)
            return
        best = job.tries[0].or_sure(one)
        job.row, job.ids = best.row, [*best.prompt, *best.ids]
        rest = tuple(Token(0, id, None) for id in best.ids[job.told :])
        # The first try may have ended for want of tokens, and the second one have ended well.
        self._end(job, rest, "length" if len(best.ids) == job.ask.max_tokens else "stop")

    def _tell(self, job: Job, ids: list[int]) -> None:
        if len(ids) > job.told:
            self._say(job, Told(job.index, tuple(Token(0, id, None) for id in ids[job.told :])))
            job.told = len(ids)

    def _end(self, job: Job, tokens: tuple[Token, ...], finish: Finish) -> None:
        citations: tuple[Citation, ...] = ()
        missed = 0.0
        if isinstance(job.row, ContextRow):
            citations = tuple(cite(job.row, self._model.tokenizer))
            missed = max([job.row.missed, *(one.missed for one in job.tries if one.row is job.row)])
        job.row = None
        self._count(job, finish)
        self._say(job, Told(job.index, tokens, End(finish, job.cached, citations, missed)))

    def _fail(self, job: Job, error: Exception) -> None:
        self._count(job, None)
        self._say(job, error)

    def _say(self, job: Job, told: Told | BaseException) -> None:
        self._said.append((job.answers, told))

    def _count(self, job: Job, finish: Finish | None) -> None:
        """finish None: it ended by an error."""
        now = time.perf_counter()
        self._metrics.ended(len(job.ask.ids), job.cached, finish)
        self._metrics.took(None if job.first is None else job.first - job.came, now - job.came)
