"""Exact attention of many queries over all of a context: one pass, part by part, softmax in float32.

Every query sees every live token: context chunks come before the question, and global layers have no positions.

Shape suffixes: G key/value heads of a layer, R query rows of one key/value head, d head_dim, K parts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from herd.context.segment import KV
from herd.context.store import Store
from herd.kernels import Attention, Parts, attend_parts

PART_TOKENS = 8192  # what a thread takes at a time, and the step in which attention is counted for citations
MISSED = 1e-3  # most of a query's attention whose values may be left out; what was is counted


@dataclass(frozen=True)
class Run:
    """Neighbouring live chunks of one segment, as indices into the store's chunks, and their K/V as they are kept, for
    each global layer."""

    store: Store
    layers: tuple[KV, ...]
    chunks: list[int]


def runs(store: Store) -> list[Run]:
    """All live chunks of a context, in runs of neighbours of at most PART_TOKENS (one chunk at least)."""
    found = []
    for mapped in store.segments:
        run: list[int] = []
        for index in mapped.live:
            chunk = store.chunks[index]
            if run:
                first, last = store.chunks[run[0]], store.chunks[run[-1]]
                adjacent = chunk.start == last.start + last.tokens
                if not adjacent or chunk.start + chunk.tokens - first.start > PART_TOKENS:
                    found.append(_run(store, mapped.kv, run))
                    run = []
            run.append(index)
        found.append(_run(store, mapped.kv, run))
    return found


def _run(store: Store, kv: KV, run: list[int]) -> Run:
    first, last = store.chunks[run[0]], store.chunks[run[-1]]
    part, layers = kv.part(first.start, last.start + last.tokens), store.spec.layers
    return Run(store, tuple(part.layer(index, layers) for index in range(layers)), run)


def parts(runs: Sequence[Run]) -> list[Parts]:
    """What is scanned of them in each global layer."""
    layers = range(len(runs[0].layers) if runs else 0)
    return [Parts(run.layers[layer] for run in runs) for layer in layers]


def scan(q_GRd: Tensor, parts: Parts, elsewhere_GR: Tensor | None = None) -> Attention:
    """Attend from q, already scaled by 1/sqrt(d), to every token of the parts.

    elsewhere_GR: log of the sum of exp(logit) over tokens that are not in the parts. Where these have all of the
    attention, no value of the parts is read.
    """
    return attend_parts(q_GRd, parts, MISSED, elsewhere_GR)
