"""Hidden states of frozen layers are what the transformer computes, and survive an interruption."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from herd.data import bank
from herd.data.bank import hidden_states
from tests.model.tiny_models import BASE, CHUNK, build

DEPTH = 2
LENGTHS = (5, 8, 1, 7, 3, 8, 2, 6, 4, 8)


@pytest.fixture(scope="module")
def world():
    model = build(replace(BASE, attention_chunk_size=CHUNK)).bfloat16()
    start = np.cumsum([0, *LENGTHS])
    ids = np.random.default_rng(0).integers(0, BASE.vocab_size, start[-1]).astype(np.int32)
    return model, ids, start


def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bank, "_BATCH_TOKENS", 16)
    monkeypatch.setattr(bank, "_SAVE_EVERY", 2)


@torch.no_grad()
def test_states_are_those_of_the_transformer(world, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_batches(monkeypatch)
    model, ids, start = world
    seen: list[int] = []
    states = hidden_states(model, DEPTH, ids, start, tmp_path / "x.bf16", seen.append)
    assert sum(seen) == len(ids) and len(seen) >= 4
    inputs: list[torch.Tensor] = []
    hook = model.blocks[DEPTH].register_forward_pre_hook(lambda block, args: inputs.append(args[0]))
    for a, b in pairwise(start):
        model(torch.from_numpy(ids[a:b].astype(np.int64)).unsqueeze(0))
        # Padding changes the order of additions, in bfloat16.
        torch.testing.assert_close(states[a:b], inputs.pop()[0], atol=0.06, rtol=0.02)
    hook.remove()


def test_an_interrupted_call_goes_on(world, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_batches(monkeypatch)
    model, ids, start = world
    whole = hidden_states(model, DEPTH, ids, start, tmp_path / "whole.bf16", lambda tokens: None)
    calls = 0

    def killed(tokens: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hidden_states(model, DEPTH, ids, start, tmp_path / "cut.bf16", killed)
    filled: list[int] = []
    fill = bank._fill
    monkeypatch.setattr(bank, "_fill", lambda *args: (filled.append(len(args[4])), fill(*args)))
    seen: list[int] = []
    resumed = hidden_states(model, DEPTH, ids, start, tmp_path / "cut.bf16", seen.append)
    assert len(filled) == len(seen) - 2  # two batches had been noted as done
    assert sum(seen) == len(ids)
    assert torch.equal(resumed.view(torch.int16), whole.view(torch.int16))
    assert (tmp_path / "cut.bf16").read_bytes() == (tmp_path / "whole.bf16").read_bytes()
    filled.clear()
    hidden_states(model, DEPTH, ids, start, tmp_path / "cut.bf16", lambda tokens: None)
    assert not filled
