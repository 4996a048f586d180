"""Answers that one engine gives: of all requests without a context, or of those that see the same ones."""

import time
from collections import OrderedDict
from dataclasses import dataclass, field

from herd.api import Model
from herd.context.cache import ContextRow
from herd.context.citations import Citation, cite
from herd.context.quoting import Quoting, Try
from herd.engine import Engine, Finish, Request, Token
from herd.model import KVRow, Memory
from herd.model.cache import bytes_needed
from herd.server.asks import Answers, Ask, End, Told
from herd.server.metrics import Metrics

ROOM = 2048  # tokens that the next turns of a conversation may take behind the first
BESIDE = 192  # tokens of prompts in a step, where several requests run
KEPT = 16  # conversations of an engine that may be gone on from


@dataclass(eq=False)
class Job:
    """An ask on its way. ids: its prompt and, without the last one, the tokens that the model has seen of its answer.

    tries: at a question that is held to quotes, of which `told` tokens were told. memory: what it sees contexts with.
    more: tokens that jobs may need that go on from it; room: all that its memory has room for, 0 if none may go on.
    """

    ask: Ask
    answers: Answers
    index: int
    memory: Memory | None = None
    more: int = 0
    came: float = field(default_factory=time.perf_counter)
    first: float | None = None
    ids: list[int] = field(default_factory=list)
    row: KVRow | None = None
    tries: list[Try] = field(default_factory=list)
    told: int = 0
    room: int = 0
    cached: int = 0


class Running:
    """An engine and its jobs. It belongs to one thread."""

    def __init__(self, model: Model, memory: Memory | None, rows: int, metrics: Metrics) -> None:
        """memory: what its requests see contexts with."""
        self.engine = Engine(model.transformer, cache=memory, rows=rows, beside=BESIDE, vision=model.vision)
        self.jobs: dict[int, Job] = {}
        self._model, self._metrics = model, metrics
        self._kept: OrderedDict[int, tuple[str, list[int], int]] = OrderedDict()  # scope, tokens, room for

    def bytes_needed(self, job: Job) -> int:
        """Of memory that is not set aside yet."""
        if self._find(job) is not None:
            return 0
        tokens = len(job.ask.ids) + job.ask.max_tokens + job.more
        return bytes_needed(self._model.config, tokens, self._model.transformer.memory_dtype)

    def start(self, job: Job) -> None:
        """Begin with a job, behind what the model has seen of its prompt before if that is kept."""
        ask, ends = job.ask, self._model.tokenizer.eos_ids
        job.ids = list(ask.ids)
        if ask.question is not None:
            self._try(job, Try(list(ask.ids), Quoting(ask.question, self._model.tokenizer)))
            return
        before, ids, more = self._find(job), job.ids, job.more
        job.room = len(ids) + ask.max_tokens + more if more else 0
        if before is not None:
            _, seen, job.room = self._kept.pop(before)
            job.cached, ids, more = len(seen) - 1, ids[len(seen) :], 0
        self._submit(job, Request(ids, ask.max_tokens, ask.sampler, ends, ask.guide, ask.images, more, before))

    def cancel(self, job: Job) -> None:
        """End a job and give its memory back."""
        for id in [id for id, its in self.jobs.items() if its is job]:
            del self.jobs[id]
            self.engine.cancel(id)
            self.engine.forget(id)

    def step(self) -> list[str]:
        """One step of the engine; what is said is told. The client of each token."""
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

    def forget(self) -> bool:
        """Give up the conversation that was kept longest; False if there is none."""
        if not self._kept:
            return False
        id, _ = self._kept.popitem(last=False)
        self.engine.forget(id)
        return True

    def release(self, scope: str) -> tuple[list[int], KVRow] | None:
        """Hand over the newest conversation of a scope: its tokens, and memory of all but the last."""
        for id in reversed([id for id, (its, _, _) in self._kept.items() if its == scope]):
            _, ids, _ = self._kept.pop(id)
            if (row := self.engine.release(id)) is not None:
                return ids, row
        return None

    def keep(self, scope: str, ids: list[int], row: KVRow) -> None:
        """Let a conversation of a scope be gone on from, as `release` gives it."""
        self._kept[self.engine.keep(ids, row)] = (scope, ids, row.tokens)

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
            job.first = time.perf_counter()
        if job.tries:
            self._take_try(job, token)
            return
        job.ids.append(token.id)
        finish = token.finish
        if finish is None and job.ask.stopped is not None and job.ask.stopped(token):
            finish = "stop"
        if finish is None:
            job.answers.tell(Told(job.index, (token,)))
            return
        self._keep(token.request, job)
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
        again = one.again() if len(job.tries) == 1 else None
        if again is not None:
            self._try(job, again)
            return
        best = one if len(job.tries) == 1 or one.sure else job.tries[0]
        job.row, job.ids = best.row, [*best.prompt, *best.ids]
        rest = tuple(Token(0, id, None) for id in best.ids[job.told :])
        # The first try may have ended for want of tokens, and the second one have ended well.
        self._end(job, rest, "length" if len(best.ids) == job.ask.max_tokens else "stop")

    def _tell(self, job: Job, ids: list[int]) -> None:
        if len(ids) > job.told:
            job.answers.tell(Told(job.index, tuple(Token(0, id, None) for id in ids[job.told :])))
            job.told = len(ids)

    def _end(self, job: Job, tokens: tuple[Token, ...], finish: Finish) -> None:
        citations: tuple[Citation, ...] = ()
        missed = 0.0
        if isinstance(job.row, ContextRow):
            citations = tuple(cite(job.row, self._model.tokenizer))
            missed = max([job.row.missed, *(one.missed for one in job.tries if one.row is job.row)])
        job.row = None
        self._count(job, finish)
        job.answers.tell(Told(job.index, tokens, End(finish, job.cached, citations, missed)))

    def _fail(self, job: Job, error: Exception) -> None:
        self._count(job, None)
        job.answers.tell(error)

    def _count(self, job: Job, finish: Finish | None) -> None:
        """finish None: it ended by an error."""
        now = time.perf_counter()
        self._metrics.ended(len(job.ask.ids), job.cached, finish)
        self._metrics.took(None if job.first is None else job.first - job.came, now - job.came)

    def _keep(self, id: int, job: Job) -> None:
        """Let a conversation be gone on from."""
        del self.jobs[id]
        self.engine.cancel(id)  # where a stop string ended it
        if job.room:
            self._kept[id] = (job.ask.scope, job.ids, job.room)
        if len(self._kept) > KEPT:
            self.forget()

    def _find(self, job: Job) -> int | None:
        """What a job can go on from: the longest conversation of its scope that its prompt begins with."""
        ask = job.ask
        if ask.images or ask.question is not None:
            return None
        ids, needed = list(ask.ids), len(ask.ids) + ask.max_tokens
        fits = [
            (len(seen), id)
            for id, (scope, seen, room) in self._kept.items()
            if scope == ask.scope and needed <= room and len(seen) < len(ids) and ids[: len(seen)] == seen
        ]
        return max(fits)[1] if fits else None
