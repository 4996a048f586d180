"""Rows of token ids that training needs besides a pool's own chunks and questions.

Shape suffixes: N tokens of all rows, R rows.
"""

from dataclasses import dataclass

import numpy as np

from herd.data.pool import Pool

_ROW = 512  # tokens of a row of `vocabulary`
_OFTEN = 3  # places of each token in it: one alone would say nothing about what its states have in common


@dataclass(frozen=True)
class Rows:
    """Row i is ids_N[start_R[i] : start_R[i + 1]]."""

    ids_N: np.ndarray  # int32
    start_R: np.ndarray  # int64, one more than there are rows

    @classmethod
    def alike(cls, ids_RT: np.ndarray) -> "Rows":
        """Rows of one length."""
        return cls(ids_RT.astype(np.int32).ravel(), np.arange(len(ids_RT) + 1) * ids_RT.shape[1])


def passages(pool: Pool, tokens: int, count: int, seed: int) -> Rows:
    """Plain text: the token that questions begin with, and a passage from anywhere in a chunk.

    `count` from each chunk that is long enough; `tokens` in all.
    """
    rng = np.random.default_rng((seed, 1))
    tokens -= 1
    spare = np.diff(pool.chunk_start_C) - tokens
    starts = [
        begin + offset
        for begin, room in zip(pool.chunk_start_C, spare, strict=False)
        for offset in (rng.integers(0, room, count, endpoint=True) if room >= 0 else ())
    ]
    first = pool.question_ids_M[:1]
    return Rows.alike(np.stack([np.concatenate([first, pool.chunk_ids_N[s : s + tokens]]) for s in starts]))


def vocabulary(pool: Pool, kinds: int, seed: int) -> Rows:
    """Every token of a vocabulary of `kinds`, in passages of the pool in which half of all tokens are exchanged."""
    rng = np.random.default_rng((seed, 2))
    put = np.concatenate([rng.permutation(kinds) for _ in range(_OFTEN)])
    rows = -(-2 * len(put) // _ROW)
    starts = rng.integers(0, max(1, len(pool.chunk_ids_N) - _ROW), rows)
    ids_RT = np.stack([np.resize(pool.chunk_ids_N[s : s + _ROW], _ROW) for s in starts])
    ids_RT.reshape(-1)[: 2 * len(put)].reshape(-1, 2)[:, 0] = put
    return Rows.alike(ids_RT)


def firsts(pool: Pool, kinds: int, count: int, seed: int) -> Rows:
    """Rows of one token: those that questions and chunks begin with, then any."""
    rng = np.random.default_rng((seed, 3))
    others = rng.choice(kinds, min(count, kinds), replace=False)
    return Rows.alike(np.concatenate([pool.question_ids_M[:1], pool.chunk_ids_N[:1], others])[:, None])
