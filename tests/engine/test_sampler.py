"""Sampling: greedy, cuts, seeds and ranges."""

import pytest
import torch

from herd.engine import Sampler
from herd.errors import PromptError

LOGITS_BV = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5]]))


def draws(sampler: Sampler, count: int = 300) -> list[set[int]]:
    streams = sampler.streams(2)
    rows = [sampler.choose(LOGITS_BV, streams) for _ in range(count)]
    return [{row[i] for row in rows} for i in range(2)]


def test_greedy_takes_the_most_likely() -> None:
    assert Sampler().choose(LOGITS_BV, []) == [0, 3]


@pytest.mark.parametrize(
    ("sampler", "kept"),
    [
        (Sampler(temperature=1.0, seed=1), [{0, 1, 2, 3}, {0, 1, 2, 3}]),
        (Sampler(temperature=1.0, top_k=2, seed=1), [{0, 1}, {2, 3}]),
        (Sampler(temperature=1.0, top_p=0.7, seed=1), [{0, 1}, {2, 3}]),
        (Sampler(temperature=1.0, top_p=0.01, seed=1), [{0}, {3}]),
        (Sampler(temperature=1.0, top_k=3, top_p=0.9, seed=1), [{0, 1, 2}, {1, 2, 3}]),
        (Sampler(temperature=0.01, seed=1), [{0}, {3}]),
    ],
)
def test_cuts(sampler: Sampler, kept: list[set[int]]) -> None:
    assert draws(sampler) == kept


def test_frequencies_follow_the_probabilities() -> None:
    sampler = Sampler(temperature=1.0, seed=3)
    streams = sampler.streams(1)
    picks = torch.tensor([sampler.choose(LOGITS_BV[:1], streams)[0] for _ in range(4000)])
    shares = torch.bincount(picks, minlength=4) / 4000
    assert torch.allclose(shares, LOGITS_BV[0].exp(), atol=0.03)


def test_seeds() -> None:
    def picks(seed: int | None) -> list[int]:
        sampler = Sampler(temperature=1.0, seed=seed)
        streams = sampler.streams(2)
        return [pick for _ in range(40) for pick in sampler.choose(LOGITS_BV, streams)]

    assert picks(5) == picks(5)
    assert picks(5) != picks(6)
    assert picks(None) != picks(None)


@pytest.mark.parametrize(
    "bad", [{"temperature": -0.1}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}]
)
def test_values_outside_their_range(bad: dict[str, float]) -> None:
    with pytest.raises(PromptError, match=next(iter(bad))):
        Sampler(**bad)  # type: ignore[arg-type]
