"""Generation: a batch equals its rows run alone, streaming equals collecting, bad prompts are refused."""

import importlib

import pytest
import torch

from herd.config import TextConfig
from herd.engine import Sampler, generate, stream
from herd.errors import PromptError
from herd.model import KVCache, Transformer

CONFIG = TextConfig(
    vocab_size=61,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=16,
    intermediate_size_mlp=24,
    num_local_experts=4,
    num_experts_per_tok=1,
    max_position_embeddings=128,
    nope_layer_interval=2,
    interleave_moe_layer_step=2,
    attention_chunk_size=8,
)
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9], [3], [2, 3, 8, 4, 6, 2, 6, 4]]


@pytest.fixture(scope="module")
def transformer() -> Transformer:
    torch.manual_seed(0)
    model = Transformer(CONFIG).eval()
    for parameter in model.parameters():  # large enough that logits differ clearly
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("sampler", [None, Sampler(temperature=0.8, top_p=0.9, top_k=20, seed=7)])
@pytest.mark.parametrize("start", [0, 40])
def test_batch_equals_rows_alone(transformer: Transformer, sampler: Sampler | None, start: int) -> None:
    together = generate(transformer, PROMPTS, max_tokens=20, eos_ids=[11], sampler=sampler, start_position=start)
    for row, prompt in enumerate(PROMPTS):
        own = Sampler(0.8, 0.9, 20, seed=7 + row) if sampler else None
        [alone] = generate(transformer, [prompt], max_tokens=20, eos_ids=[11], sampler=own, start_position=start)
        assert together[row] == alone


def test_greedy_equals_full_forward(transformer: Transformer) -> None:
    for prompt in PROMPTS:
        ids = list(prompt)
        with torch.inference_mode():
            for _ in range(20):
                ids.append(int(transformer(torch.tensor([ids]))[0, -1].argmax()))
        assert generate(transformer, [prompt], max_tokens=20) == [ids[len(prompt) :]]


def test_prefill_in_pieces_changes_nothing(transformer: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = generate(transformer, PROMPTS, max_tokens=8)
    monkeypatch.setattr(importlib.import_module("herd.engine.generate"), "PREFILL_TOKENS", 5)
    assert generate(transformer, PROMPTS, max_tokens=8) == whole


def test_stream_yields_what_generate_returns(transformer: Transformer) -> None:
    free = generate(transformer, PROMPTS, max_tokens=6)
    end = free[1][2]
    rows: list[list[int]] = [[] for _ in PROMPTS]
    finished = []
    for token in stream(transformer, PROMPTS, max_tokens=6, eos_ids=[end], cache=KVCache(CONFIG)):
        assert token.row not in finished
        rows[token.row].append(token.id)
        if token.last:
            finished.append(token.row)
    assert sorted(finished) == [0, 1, 2, 3]
    assert rows[1][-1] == end and end not in rows[1][:-1]
    kept = generate(transformer, PROMPTS, max_tokens=6, eos_ids=[end])
    assert kept == [row[:-1] if row[-1] == end else row for row in rows]


def test_nothing_to_do(transformer: Transformer) -> None:
    assert generate(transformer, [], max_tokens=5) == []
    assert generate(transformer, [[1]], max_tokens=0) == [[]]


@pytest.mark.parametrize(
    ("prompt", "tokens", "message"),
    [
        ([], 1, "prompt 0 is empty"),
        ([61], 1, "the vocabulary has ids 0 to 60"),
        ([-1], 1, "holds the id -1"),
        ([1] * 100, 29, r"needs 129 positions .* has 128; shorten the prompt or allow fewer new tokens"),
    ],
)
def test_bad_prompts_are_refused(transformer: Transformer, prompt: list[int], tokens: int, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        generate(transformer, [prompt], max_tokens=tokens)
    assert len(generate(transformer, [[1] * 99], max_tokens=29)[0]) == 29
