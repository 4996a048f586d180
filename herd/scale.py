"""Work on the machines of a Ray cluster: being part of it, the same model everywhere, and reading (serving is in
herd/server/replicas.py). Where contexts are read, workers turn chunks into K/V, and this process does all else.

Chunks that are read on their own depend on nothing but the model, so it does not matter who reads them, or when.
Sources are found, cut and committed here, in their order; a worker that dies costs a batch, which Ray gives to another.
"""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # which Ray looks at when it is imported

import ray
from ray.exceptions import RayError, RayTaskError

from herd import __version__
from herd.api import Model, load
from herd.checkpoint.cria import cria_path
from herd.context.forward import read_alone
from herd.context.read import Reader
from herd.context.segment import KV, Spec
from herd.errors import ConfigError, ContextError, HerdError

RETRIES = 3  # of work whose worker died; work that kills all that do it must not go round for ever


@contextmanager
def spread(model: Model, address: str = "auto") -> Iterator[Reader]:
    """What reads for `Context.read` on all workers of a Ray cluster: a batch of chunks at a time for each CPU of it.

    address: see `connected`. Workers load the model by its name, or path, once each. ConfigError if there is no such
    cluster, or a worker has another Herd or other weights; ContextError if workers die again and again.
    """
    with connected(address):
        if ray.cluster_resources().get("CPU", 0) < 1:
            raise ConfigError(f"the Ray cluster at {address} has no CPU; start its nodes with --num-cpus 1 or more")
        task, its = ray.remote(num_cpus=1, max_retries=RETRIES)(_read), wanted(model)

        def reader(batches: list[list[list[int]]], spec: Spec) -> Iterator[list[KV]]:
            # Few, as a segment is committed before the next; none is cancelled, which can make Ray end this process.
            yield from map(_result, [task.remote(its, batch, spec) for batch in batches])

        yield reader


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Be part of a Ray cluster: "auto" (that this machine is in), HOST:PORT, or "local" (a new one, of this machine's
    cores). If this process is part of one already, that is taken. ConfigError if there is no such cluster."""
    mine = not ray.is_initialized()
    if mine:
        _connect(address)
    try:
        yield
    finally:
        if mine:
            ray.shutdown()


def _connect(address: str) -> None:
    dashboard = False if address == "local" else None  # a cluster that runs has one or not
    host, _, port = address.rpartition(":")
    try:
        if host and port.isdecimal():
            # Ray itself tries for long, and ends the process.
            socket.create_connection((host, int(port)), timeout=5).close()
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=dashboard)
    except (OSError, OverflowError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ConfigError(
            f"there is no Ray cluster to be used at {address}: {reason}. Use local, or start one: `ray start --head`"
        ) from error


def _result(ref: "ray.ObjectRef[list[KV]]") -> list[KV]:
    try:
        return ray.get(ref)
    except RayTaskError as error:
        if isinstance(error.cause, HerdError):
            raise error.cause from None
        raise
    except RayError as error:
        raise ContextError(
            f"a worker died or was lost {RETRIES + 1} times with the same chunks: {str(error).partition(chr(10))[0]} "
            "What was read so far is kept; the same command goes on from there"
        ) from error


def _read(its: "Wanted", chunks: list[list[int]], spec: Spec) -> list[KV]:
    """On a worker: K/V of chunks."""
    return read_alone(loaded(its).transformer, chunks, spec)


@dataclass(frozen=True)
class Wanted:
    """A model as workers must have it: its name, the version of Herd, and what it computes with."""

    name: str
    version: str
    identity: str


def wanted(model: Model) -> Wanted:
    """This model on other machines."""
    return Wanted(_everywhere(model), __version__, _identity(model))


@lru_cache(1)
def loaded(its: Wanted) -> Model:
    """On a worker: the model, loaded once. ConfigError, which names the machine, if it has another one."""
    where = f"the worker on {ray.util.get_node_ip_address()}"
    if its.version != __version__:
        raise ConfigError(f"{where} has Herd {__version__}, not {its.version}; install {its.version} on all machines")
    try:
        model = load(its.name)
    except HerdError as error:
        raise ConfigError(f"{where} cannot load {its.name}: {error}") from None
    if _identity(model) != its.identity:
        raise ConfigError(
            f"{where} has other weights under {its.name} ({_identity(model)}, not {its.identity}); copy them"
        )
    return model


def _identity(model: Model) -> str:
    """What K/V depend on: weights and how they are computed with, which a fingerprint does not tell."""
    return f"{model.fingerprint[:16]} in {str(model.transformer.memory_dtype).removeprefix('torch.')}"


def _everywhere(model: Model) -> str:
    """What a model is called in any folder."""
    built = model.path == cria_path() and model.name.partition("@")[0] == "cria"
    return model.name if built else str(Path(model.name).absolute())
