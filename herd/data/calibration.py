"""Text that weights are calibrated on: that of a file, or Python's own source with questions about it.

Shape suffixes: B rows, T tokens.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from herd.config import TextConfig
from herd.data.pool import PoolRecipe, build
from herd.errors import SourceError
from herd.prompt import Tokenizer

ROWS, TOKENS = 16, 1024
_ASKED = 256  # tokens of questions and answers behind the text of a row
# What evaluations read, and packages that are no part of Python.
_HOLD_OUT = ("http", "asyncio", "email", "test", "tests", "idlelib", "pydoc_data", "site-packages", "dist-packages")


def rows_of_file(path: Path, tokenizer: Tokenizer, cfg: TextConfig, rows: int = ROWS) -> Tensor:
    """The first rows of a text, each at most 1,024 tokens, [B, T]. SourceError if it cannot be read or is too short."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"cannot calibrate on {path}: {error}") from error
    first, size = _begin(tokenizer), _size(cfg)
    ids = tokenizer.encode(text)
    have = len(ids) // (size - len(first))
    if not have:
        raise SourceError(f"{path} has {len(ids):,} tokens; to calibrate on it, give a text of {size:,} or more")
    pieces = torch.tensor(ids[: have * (size - len(first))]).view(have, -1)[:rows]
    return torch.cat([torch.tensor(first, dtype=torch.long).expand(len(pieces), -1), pieces], 1)


def default_rows(tokenizer: Tokenizer, cfg: TextConfig, rows: int = ROWS, seed: int = 0) -> Tensor:
    """At most so many rows of the standard library's source with facts in it, [B, T], without what evaluations read.

    Where the tokenizer has the prompt format of questions, some of them with their answers follow, from the next
    attention chunk on if it is so small, as where a context is asked. Every other row begins as texts do (BOS).
    """
    size, asks = _size(cfg), "<|im_start|>" in tokenizer.special_tokens
    counts = {"facts_per_chunk": size // 256, "questions_per_chunk": 4 * asks}
    recipe = PoolRecipe(("{stdlib}/**/*.py",), _HOLD_OUT, rows, size, **counts, seed=seed)
    pool = build(recipe, tokenizer)
    chunks = [chunk.tolist() for chunk in np.split(pool.chunk_ids_N, pool.chunk_start_C[1:-1])]
    questions = np.split(pool.question_ids_M, pool.question_start_Q[1:-1]) if asks else []
    made = []
    for c, chunk in enumerate(chunks):
        # What fills the row stands before the chunk, which is whole.
        ids = [*(chunks[c - 1] * (size // len(chunks[c - 1]) + 1)), *chunk][-size:]
        if c % 2:
            ids[: len(_begin(tokenizer))] = _begin(tokenizer)
        theirs = [i for q in (pool.chunk_of_Q == c).nonzero()[0] for i in questions[q].tolist()]
        made.append(ids + (theirs * _ASKED)[:_ASKED])
    return torch.tensor([row for row in made if len(row) == max(map(len, made))])


def _size(cfg: TextConfig) -> int:
    return min(TOKENS, cfg.attention_chunk_size or TOKENS, cfg.max_position_embeddings)


def _begin(tokenizer: Tokenizer) -> list[int]:
    return [] if tokenizer.bos_id is None else [tokenizer.bos_id]
