"""What a machine and a model allow at most: bytes read from memory in a second, and bytes that a new token must read.

The benchmarks outside of this package measure with the same functions.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from herd.config import TextConfig

READ_BYTES = 1 << 30  # far beyond all caches
ROUNDS = 7


def median_seconds(call: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """The median time of a call, after one that warms up."""
    call()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def read_bytes_per_s(rounds: int = ROUNDS, size: int = READ_BYTES) -> float:
    """Bytes/s of a plain sum over memory, with the threads that PyTorch has."""
    numbers = torch.ones(size // 8, dtype=torch.int64)
    return size / median_seconds(numbers.sum, rounds)


def weights_read(cfg: TextConfig) -> int:
    """Weights that one new token passes through: of embeddings that are no head at the same time, it reads one row."""
    embeddings = 0 if cfg.tie_word_embeddings else cfg.vocab_size * cfg.hidden_size
    return cfg.num_parameters(active=True) - embeddings
