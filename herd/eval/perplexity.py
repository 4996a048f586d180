"""General ability: perplexity of a fixed text, Cria against its unchanged base, with no context read.

The text is the language reference that every Python ships (`pydoc_data.topics`), as it is here; its sha256 is in the
result. Every window of at most 512 tokens is read on its own, so nothing but the weights differs. If the tokenizer
names a token that texts begin with (BOS), all is measured with it before every window too: Cria's texts began with it.
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
    """exp(mean loss per token of the text) over its first `windows` windows, and the change against the base in %."""
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
        **_compare(model, base, ids, window, [], progress),
    }
    if (bos := model.tokenizer.bos_id) is not None:
        result["after_bos"] = _compare(model, base, ids, window - 1, [bos], progress)
    return result


def _compare(
    model: Model, base: Model | None, ids: list[int], window: int, first: list[int], progress: corpus.Progress
) -> report.Result:
    after = _measure(model, ids, window, first, progress)
    if base is None:
        return {"perplexity": after}
    before = _measure(base, ids, window, first, progress)
    change = round(100 * (after / before - 1), 3)
    return {"perplexity": after, "base_perplexity": before, "change_percent": change}


def _measure(model: Model, ids: list[int], window: int, first: list[int], progress: corpus.Progress) -> float:
    loss, count = 0.0, 0
    for start in range(0, len(ids), window):
        piece = first + ids[start : start + window]
        if len(piece) < 2:
            break
        logits = model.logits(piece)[:-1]
        loss += float(torch.nn.functional.cross_entropy(logits, torch.tensor(piece[1:]), reduction="sum"))
        count += len(piece) - 1
        if start // window % 20 == 19:
            progress(f"perplexity: {start + window:,} of {len(ids):,} tokens")
    return round(math.exp(loss / count), 4)
