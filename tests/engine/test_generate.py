"""Generation: a batch equals its rows run alone, streaming equals collecting, bad prompts are refused."""

import pytest
import torch

from herd.config import TextConfig
from herd.engine import Engine, Request, Sampler, generate, stream
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


class Later(KVCache):
    """Sequences that begin at a position of their own, as after a context."""

    start_position = 40


@pytest.mark.parametrize("sampler", [None, Sampler(temperature=0.8, top_p=0.9, top_k=20, seed=7)])
@pytest.mark.parametrize("cache", [None, Later(CONFIG)])
def test_batch_equals_rows_alone(transformer: Transformer, sampler: Sampler | None, cache: KVCache | None) -> None:
    together = generate(transformer, PROMPTS, max_tokens=20, eos_ids=[11], sampler=sampler, cache=cache)
    for row, prompt in enumerate(PROMPTS):
        [alone] = generate(transformer, [prompt], max_tokens=20, eos_ids=[11], sampler=sampler, cache=cache)
        assert together[row] == alone


def test_greedy_equals_full_forward(transformer: Transformer) -> None:
    for prompt in PROMPTS:
        ids = list(prompt)
        with torch.inference_mode():
            for _ in range(20):
                ids.append(int(transformer(torch.tensor([ids]))[0, -1].argmax()))
        assert generate(transformer, [prompt], max_tokens=20) == [ids[len(prompt) :]]


@pytest.mark.parametrize("prompt_tokens", [1, 5, 17])
def test_prefill_in_pieces_changes_nothing(transformer: Transformer, prompt_tokens: int) -> None:
    engine = Engine(transformer, prompt_tokens=prompt_tokens)
    out: list[list[int]] = [[] for _ in PROMPTS]
    for prompt in PROMPTS:
        engine.submit(Request(prompt, 8))
    for token in stream(engine):
        out[token.request].append(token.id)
    assert out == generate(transformer, PROMPTS, max_tokens=8)


def test_stream_yields_what_generate_returns(transformer: Transformer) -> None:
    free = generate(transformer, PROMPTS, max_tokens=6)
    end = free[1][2]
    rows: list[list[int]] = [[] for _ in PROMPTS]
    finished = []
    engine = Engine(transformer)
    for prompt in PROMPTS:
        engine.submit(Request(prompt, 6, eos_ids=[end]))
    for token in stream(engine):
        assert token.request not in finished
        rows[token.request].append(token.id)
        assert token.finish == ("stop" if token.id == end else "length" if len(rows[token.request]) == 6 else None)
        if token.finish:
            finished.append(token.request)
    assert sorted(finished) == [0, 1, 2, 3]
    assert rows[1][-1] == end and end not in rows[1][:-1]
    kept = generate(transformer, PROMPTS, max_tokens=6, eos_ids=[end])
    assert kept == [row[:-1] if row[-1] == end else row for row in rows]


def test_nothing_to_do(transformer: Transformer) -> None:
    assert generate(transformer, [], max_tokens=5) == []
    engine = Engine(transformer)
    assert engine.idle and engine.step() == []
    with pytest.raises(PromptError, match="max_tokens is 0"):
        generate(transformer, [[1]], max_tokens=0)


@pytest.mark.parametrize(
    ("prompt", "tokens", "message"),
    [
        ([], 1, "prompt is empty"),
        ([61], 1, "the vocabulary has ids 0 to 60"),
        ([-1], 1, "holds the id -1"),
        ([1] * 100, 29, r"needs 129 positions .* has 128; shorten the prompt or allow fewer new tokens"),
    ],
)
def test_bad_prompts_are_refused(transformer: Transformer, prompt: list[int], tokens: int, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        generate(transformer, [prompt], max_tokens=tokens)
    assert len(generate(transformer, [[1] * 99], max_tokens=29)[0]) == 29
