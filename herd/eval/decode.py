"""How fast an answer goes on over a context, beside what the machine's memory allows.

Exactly so many tokens are made: end tokens are left out of what may come next, and no quote is looked for, which would
end the answer. Each token is timed; the first few are left out, for they meet a memory that is still cold.

`decode_read_share` is the rate at which the median token must have read, as a share of the rate that a plain sum over
memory has in the same process right after. What it must read: the keys of the whole context in all global layers
(numbers and scales) and the weights that a token passes through. Values are not counted, for most of them need not be
read, nor the few keys and values of question and answer.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from torch import Tensor

from herd.api import Model
from herd.context.cache import ContextCache, ContextRow
from herd.context.scan import runs
from herd.context.store import Store, spec_for
from herd.engine import Engine, Request, Token, stream
from herd.errors import HerdError
from herd.eval import limits, report
from herd.model import KVRow
from herd.prompt.ask import ask_prompt

TOKENS = 64
WARM = 4  # tokens that are not counted


def decode(model: Model, folder: Path, question: str, tokens: int = TOKENS) -> report.Result:
    """Answer with exactly `tokens` tokens, more than WARM + 1; speed, and the most attention that was not read."""
    assert tokens > WARM + 1, tokens
    store = Store.open(folder, spec_for(model.config, model.fingerprint), any_dtype=True, any_reading=True)
    prompt = ask_prompt(model.tokenizer, question)
    cache = ContextCache([store], model.config, model.transformer.memory_dtype, len(prompt) + tokens)
    engine = Engine(model.transformer, cache=cache, rows=1)
    ends = model.tokenizer.eos_ids

    def no_end(ids: Sequence[int], logits_V: Tensor, row: KVRow) -> Tensor:
        going_V = logits_V.clone()
        going_V[ends] = -float("inf")
        return going_V

    row = engine.row(engine.submit(Request(prompt, tokens, eos_ids=ends, guide=no_end)))
    made, times = list[Token](), list[float]()
    for token in stream(engine):
        times.append(time.perf_counter())
        made.append(token)
    if len(made) != tokens or any(token.id in ends for token in made):
        raise HerdError(f"{len(made)} tokens were made, not the {tokens} that are to be timed")
    gaps = [after - before for before, after in pairwise(times)]
    seconds = statistics.median(gaps[WARM:])
    assert isinstance(row, ContextRow)
    return {
        "decode_tokens": tokens,
        "decode_tokens_per_s": round(1 / seconds, 2),
        **_share(read_bytes(model, store), seconds),
        "missed_mass": row.missed,
    }


def read_bytes(model: Model, store: Store) -> float:
    """Bytes that each new token must read (see the module)."""
    kept = (kv for run in runs(store) for kv in run.layers)
    keys = sum(kv.k_GNd.nbytes + (0 if kv.k_scale_GN is None else kv.k_scale_GN.nbytes) for kv in kept)
    packed = model.transformer.packed
    if packed is not None:
        return keys + sum(weight.nbytes for weight in packed.weights(active=True))
    return keys + limits.weights_read(model.config) * model.transformer.memory_dtype.itemsize


def _share(needed: float, seconds: float) -> report.Result:
    rate = limits.read_bytes_per_s()
    return {
        "decode_read_gb": round(needed / 1e9, 3),
        "memory_read_gb_per_s": round(rate / 1e9, 2),
        "decode_read_share": round(needed / seconds / rate, 3),
    }
