"""Engines of many machines as one: replicas that Ray Serve keeps running, each with the model, answer requests.

For `herd.server.running` all of them together are an engine, of which each step brings the tokens that came since the
last one. Where a replica dies, what it was asked for goes on at another one, behind the tokens that came, as it would
have gone on: nothing is said twice and nothing is lost. What a replica has seen it keeps for itself.
"""

import asyncio
import hashlib
import itertools
import logging
import os
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import cast

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # which Ray looks at when it is imported

import ray
import torch
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from herd import scale
from herd.api import Model
from herd.checkpoint.room import available_memory
from herd.engine import Prefixes, Request, Token
from herd.errors import ConfigError, HerdError
from herd.model.cache import bytes_needed
from herd.server.asks import Ask
from herd.server.service import Service
from herd.server.structured import Grammars, Guided, Schema

Guide = tuple[Mapping[int, float], Schema | None]  # biases, and what an answer keeps to
Said = tuple[tuple[Token, ...], str | None]  # tokens as they come, and `Guided.failed`
_NAME = "replica"
_STOP_S = 1.0  # for a replica to end, which has nothing to finish by then
_LOOK_S = 1.0  # between two looks of Ray Serve whether a replica lives
_FREE_S = 10.0  # until processors of what has ended count as free
_DIED = f"{scale.RETRIES + 1} replicas in a row died of a request"
_log = logging.getLogger("herd.server")


class Replica:
    """A model in a process of its own, which answers requests for others."""

    def __init__(self, its: scale.Wanted, rows: int, memory: int) -> None:
        """At most `rows` answers at a time, with `memory` bytes of keys and values. ConfigError if this machine has
        another model, or another version."""
        torch.set_num_threads(int(ray.get_runtime_context().get_assigned_resources()["CPU"]))
        model = scale.loaded(its)
        # Who asks bounds what waits, and has a place for short requests.
        self._service = Service(model, rows=rows, memory=memory, queue=1 << 20, spare=0)
        self._grammars = Grammars(model.tokenizer)

    async def answer(self, ask: Ask, guide: Guide | None) -> AsyncIterator[Said]:
        """What is said to an ask, whose guide comes apart from it."""
        guided = None if guide is None else await asyncio.to_thread(self._guided, *guide)
        async with await self._service.submit(replace(ask, guide=guided)) as answers:
            async for told in answers:
                yield told.tokens, None if guided is None else guided.failed

    def check_health(self) -> None:
        """An error has Ray Serve begin another one in place of this."""
        if not self._service.open:
            raise RuntimeError("the model's thread ended")

    def _guided(self, bias: Mapping[int, float], schema: Schema | None) -> Guided:
        matcher = None if schema is None else self._grammars.matcher(schema)
        return Guided(self._service.model.tokenizer.eos_ids, bias, matcher)


class Replicas:
    """What `Running` uses of an engine. `tell` is called when there is something for the next step."""

    def __init__(self, model: Model, handle: DeploymentHandle, app: str, count: int) -> None:
        cfg, dtype = model.config, model.transformer.memory_dtype
        self.count = count
        self.prefixes = Prefixes(cfg, dtype, packed=False)  # of which there are none here
        self.tell: Callable[[], None] = lambda: None
        self._cfg, self._dtype, self._app = cfg, dtype, app
        self._answer = handle.options(method_name="answer", stream=True)
        self._ids = itertools.count()
        self._followed: dict[int, Future[None]] = {}
        self._bytes: dict[int, int] = {}
        self._came: deque[tuple[int, Token | Exception]] = deque()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="replicas", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> int:
        """See `Engine.submit`."""
        id = next(self._ids)
        self._bytes[id] = bytes_needed(self._cfg, len(request.prompt) + request.max_tokens, self._dtype)
        self._followed[id] = asyncio.run_coroutine_threadsafe(self._follow(id, request), self._loop)
        return id

    def cancel(self, id: int, *, keep: bool = False) -> bool:
        """See `Engine.cancel`; keep is the replica's to say."""
        followed = self._followed.get(id)
        if followed is None:
            return False
        self._forget(id)
        followed.cancel()
        return True

    def step(self) -> list[Token]:
        """What came since the last step, a token of each request at most. An error ends the request that is no longer
        among those that run."""
        tokens = dict[int, Token]()
        while self._came:
            id, came = self._came[0]
            if id in tokens or (tokens and isinstance(came, Exception)):
                break  # that is the next step's
            self._came.popleft()
            if id not in self._followed:  # it was cancelled
                continue
            if isinstance(came, Exception):
                self._forget(id)
                raise came
            if came.finish:
                self._forget(id)
            tokens[id] = came
        return list(tokens.values())

    def row(self, id: int) -> None:
        """Its memory is elsewhere."""

    def allow(self, memory: int) -> None:
        """Each replica has its own."""

    @property
    def idle(self) -> bool:
        """Whether nothing came."""
        return not self._came

    @property
    def running(self) -> list[int]:
        """The requests that have not ended, the oldest first."""
        return list(self._followed)

    @property
    def memory_used(self) -> int:
        """Bytes that the requests can ever need, of all replicas."""
        return sum(tuple(self._bytes.values()))  # asked by other threads, too

    @property
    def alive(self) -> int:
        """Replicas that answer."""
        app = serve.status().applications.get(self._app)
        states = {} if app is None else app.deployments[_NAME].replica_states
        return sum(count for state, count in states.items() if state == "RUNNING")

    def close(self) -> None:
        """End all requests."""
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        tasks = asyncio.all_tasks(self._loop) - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _forget(self, id: int) -> None:
        del self._followed[id], self._bytes[id]

    def _put(self, id: int, came: Token | Exception) -> None:
        self._came.append((id, came))
        self.tell()

    async def _follow(self, id: int, request: Request) -> None:
        """Pass on what is said to a request, whatever becomes of the replicas that say it."""
        sampler, guide = request.sampler, request.guide
        if sampler.seed is None:
            sampler = replace(sampler, seed=secrets.randbits(63))  # the same one at all of them
        assert guide is None or isinstance(guide, Guided), "guides of questions see the contexts of this process"
        ask = Ask(request.prompt, request.max_tokens, sampler, images=request.images, scope=request.scope)
        made, deaths = list[int](), 0
        try:
            while deaths <= scale.RETRIES:
                before = len(made)
                if await self._once(id, replace(ask, made=tuple(made)), guide, made):
                    return
                deaths = deaths + 1 if len(made) == before else 1
            raise RuntimeError(_DIED)
        except Exception as error:
            self._put(id, error)

    async def _once(self, id: int, ask: Ask, guide: Guided | None, made: list[int]) -> bool:
        """Pass on what one replica says, and note it as made; False if the replica is lost before the answer's end."""
        its = self._answer.remote(ask, None if guide is None else (guide.bias, guide.schema))
        response = cast("DeploymentResponseGenerator[Said]", its)
        ended = False
        try:
            async for tokens, failed in response:
                if guide is not None:
                    guide.failed = failed
                for token in tokens:
                    made.append(token.id)
                    ended = token.finish is not None
                    self._put(id, replace(token, request=id))
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, HerdError) else error from None
        except RayError as error:
            _log.warning("a replica is lost; its answers go on at others (%s)", str(error).partition("\n")[0])
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                response.cancel()
                raise
            _log.warning("a replica was stopped; its answers go on at others")
        return ended


