"""Sampling: a plain reference in numpy, transformers' own steps, seeds and ranges."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from herd.engine import Sampler
from herd.engine.sampler import Draws, candidates, choose
from herd.errors import PromptError

LOGITS_BV = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5]]))
V = 40


# The reference: as the definitions read, one token at a time


def reference_penalties(logits: np.ndarray, sampler: Sampler, prompt: list[int], answer: list[int]) -> np.ndarray:
    logits = logits.astype(np.float64)
    for token in {*prompt, *answer}:
        by = sampler.repetition_penalty
        logits[token] = logits[token] / by if logits[token] > 0 else logits[token] * by
    for token in set(answer):
        logits[token] -= sampler.frequency_penalty * answer.count(token) + sampler.presence_penalty
    return logits


def reference_probabilities(logits: np.ndarray, sampler: Sampler) -> np.ndarray:
    probs = np.exp((logits - logits.max()) / sampler.temperature)
    ranked = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if sampler.top_k:
        ranked = ranked[: sampler.top_k]
    total = sum(probs[token] for token in ranked)
    nucleus, mass = [], 0.0
    for token in ranked:
        if mass >= sampler.top_p:
            break
        nucleus.append(token)
        mass += probs[token] / total
    kept = [token for token in nucleus if probs[token] >= sampler.min_p * probs[ranked[0]]]
    out = np.zeros(len(logits))
    out[kept] = probs[kept] / sum(probs[kept])
    return out


def reference_choice(logits: np.ndarray, sampler: Sampler, prompt: list[int], answer: list[int], uniform: float) -> int:
    """uniform: a number from 0 to 1, which falls on a token if the tokens' probabilities are laid side by side."""
    logits = reference_penalties(logits, sampler, prompt, answer)
    if sampler.temperature == 0:
        return int(np.argmax(logits))
    mass = 0.0
    probs = reference_probabilities(logits, sampler)
    for token in range(len(logits)):
        mass += probs[token]
        if uniform < mass:
            return token
    return int(np.flatnonzero(probs)[-1])


