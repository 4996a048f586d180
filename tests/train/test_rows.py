"""Rows beyond the pool: passages begin anywhere, no token of the vocabulary is missing, first tokens stand alone."""

import numpy as np
import pytest

from herd.data.pool import Pool
from herd.train.rows import Rows, firsts, passages, vocabulary

KINDS = 700


@pytest.fixture
def pool() -> Pool:
    """Chunks of 300, 20 and 200 tokens; every token is its place."""
    start = np.array([0, 300, 320, 520])
    none = np.zeros(0, np.int32)
    question = np.array([5, 6], np.int32)
    return Pool(np.arange(520, dtype=np.int32), start, question, np.array([0, 2]), none, none, none, none, none)


def rows(made: Rows) -> list[list[int]]:
    return [made.ids_N[a:b].tolist() for a, b in zip(made.start_R, made.start_R[1:], strict=False)]


def test_passages_are_text_of_one_chunk_from_anywhere(pool: Pool) -> None:
    made = rows(passages(pool, 40, 5, seed=1))
    assert len(made) == 10, "two chunks are long enough"
    for first, *row in made:
        assert first == 5, "as questions begin"
        assert row == list(range(row[0], row[0] + 39))
        assert row[-1] < 300 or row[0] >= 320
    assert len({row[1] for row in made}) > 5
    assert made == rows(passages(pool, 40, 5, seed=1)) != rows(passages(pool, 40, 5, seed=2))


def test_the_whole_vocabulary_stands_in_text(pool: Pool) -> None:
    made = vocabulary(pool, KINDS, seed=1)
    count = np.bincount(made.ids_N, minlength=KINDS)
    assert len(count) == KINDS and count.min() >= 3
    following = sum((np.diff(row) == 0).sum() for row in rows(made))
    assert following < len(made.ids_N) / 20
    kept = made.ids_N.reshape(len(made.start_R) - 1, -1)[:, 1::2]
    assert (np.diff(kept) == 2).mean() > 0.9, "every other token is the pool's own"


def test_firsts_stand_alone_and_begin_with_that_of_questions(pool: Pool) -> None:
    made = rows(firsts(pool, KINDS, 50, seed=1))
    assert made[:2] == [[5], [0]] and len(made) == 52
    assert all(len(row) == 1 for row in made) and len({row[0] for row in made[2:]}) == 50
