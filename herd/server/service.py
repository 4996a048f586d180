"""The one thread that runs the model, and what the server asks of it.

An engine belongs to one thread. Requests come from asyncio and wait in turn by client; the thread takes them as there
are rows and memory for them, and steps each engine that has something to do: one for requests without a context, one
for each set of contexts.
"""

import asyncio
import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from herd.api import Context, Model
from herd.checkpoint.room import available_memory
from herd.context.cache import ContextCache
from herd.engine import Block, Engine, check_prompt
from herd.engine.prefixes import Names
from herd.errors import PromptError
from herd.model import Memory
from herd.model.cache import bytes_needed
from herd.server.asks import RETRY_S, Answers, Ask, Busy, TooLong, pass_on
from herd.server.fair import FairQueue
from herd.server.metrics import Metrics
from herd.server.running import Job, Running

if TYPE_CHECKING:
    from herd.server.replicas import Replicas

T = TypeVar("T")
_log = logging.getLogger("herd.server")
_Engine = tuple[tuple[Context, ...], int]  # what its requests see, and where they begin
_PLAIN: _Engine = ((), 0)
_STOPPING = "the server is being stopped; ask again when it is back"
BESIDE = 128  # tokens of prompts in a step, where several requests run
SHORT = 256  # tokens of a short request, prompt and answer
MOST_RETRY_S = 60  # that a refused client is told to wait
IDLE = 8  # engines of contexts that are kept with nothing to do