SAMPLERS = st.builds(
    Sampler,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_p=st.sampled_from([1.0, 0.95, 0.6, 0.1]),
    top_k=st.sampled_from([0, 1, 3, 17, V, 3 * V]),
    seed=st.integers(0, 2**63 - 1),
    min_p=st.sampled_from([0.0, 0.05, 0.4, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    frequency_penalty=st.sampled_from([0.0, 0.5, -1.0]),
    presence_penalty=st.sampled_from([0.0, 0.7, -0.4]),
    logprobs=st.sampled_from([None, 0, 3]),
)


def some_logits(seed: int, rows: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=3, size=(rows, V)).astype(np.float32)


@settings(max_examples=300)
@given(sampler=SAMPLERS, seed=st.integers(0, 10**6), prompt=st.lists(st.integers(0, V - 1), min_size=1, max_size=9))
def test_choices_equal_the_reference(sampler: Sampler, seed: int, prompt: list[int]) -> None:
    draws, answer = Draws(sampler, prompt, V), list[int]()
    uniforms = torch.Generator().manual_seed(sampler.seed or 0)
    for logits in some_logits(seed, 6):
        choice = draws.choose(torch.tensor(logits))
        uniform = float(torch.rand(1, generator=uniforms, dtype=torch.float64)) if sampler.temperature else 0.0
        assert choice.id == reference_choice(logits, sampler, prompt, answer, uniform)
        answer.append(choice.id)
        logprobs = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
        if sampler.logprobs is None:
            assert choice.logprob is None and choice.top == ()
        else:
            best = np.argsort(-logprobs)[: sampler.logprobs]
            assert choice.logprob == pytest.approx(logprobs[choice.id])
            assert [token for token, _ in choice.top] == best.tolist()
            assert [value for _, value in choice.top] == pytest.approx(logprobs[best].tolist())


@settings(max_examples=200)
@given(sampler=SAMPLERS.filter(lambda s: s.temperature > 0), seed=st.integers(0, 10**6))
def test_probabilities_equal_the_reference(sampler: Sampler, seed: int) -> None:
    [logits] = some_logits(seed, 1).astype(np.float64)
    ids, probs = candidates(torch.tensor(logits), sampler)
    found = torch.zeros(V, dtype=torch.float64).index_copy(0, ids, probs)
    np.testing.assert_allclose(found, reference_probabilities(logits, sampler), atol=1e-12)


@settings(max_examples=100)
@given(sampler=SAMPLERS.filter(lambda s: s.temperature > 0), seed=st.integers(0, 10**6))
def test_probabilities_equal_transformers(sampler: Sampler, seed: int) -> None:
    sampler = replace(sampler, frequency_penalty=0.0, presence_penalty=0.0)
    prompt, logits_BV = [3, 1, 4, 1, 5], torch.tensor(some_logits(seed, 1)).double()
    steps = [
        RepetitionPenaltyLogitsProcessor(sampler.repetition_penalty),
        TemperatureLogitsWarper(sampler.temperature),
        TopKLogitsWarper(sampler.top_k or V),
        TopPLogitsWarper(sampler.top_p),
        MinPLogitsWarper(sampler.min_p),
    ]
    theirs_BV = logits_BV.clone()
    for step in steps:
        theirs_BV = step(torch.tensor([prompt]), theirs_BV)
    penalised = Draws(sampler, prompt, V)._penalise(logits_BV[0])
    ids, probs = candidates(penalised, sampler)
    found = torch.zeros(V, dtype=torch.float64).index_copy(0, ids, probs)
    torch.testing.assert_close(found, theirs_BV[0].softmax(-1), rtol=0, atol=1e-12)


# What the settings mean


def drawn(sampler: Sampler, count: int = 300) -> list[set[int]]:
    draws = [Draws(sampler, [0], 4) for _ in range(2)]
    rows = [[choice.id for choice in choose(LOGITS_BV, draws)] for _ in range(count)]
    return [{row[i] for row in rows} for i in range(2)]


def test_greedy_takes_the_most_likely() -> None:
    assert drawn(Sampler()) == [{0}, {3}]
    assert drawn(Sampler(top_k=3, top_p=0.9, min_p=0.1, seed=1)) == [{0}, {3}]


@pytest.mark.parametrize(
    ("sampler", "kept"),
    [
        (Sampler(temperature=1.0, seed=1), [{0, 1, 2, 3}, {0, 1, 2, 3}]),
        (Sampler(temperature=1.0, top_k=2, seed=1), [{0, 1}, {2, 3}]),
        (Sampler(temperature=1.0, top_p=0.7, seed=1), [{0, 1}, {2, 3}]),
        (Sampler(temperature=1.0, top_p=0.01, seed=1), [{0}, {3}]),
        (Sampler(temperature=1.0, top_k=3, top_p=0.9, seed=1), [{0, 1, 2}, {1, 2, 3}]),
        (Sampler(temperature=1.0, min_p=0.2, seed=1), [{0, 1, 2}, {1, 2, 3}]),
        (Sampler(temperature=1.0, min_p=1.0, seed=1), [{0}, {3}]),
        (Sampler(temperature=0.01, seed=1), [{0}, {3}]),
        (Sampler(temperature=5e-324, seed=1), [{0}, {3}]),
    ],
)
def test_cuts(sampler: Sampler, kept: list[set[int]]) -> None:
    assert drawn(sampler) == kept


def test_of_equal_tokens_top_k_keeps_the_first() -> None:
    ids, probs = candidates(torch.zeros(9, dtype=torch.float64), Sampler(temperature=1.0, top_k=4))
    assert ids.tolist() == [0, 1, 2, 3] and probs.tolist() == [0.25] * 4


def test_frequencies_follow_the_probabilities() -> None:
    draws = Draws(Sampler(temperature=1.0, seed=3), [0], 4)
    picks = torch.tensor([draws.choose(LOGITS_BV[0]).id for _ in range(4000)])
    shares = torch.bincount(picks, minlength=4) / 4000
    assert torch.allclose(shares, LOGITS_BV[0].exp(), atol=0.03)


def test_seeds() -> None:
    def picks(seed: int | None) -> list[int]:
        draws = Draws(Sampler(temperature=1.0, seed=seed), [0], 4)
        return [draws.choose(LOGITS_BV[0]).id for _ in range(60)]

    assert picks(5) == picks(5)
    assert picks(5) != picks(6)
    assert picks(None) != picks(None)


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("inf")},
        {"frequency_penalty": 2.1},
        {"presence_penalty": float("nan")},
        {"seed": -1},
        {"seed": 2**63},
        {"logprobs": 21},
        {"logprobs": -1},
    ],
)
def test_values_outside_their_range(bad: dict[str, Any]) -> None:
    [(name, value)] = bad.items()
    with pytest.raises(PromptError, match=f"{name} is {value}"):
        Sampler(**bad)