@contextmanager
def spread(
    model: Model, count: int, address: str, data: Path, *, rows: int = 32, memory: int | None = None, queue: int = 256
) -> Iterator[Service]:
    """A service that has so many replicas on a Ray cluster (see `herd.scale.connected`), which end with the block. They
    answer what needs nothing of this process: no context, and no chat that is kept.

    data: the server's folder, which tells its replicas from those of others; what a server with it that was killed
    left behind is ended. rows, memory (None: a part of half of what is free here): of each, and of this process. queue:
    of what waits for replicas, and of what waits for this process. ConfigError if there is no such cluster or it is too
    small, or a machine has another Herd or other weights.
    """
    each = available_memory() // 2 // (count + 1) if memory is None else memory  # all may be on one machine
    with scale.connected(address), _replicas(model, count, address, _app(data), rows, each) as replicas:
        away = Service(model, rows=rows, memory=each, queue=queue, replicas=replicas)
        here = Service(model, rows=rows, memory=each, queue=queue, metrics=away.metrics, elsewhere=away)
        with closing(here):
            yield here


@contextmanager
def _replicas(model: Model, count: int, address: str, app: str, rows: int, memory: int) -> Iterator[Replicas]:
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(proxy_location="Disabled")  # nothing but this process is to reach them
    try:
        _delete(app)
        deployment = serve.deployment(
            name=_NAME,
            num_replicas=count,
            ray_actor_options={"num_cpus": _share(count, address)},
            max_ongoing_requests=rows,
            max_constructor_retry_count=1,
            health_check_period_s=_LOOK_S,
            graceful_shutdown_wait_loop_s=_STOP_S,
            graceful_shutdown_timeout_s=_STOP_S,
        )(Replica)
        handle = _run(deployment.bind(scale.wanted(model), rows, memory), app)
        with closing(Replicas(model, handle, app, count)) as replicas:
            yield replicas
    finally:
        with suppress(RayError, RuntimeError, TimeoutError):  # such as of a cluster that is gone
            _delete(app)


def _delete(app: str) -> None:
    if app in serve.status().applications:
        serve.delete(app)


def _app(data: Path) -> str:
    """What the replicas of a server with this data folder are called in a cluster."""
    return f"herd-{hashlib.sha256(f'{socket.gethostname()} {data.resolve()}'.encode()).hexdigest()[:12]}"


def _share(count: int, address: str) -> int:
    """Processors of each replica: as many as leave a place for all."""
    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    fits = [each for each in range(1, max(nodes, default=0) + 1) if sum(cpus // each for cpus in nodes) >= count]
    if not fits:
        raise ConfigError(
            f"{count:,} replicas need a CPU each, and the Ray cluster at {address} has {sum(nodes):,}: "
            "start fewer, or more nodes (`ray start --num-cpus`)"
        )
    needed, until = count * fits[-1], time.monotonic() + _FREE_S
    while (free := int(ray.available_resources().get("CPU", 0))) < needed:
        if time.monotonic() > until:
            raise ConfigError(
                f"{count:,} replicas of {fits[-1]:,} CPUs need {needed:,}, and of the Ray cluster at {address} "
                f"{free:,} of {sum(nodes):,} are free: end what else runs there, or start more nodes"
            )
        time.sleep(0.1)
    return fits[-1]


def _run(what: serve.Application, app: str) -> DeploymentHandle:
    """Start replicas, and wait until all answer."""
    try:
        return serve.run(what, name=app, route_prefix=None)
    except RuntimeError as error:
        its = serve.status().applications.get(app)
        said = str(error) if its is None else its.deployments[_NAME].message
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    # The last line of a traceback, as Ray Serve passes it on.
    ours = [line.partition(": ")[2] for line in lines if line.startswith(f"{ConfigError.__module__}.")]
    raise ConfigError(ours[-1] if ours else f"replicas cannot be started: {lines[-1]}") from None
