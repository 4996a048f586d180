"""What formats of weights cost: how far each is from the model as it is stored, and its bytes, with no context read.

The text is that of `perplexity`. KL is the mean over its tokens of the divergence of the next token's distribution from
that of the model in bfloat16 (nats), and `same_next` the share of tokens after which the likeliest one is the same.
Calibrated formats are calibrated on `herd.data.calibration`, which does not hold that text.
"""

from __future__ import annotations

import gc
import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from herd import kernels
from herd.api import Model, load
from herd.data import calibration
from herd.errors import ConfigError
from herd.eval import corpus, perplexity, report
from herd.model.packed import Packed


class Variant(NamedTuple):
    """A format of weights as a model's name has it, rounded to the nearest or calibrated."""

    weights: str
    calibrated: bool = False


_GROUPS = (32, 64, 128)
# What global layers look up is not found again by a little wrong queries, keys and values.
_SPARING = "experts=int4,shared=int4,attention=int4,global_attention=int8,head=int4"
VARIANTS = (
    *(Variant(f"int8:{group}") for group in _GROUPS),
    Variant("fp8"),
    *(Variant(f"int4:{group}", calibrated) for group in _GROUPS for calibrated in (False, True)),
    *(Variant(f"{part}=int4") for part in ("experts", "shared", "attention", "global_attention", "head")),
    *(Variant(_SPARING, calibrated) for calibrated in (False, True)),
)


def quantisation(model: Model, windows: int, progress: corpus.Progress) -> report.Result:
    """Each variant of the stored model that `model` was made from, over the first `windows` windows of the text."""
    stored, size = str(model.path), perplexity.WINDOW
    if size > corpus.chunk_size(model):
        raise ConfigError(f"a window of {size} tokens exceeds the local chunk {corpus.chunk_size(model)}")
    text = perplexity.fixed_text()
    first = [] if model.tokenizer.bos_id is None else [model.tokenizer.bos_id]
    ids = model.tokenizer.encode(text)[: windows * (size - len(first))]
    pieces = [first + ids[at : at + size - len(first)] for at in range(0, len(ids), size - len(first))]
    exact = load(f"{stored}@bf16")
    _packed(exact)
    rows = calibration.default_rows(model.tokenizer, model.config, calibration.ROWS)
    found = [{"weights": "bf16", "calibrated": False, **_measure(exact, exact, pieces)}]
    for weights, calibrated in VARIANTS:
        progress(f"measuring {weights}{', calibrated' if calibrated else ''}")
        other = load(f"{stored}@{weights}", calibration=rows if calibrated else None)
        found.append({"weights": weights, "calibrated": calibrated, **_measure(other, exact, pieces)})
        del other
        gc.collect()
    return {
        "eval": "quantisation",
        "text": "pydoc_data.topics",
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "tokens": len(ids),
        "window": size,
        "calibration_tokens": rows.numel(),
        "variants": found,
    }


def _measure(model: Model, exact: Model, pieces: Sequence[Sequence[int]]) -> report.Result:
    loss, divergence, same, count = 0.0, 0.0, 0, 0
    for piece in pieces:
        theirs, ours = (m.logits(piece)[:-1].log_softmax(-1) for m in (exact, model))
        loss -= float(ours.gather(1, torch.tensor(piece[1:]).unsqueeze(1)).sum())
        divergence += float(torch.nn.functional.kl_div(ours, theirs, reduction="sum", log_target=True))
        same += int((ours.argmax(1) == theirs.argmax(1)).sum())
        count += len(piece) - 1
    return {
        "perplexity": round(math.exp(loss / count), 3),
        "kl": round(divergence / count, 5),
        "same_next": round(same / count, 4),
        "weight_bytes": sum(weight.nbytes for weight in _packed(model).weights()),
    }


def _packed(model: Model) -> Packed:
    packed = model.transformer.packed
    if packed is None:
        raise ConfigError(f"formats are compared where layers run natively; here {kernels.implementation()}")
    return packed
