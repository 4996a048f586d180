"""Choose the next token of every sequence from its logits.

Shape suffixes: B batch, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from herd.errors import PromptError


@dataclass(frozen=True)
class Sampler:
    """temperature 0 is greedy. Otherwise one draw from the softmax of logits / temperature, cut to the top_k most
    likely tokens (0: all) and to the smallest set of them that holds top_p of the probability.

    Row r of a batch draws from its own stream, seeded with seed + r, so a batch equals its rows run alone. seed None
    takes a fresh one. PromptError for values outside their range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise PromptError(f"temperature is {self.temperature}; it must be 0 (greedy) or a positive number")
        if not 0 < self.top_p <= 1:
            raise PromptError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.top_k < 0:
            raise PromptError(f"top_k is {self.top_k}; it must be 0 (all tokens) or positive")

    def streams(self, batch: int) -> list[torch.Generator]:
        """One random stream per row; none for greedy choice."""
        if self.temperature == 0:
            return []
        first = torch.seed() % 2**62 if self.seed is None else self.seed
        return [torch.Generator().manual_seed(first + row) for row in range(batch)]

    def choose(self, logits_BV: Tensor, streams: list[torch.Generator]) -> list[int]:
        """The next token of each row. `streams` comes from `streams(B)` and moves on by one draw per call."""
        if self.temperature == 0:
            return logits_BV.argmax(-1).tolist()
        probs_BV = (logits_BV.double() / self.temperature).softmax(-1)
        probs_BV, order_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
        if self.top_k:
            probs_BV[:, self.top_k :] = 0
            probs_BV /= probs_BV.sum(-1, keepdim=True)
        # A token stays while the mass before it is under top_p, so the most likely one always stays.
        before_BV = probs_BV.cumsum(-1) - probs_BV
        probs_BV[before_BV >= self.top_p] = 0
        picks = [torch.multinomial(p, 1, generator=s) for p, s in zip(probs_BV.cpu(), streams, strict=True)]
        return order_BV.gather(-1, torch.stack(picks).to(order_BV.device)).flatten().tolist()
