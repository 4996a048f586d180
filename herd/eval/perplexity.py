"""General ability: perplexity of a fixed text, Cria against its unchanged base, with no context read.

The text is the language reference that every Python ships (`pydoc_data.topics`), as it is here; its sha256 is in the
result. Every window of at most 512 tokens is read on its own, so nothing but the weights differs.
"""

from __future__ import annotations

import hashlib
import math
from importlib import import_module

import torch

from herd.api import Model
from herd.errors import ConfigError
from herd.eval import corpus, report

WINDOW = 512


def fixed_text() -> str:
    """The topics of Python's language reference in alphabetical order."""
    topics: dict[str, str] = import_module("pydoc_data.topics").topics
    return "\n".join(topics[name] for name in sorted(topics))


def perplexity(
    model: Model, base: Model | None, windows: int, progress: corpus.Progress, *, window: int = WINDOW
) -> report.Result:
    """exp(mean loss per token) over the first `windows` windows of the text, and the change against the base in %."""
    if window > corpus.chunk_size(model):
        raise ConfigError(f"a window of {window} tokens exceeds the local chunk {corpus.chunk_size(model)}")
    text = fixed_text()
    ids = model.tokenizer.encode(text)[: windows * window]
    result: report.Result = {
        "eval": "perplexity",
        "text": "pydoc_data.topics",
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "tokens": len(ids),
        "window": window,
        "perplexity": _measure(model, ids, window, progress),
    }
    if base is not None:
        before = _measure(base, ids, window, progress)
        result["base_perplexity"] = before
        result["change_percent"] = round(100 * (result["perplexity"] / before - 1), 3)
    return result


def _measure(model: Model, ids: list[int], window: int, progress: corpus.Progress) -> float:
    loss, count = 0.0, 0
    for start in range(0, len(ids), window):
        piece = ids[start : start + window]
        if len(piece) < 2:
            break
        logits = model.logits(piece)[:-1]
        loss += float(torch.nn.functional.cross_entropy(logits, torch.tensor(piece[1:]), reduction="sum"))
        count += len(piece) - 1
        if start // window % 20 == 19:
            progress(f"perplexity: {start + window:,} of {len(ids):,} tokens")
    return round(math.exp(loss / count), 4)
