"""Choose the next token of a sequence from its logits.

The order is that of transformers (`_get_logits_processor`), with the penalties of OpenAI's API where vLLM puts them:

1. repetition penalty, as in CTRL (Keskar et al. 2019, §4.1): the logit of every token of prompt and answer is divided
   by it if positive, else multiplied by it;
2. frequency and presence penalty, as OpenAI defines them: each token of the answer loses frequency_penalty for each
   time it occurs and presence_penalty once;
3. temperature: logits are divided by it;
4. top_k: the most likely tokens stay; of equal ones those of lower id;
5. top_p: of these, the smallest set of the most likely that holds this share of their probability (nucleus,
   Holtzman et al. 2020);
6. min_p: of these, those at least this share as likely as the most likely one (Nguyen et al. 2024);
7. one draw.

Temperature 0 takes the largest logit after step 2. Logprobs are of the logits as they come from the
model, or from the request's guide.

Shape suffixes: B sequences, V vocabulary, K tokens that are kept.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from herd.errors import PromptError

MAX_LOGPROBS = 20  # as in OpenAI's API
_MAX_PENALTY = 2.0  # as in OpenAI's API


@dataclass(frozen=True)
class Sampler:
    """How tokens are chosen; temperature 0 is greedy. See the module for what each setting does, and in which order.

    seed names the random stream: a request alone decides what it draws, whatever runs beside it. None takes a fresh
    one. logprobs: how many of the most likely tokens are listed with each token, and its own logprob with them; None:
    neither. PromptError for values outside their range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logprobs: int | None = None

    def __post_init__(self) -> None:
        finite = math.isfinite
        limit = f"from -{_MAX_PENALTY:g} to {_MAX_PENALTY:g}"
        checks = (
            ("temperature", self.temperature >= 0 and finite(self.temperature), "0 (greedy) or a positive number"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or positive"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "from 0 to 2^63 - 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            (
                "repetition_penalty",
                self.repetition_penalty > 0 and finite(self.repetition_penalty),
                "a positive number; 1 is none",
            ),
            ("frequency_penalty", abs(self.frequency_penalty) <= _MAX_PENALTY, limit),
            ("presence_penalty", abs(self.presence_penalty) <= _MAX_PENALTY, limit),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, f"from 0 to {MAX_LOGPROBS}"),
        )
        for name, holds, wanted in checks:
            if not holds:
                raise PromptError(f"{name} is {getattr(self, name)}; it must be {wanted}")

    @property
    def penalises(self) -> bool:
        """Whether a choice depends on earlier tokens by more than the logits."""
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0

    @property
    def cuts(self) -> bool:
        """Whether some tokens cannot be drawn however likely they are."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


@dataclass(frozen=True)
class Choice:
    """The token that was chosen, its logprob and the most likely tokens with theirs, if they were asked for."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Draws:
    """The choices of one sequence, one after the other."""

    def __init__(self, sampler: Sampler, prompt: Sequence[int], vocab_size: int, made: Sequence[int] = ()) -> None:
        """made: tokens that were chosen before."""
        self.sampler = sampler
        self._generator = torch.Generator()
        if sampler.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampler.seed)
        if sampler.penalises:
            self._seen_V = torch.zeros(vocab_size, dtype=torch.bool)
            self._seen_V[torch.tensor(prompt)] = True
            self._counts_V = torch.zeros(vocab_size, dtype=torch.float64)
        for token in made:
            if sampler.temperature > 0:
                self._random()
            self._note(token)

    def choose(self, logits_V: Tensor) -> Choice:
        """The next token; the stream of random numbers moves on by one draw, or by none for greedy choice."""
        if self.sampler.temperature == 0 and not self.sampler.penalises:
            return self._choice(int(logits_V.argmax()), logits_V)
        penalised_V = self._penalise(logits_V.double().cpu())
        if self.sampler.temperature == 0:
            token = int(penalised_V.argmax())
        elif self.sampler.cuts:
            ids_K, probs_K = candidates(penalised_V, self.sampler)
            token = int(ids_K[self._draw(probs_K)])
        else:
            token = self._draw(_probabilities(penalised_V, self.sampler))
        self._note(token)
        return self._choice(token, logits_V)

    def _note(self, token: int) -> None:
        if self.sampler.penalises:
            self._seen_V[token] = True
            self._counts_V[token] += 1

    def _penalise(self, logits_V: Tensor) -> Tensor:
        s = self.sampler
        if not s.penalises:
            return logits_V
        by = s.repetition_penalty
        logits_V = torch.where(self._seen_V, torch.where(logits_V > 0, logits_V / by, logits_V * by), logits_V)
        return logits_V - s.frequency_penalty * self._counts_V - s.presence_penalty * (self._counts_V > 0)

    def _draw(self, probs_K: Tensor) -> int:
        # In the order of ids, so that it does not matter which of two equally likely tokens a sort puts first.
        sums_K = probs_K.cumsum(0)
        at = self._random() * sums_K[-1]
        # Rounding must not reach the end, behind which there may be tokens that cannot be drawn.
        at = at.minimum(sums_K[-1].nextafter(at.new_zeros(())))
        return int(torch.searchsorted(sums_K, at, right=True))

    def _random(self) -> Tensor:
        return torch.rand(1, generator=self._generator, dtype=torch.float64)

    def _choice(self, token: int, logits_V: Tensor) -> Choice:
        count = self.sampler.logprobs
        if count is None:
            return Choice(token)
        logprobs_V = logits_V.double().log_softmax(-1)
        values, ids = logprobs_V.topk(min(count, len(logprobs_V)))
        return Choice(token, float(logprobs_V[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))


def candidates(logits_V: Tensor, sampler: Sampler) -> tuple[Tensor, Tensor]:
    """Steps 3 to 6: the ids that may be drawn, in ascending order, and their probabilities, which sum up to 1."""
    probs_V = _probabilities(logits_V, sampler)
    ids_K = torch.arange(len(probs_V))
    if sampler.top_k or sampler.top_p < 1:
        # What is below this is cut off for certain: tokens less likely than (1 - top_p) / V hold less than 1 - top_p
        # together, so the nucleus needs none of them. Sorting all of a vocabulary is what costs.
        floor = (1 - sampler.top_p) / len(probs_V)
        if sampler.top_k:
            floor = float(probs_V.topk(min(sampler.top_k, len(probs_V))).values[-1])
        ids_K = (probs_V >= floor).nonzero().flatten()
        probs_K, order_K = probs_V[ids_K].sort(descending=True, stable=True)
        probs_K, order_K = probs_K[: sampler.top_k or None], order_K[: sampler.top_k or None]
        probs_K = probs_K / probs_K.sum() if sampler.top_k else probs_K
        # A token stays while the mass before it is under top_p, so the most likely one always stays.
        ids_K = ids_K[order_K[probs_K.cumsum(0) - probs_K < sampler.top_p]].sort().values
    probs_K = probs_V[ids_K]
    kept = (probs_K > 0) & (probs_K >= sampler.min_p * probs_K.max())
    return ids_K[kept], probs_K[kept] / probs_K[kept].sum()


def _probabilities(logits_V: Tensor, sampler: Sampler) -> Tensor:
    # The largest logit is taken away first, so that no temperature is too small.
    return ((logits_V - logits_V.max()) / sampler.temperature).softmax(-1)


def choose(logits: Iterable[Tensor], draws: Sequence[Draws]) -> list[Choice]:
    """The next token of each sequence from its logits [V], as each would choose alone."""
    return [its.choose(logits_V) for its, logits_V in zip(draws, logits, strict=True)]