class Service:
    """Runs a model for many clients at a time. Each gets the tokens it would get alone."""

    def __init__(
        self,
        model: Model,
        *,
        rows: int = 32,
        memory: int | None = None,
        queue: int = 256,
        metrics: Metrics | None = None,
        spare: int | None = None,
        replicas: "Replicas | None" = None,
        elsewhere: "Service | None" = None,
    ) -> None:
        """At most `rows` answers at a time, with `memory` bytes of keys and values (None: half of what is free), and
        `queue` more that wait. spare: rows that only short requests get (None: a quarter).

        replicas: what runs requests in place of this process; rows and memory are those of each. elsewhere: the service
        that answers what needs nothing of this process; it is closed with this one.
        """
        each = available_memory() // 2 if memory is None else memory
        many = 1 if replicas is None else replicas.count
        self.model, self.rows, self.queue = model, rows * many, queue
        self.memory, self._most = each * many, each  # of all, and of one request
        self._spare = self.rows // 4 if spare is None else spare
        self.metrics = Metrics() if metrics is None else metrics
        self.replicas, self.elsewhere = replicas, elsewhere
        self._waiting: FairQueue[Job] = FairQueue(_size)
        plain = self._engine(None) if replicas is None else Running(model, replicas, self.metrics)
        self._engines: dict[_Engine, Running] = {_PLAIN: plain}
        self._prefixes = plain.engine.prefixes
        self._orders: list[Callable[[], None]] = []
        self._changed = threading.Condition()
        self._open, self._due = True, False
        if replicas is not None:
            replicas.tell = self._look
        self._reader = ThreadPoolExecutor(1, "reader", _stand_back)
        self._thread = threading.Thread(target=self._work, name="service", daemon=True)
        self._thread.start()

    async def submit(self, *asks: Ask) -> Answers:
        """Queue the asks of one request. PromptError for one that can never run, such as TooLong; Busy if too many
        wait."""
        assert asks, "a request asks for something"
        if self.elsewhere is not None and not any(ask.contexts or ask.here for ask in asks):
            return await self.elsewhere.submit(*asks)
        memories = [await asyncio.to_thread(self._memory, ask) if ask.contexts else None for ask in asks]
        for ask, memory in zip(asks, memories, strict=True):
            self._check(ask, 0 if memory is None else memory.start_position)
        names = [None if ask.contexts else await self._names(ask) for ask in asks]
        answers = Answers(len(asks), self._cancel)
        its = enumerate(zip(asks, memories, names, strict=True))
        jobs = [Job(ask, answers, index, memory, name) for index, (ask, memory, name) in its]
        with self._changed:
            if not self._open:
                raise Busy(_STOPPING, stopping=True)
            self._check_place(asks[0].client, len(asks))
            for job in jobs:
                self._waiting.push(job.ask.client, job)
            self._look()
        return answers

    def expect(self, client: str) -> None:
        """Busy if a request of a client would be refused now; so it costs next to nothing, where much is refused."""
        if self.elsewhere is None:
            with self._changed:
                self._check_place(client, 1)

    async def call(self, work: Callable[[], T]) -> T:
        """Run something on the model's thread, between two steps."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def settle(set: Callable[[], None]) -> None:
            loop.call_soon_threadsafe(lambda: None if done.cancelled() else set())

        def order() -> None:
            if done.cancelled():
                return
            try:
                settle(partial(done.set_result, work()))
            except Exception as error:
                settle(partial(done.set_exception, error))

        self._order(order)
        return await done

    def blocks(self, scope: str, names: Sequence[int]) -> list[Block]:
        """See `Prefixes.blocks`. For the model's thread (`call`)."""
        return self._prefixes.blocks(scope, names)

    def known(self, scope: str, names: Sequence[int]) -> int:
        """See `Prefixes.known`. For the model's thread (`call`)."""
        return self._prefixes.known(scope, names)

    def add(self, scope: str, names: Sequence[int], blocks: Sequence[Block]) -> None:
        """See `Prefixes.add`. For the model's thread (`call`)."""
        self._prefixes.add(scope, names, blocks, self.memory - self.memory_used + self._prefixes.nbytes)

    def names(self, ask: Ask) -> Names:
        """Of the tokens of its prompt."""
        return self.model.names(ask.ids, ask.images)

    async def read(self, work: Callable[[], T]) -> T:
        """Run what reads into a context beside the answers, one at a time; where experts are read from disk as they are
        wanted, it has the model to itself."""
        packed = self.model.transformer.packed
        if packed is not None and packed.source is not None:
            return await self.call(work)
        return await asyncio.get_running_loop().run_in_executor(self._reader, work)

    def close(self) -> None:
        """Stop the thread. What waits or runs ends with Busy."""
        if self.elsewhere is not None:
            self.elsewhere.close()
        with self._changed:
            self._open = False
            self._look()
        self._thread.join()
        self._reader.shutdown(cancel_futures=True)
        for order in self._orders:
            order()
        self._tell(Busy(_STOPPING, stopping=True))

    @property
    def open(self) -> bool:
        """Whether it takes requests."""
        return self._open and self._thread.is_alive() and (self.elsewhere is None or self.elsewhere.open)

    @property
    def waiting(self) -> int:
        """Answers that have not begun."""
        with self._changed:
            return len(self._waiting)

    @property
    def running(self) -> int:
        """Answers that are being given."""
        return sum(len(running.jobs) for running in tuple(self._engines.values()))

    @property
    def memory_used(self) -> int:
        """Bytes of keys and values that are set aside, besides those of contexts."""
        return sum(running.engine.memory_used for running in tuple(self._engines.values()))

    def _engine(self, memory: Memory | None) -> Running:
        model = self.model
        engine = Engine(model.transformer, cache=memory, rows=self.rows, beside=BESIDE, vision=model.vision)
        return Running(model, engine, self.metrics)

    def _memory(self, ask: Ask) -> ContextCache:
        first, *also = ask.contexts
        return first.memory(also, len(ask.ids) + ask.max_tokens)

    async def _names(self, ask: Ask) -> Names:
        return await asyncio.to_thread(self.names, ask) if ask.images else self.names(ask)

    def _check(self, ask: Ask, start: int) -> None:
        """PromptError if an ask can never run."""
        cfg = self.model.config
        check_prompt(cfg, ask.ids)
        asked, allowed = len(ask.ids) + ask.max_tokens, cfg.max_position_embeddings - start
        if ask.max_tokens < 1:
            raise PromptError(f"max_tokens is {ask.max_tokens}; an answer has at least one token")
        if asked > allowed:
            raise TooLong(
                f"This model's maximum context length is {allowed:,} tokens. However, you requested {asked:,} tokens "
                f"({len(ask.ids):,} in the messages, {ask.max_tokens:,} in the completion). "
                "Please reduce the length of the messages or completion."
            )
        needed = self._needed(asked)
        if needed > self._most:
            raise TooLong(
                f"{asked:,} tokens ({len(ask.ids):,} in the prompt, {ask.max_tokens:,} in the answer) need {needed:,} "
                f"bytes for keys and values; this server has {self._most:,}: shorten them, or give it more memory"
            )

    def _check_place(self, client: str, count: int) -> None:
        """Busy unless so many requests may wait: in the queue, or as the only one of a client while the queue is not
        twice full, so that a few cannot keep all others out."""
        waiting = len(self._waiting)
        alone = count == 1 and waiting < 2 * self.queue and not self._waiting.count(client)
        if waiting + count > self.queue and not alone:
            each_s = self.metrics.seconds_each()  # so long takes what waits, at the pace of late
            retry_s = RETRY_S if each_s is None else min(max(1, round(waiting * each_s)), MOST_RETRY_S)
            raise Busy(f"{waiting:,} requests wait, and {self.queue:,} may; ask again in {retry_s} s", retry_s=retry_s)

    def _cancel(self, answers: Answers) -> None:
        def order() -> None:
            with self._changed:
                for job in [job for job in self._waiting if job.answers is answers]:
                    self._waiting.remove(job)
            for running in self._engines.values():
                for job in [job for job in running.jobs.values() if job.answers is answers]:
                    running.cancel(job)

        self._order(order)

    def _order(self, order: Callable[[], None]) -> None:
        with self._changed:
            if self._open:
                self._orders.append(order)
                self._look()
                return
        order()  # by now, the thread does nothing

    def _look(self) -> None:
        """Have the thread look what there is to do."""
        with self._changed:
            self._due = True
            self._changed.notify()

    def _work(self) -> None:
        engines = self._engines
        try:
            while self._open:
                with self._changed:
                    self._changed.wait_for(lambda: self._due or not all(its.engine.idle for its in engines.values()))
                    orders, self._orders, self._due = self._orders, [], False
                for order in orders:
                    order()
                for running in engines.values():
                    others = self.memory_used - running.engine.memory_used
                    running.engine.allow(self.memory - others)
                    clients = running.step()
                    with self._changed:
                        for client in clients:
                            self._waiting.give(client, 1)
                self._admit()  # last, for what came to its end may have made room
        except BaseException as error:  # none is known; whoever waits is told rather than left waiting
            _log.critical("the model's thread ended", exc_info=error)
            with self._changed:
                self._open = False
            self._tell(error)

    def _tell(self, error: BaseException) -> None:
        """End everything with an error."""
        with self._changed:
            jobs = [*self._waiting, *(job for running in self._engines.values() for job in running.jobs.values())]
        pass_on([(job.answers, error) for job in jobs])

    def _admit(self) -> None:
        while self.running < self.rows and (job := self._take()) is not None:
            try:
                self._running(job).start(job)
            except Exception as error:
                pass_on([(job.answers, error)])

    def _take(self) -> Job | None:
        """The job that is next, if there is memory for it."""
        most = SHORT if self.rows - self.running <= self._spare else None
        with self._changed:  # or another one might be next in between
            job = self._waiting.first(most)
            if job is None:
                return None
            if job.names is not None:
                self._prefixes.find(job.ask.scope, job.names)  # so that others are given up first
            left = self.memory - self.memory_used - self._needed(_size(job))
            if not self._prefixes.shrink(left + self._prefixes.nbytes):
                return None
            self._waiting.pop(most)
            self._waiting.give(job.ask.client, len(job.ask.ids))
            return job

    def _needed(self, tokens: int) -> int:
        """Bytes of keys and values."""
        return bytes_needed(self.model.config, tokens, self.model.transformer.memory_dtype)

    def _running(self, job: Job) -> Running:
        """The engine of a job. Of engines of contexts with nothing to do, those that were used last are kept."""
        start = 0 if job.memory is None else job.memory.start_position
        key = (job.ask.contexts, start)
        self._engines[key] = running = self._engines.pop(key, None) or self._engine(job.memory)
        idle = [key for key, its in self._engines.items() if key[0] and not its.jobs and its is not running]
        for key in idle[: max(0, len(idle) - IDLE)]:
            del self._engines[key]
        return running


def _size(job: Job) -> int:
    return len(job.ask.ids) + job.ask.max_tokens


def _stand_back() -> None:
    """Let answers go first where they and this thread want the processor: it and what it starts get a tenth of it."""
    if sys.platform == "linux":  # where threads have priorities of their own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
