"""The cache: however a text is fed, in whatever company and wherever it stands, the logits are those of one forward."""

from copy import deepcopy
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Llama4ForCausalLM, Llama4TextConfig

from herd.kernels.layers import whole_panels
from herd.model import KVCache, Transformer, bytes_needed
from herd.model.cache import KVRows, visible
from tests.model.tiny_models import CHUNK, build, memory, tiny, tokens

fast = settings(max_examples=10, deadline=None, derandomize=True)
CONFIGS: dict[str, dict[str, Any]] = {
    "scout-like": {},
    "maverick-like": {"interleave_moe_layer_step": 2, "use_qk_norm": False, "num_experts_per_tok": 2},
    "dense, null chunk": {"attention_chunk_size": None, "nope_layer_interval": None, "num_local_experts": 0},
    "all global": {"nope_layer_interval": 1},
}
CLOSE = {"rtol": 0.0, "atol": 1e-4}
TOKENS = tokens(2, 3 * CHUNK + 5)


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest) -> Transformer:
    return build(tiny(**CONFIGS[request.param]))


def feed(model: Transformer, cache: KVRows, ids_BT: Tensor, edges: list[int], start: int = 0) -> Tensor:
    """Logits of ids fed in the pieces that `edges` cut, the first token at position `start`."""
    out = []
    for a, b in pairwise([0, *edges, ids_BT.shape[1]]):
        positions = torch.arange(start + a, start + b).expand(len(ids_BT), -1)
        out.append(model(ids_BT[:, a:b], positions, cache))
    return torch.cat(out, 1)


def remembered(cache: KVRows, layer: int) -> int:
    """Tokens for which a layer holds keys and values of the first sequence."""
    return len(cache.rows[0].remembered(layer)[0])


def held_bytes(cache: KVRows) -> int:
    """Bytes of the memory itself that hold keys and values, not just of views of it."""
    layers = [layer for row in cache.rows for layer in row._layers]
    stores = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
              for row in cache.rows for layer in row._layers for x in row.remembered(layer)}  # fmt: skip
    assert len(stores) == len(layers)
    return sum(stores.values())


# One sequence


@torch.inference_mode()
def test_greedy_tokens_equal_with_and_without_cache(model: Transformer) -> None:
    prompt = TOKENS[:1, : CHUNK - 2]
    ids = prompt
    for _ in range(64):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
    cache = memory(model.config, 1, 128)
    cached = torch.cat([prompt, model(prompt, cache=cache)[:, -1:].argmax(-1)], 1)
    while cached.shape[1] < ids.shape[1]:
        position = torch.tensor([[cached.shape[1] - 1]])
        cached = torch.cat([cached, model(cached[:, -1:], position, cache)[:, -1:].argmax(-1)], 1)
    assert ids.tolist() == cached.tolist()
    assert len(set(ids[0].tolist())) > 10, "the text is varied enough to tell a difference"


@torch.inference_mode()
def test_greedy_tokens_equal_transformers() -> None:
    model = build(tiny())
    theirs = Llama4ForCausalLM._from_config(
        Llama4TextConfig.from_dict(model.config.to_hf()), attn_implementation="eager"
    ).eval()
    theirs.load_state_dict(model.state_dict())
    prompt = TOKENS[:1, : CHUNK - 2]
    expected = theirs.generate(prompt, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)
    cache, ids, new, start = memory(model.config, 1, 128), prompt, prompt, 0
    while ids.shape[1] < expected.shape[1]:
        positions = torch.arange(start, ids.shape[1]).unsqueeze(0)
        new, start = model(new, positions, cache)[:, -1:].argmax(-1), ids.shape[1]
        ids = torch.cat([ids, new], 1)
    assert ids.tolist() == expected.tolist()


@fast
@given(edges=st.lists(st.integers(0, TOKENS.shape[1]), max_size=8).map(lambda e: sorted(set(e) - {0, TOKENS.shape[1]})))
@torch.inference_mode()
def test_prefill_in_any_split_equals_one_forward(model: Transformer, edges: list[int]) -> None:
    logits = feed(model, memory(model.config), TOKENS, edges)
    torch.testing.assert_close(logits, model(TOKENS), **CLOSE)


@torch.inference_mode()
def test_local_layers_remember_at_most_one_chunk() -> None:
    model = build(tiny())
    cache, step = memory(model.config, 1, 5 * CHUNK), 0
    for stop in (3, CHUNK + 1, *range(CHUNK + 2, 3 * CHUNK + 2), 5 * CHUNK):
        positions = torch.arange(step, stop).unsqueeze(0)
        model(tokens(1, stop - step), positions, cache)
        step = stop
        assert [remembered(cache, i) for i in range(4)] == [(step - 1) % CHUNK + 1] * 3 + [step]
        assert held_bytes(cache) == (3 * whole_panels(CHUNK) + whole_panels(5 * CHUNK)) * (2 * 2 * 8 * 4)


@torch.inference_mode()
def test_two_caches_do_not_share_anything(model: Transformer) -> None:
    a, b = memory(model.config), memory(model.config)
    other = TOKENS.flip(1)
    first, second = feed(model, a, TOKENS[:, :5], []), feed(model, b, other[:, :5], [])
    positions = torch.arange(5, 20).expand(2, -1)
    third, fourth = model(TOKENS[:, 5:20], positions, a), model(other[:, 5:20], positions, b)
    torch.testing.assert_close(torch.cat([first, third], 1), model(TOKENS[:, :20]), **CLOSE)
    torch.testing.assert_close(torch.cat([second, fourth], 1), model(other[:, :20]), **CLOSE)


# Several sequences of different lengths


@fast
@given(
    lengths=st.lists(st.integers(1, 20), min_size=2, max_size=4),
    piece=st.sampled_from([3, CHUNK, 40]),
    seed=st.integers(0, 100),
)
@torch.inference_mode()
def test_a_ragged_batch_equals_its_rows_alone(model: Transformer, lengths: list[int], piece: int, seed: int) -> None:
    ids = tokens(len(lengths), 24, seed)
    steps = torch.arange(20)
    positions = torch.where(steps < torch.tensor(lengths)[:, None], steps, -1)
    prompts = torch.where(positions >= 0, ids[:, :20], tokens(len(lengths), 20, seed + 1))  # pads hold anything
    cache = memory(model.config, len(lengths))
    pieces = [model(prompts[:, i : i + piece], positions[:, i : i + piece], cache) for i in range(0, 20, piece)]
    together = torch.cat(pieces, 1)
    alone = [model(ids[row : row + 1, : length + 4])[0] for row, length in enumerate(lengths)]
    for row, length in enumerate(lengths):
        torch.testing.assert_close(together[row, :length], alone[row][:length], **CLOSE)
    # Then every row goes on at its own position, except that row 0 has finished.
    for step in range(4):
        here = torch.tensor([[length + step] for length in lengths])
        here[0] = -1
        new = torch.stack([ids[row, length + step] for row, length in enumerate(lengths)])
        logits = model(new[:, None], here, cache)
        assert logits.isfinite().all()
        for row, length in list(enumerate(lengths))[1:]:
            torch.testing.assert_close(logits[row, 0], alone[row][length + step], **CLOSE)


@fast
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4), seed=st.integers(0, 100))
@torch.inference_mode()
def test_tokens_side_by_side_equal_sequences_alone(model: Transformer, lengths: list[int], seed: int) -> None:
    """Without padding: each pass holds a piece of every sequence, of a length of its own."""
    ids = tokens(len(lengths), 24, seed)
    cache = KVCache(model.config)
    rows = [cache.open(24) for _ in lengths]
    done = [0] * len(lengths)
    found: list[list[Tensor]] = [[] for _ in lengths]
    for stops in (lengths, [length + 1 for length in lengths], [24] * len(lengths)):
        spans = list(zip(done, stops, strict=True))
        new = torch.cat([ids[i, a:b] for i, (a, b) in enumerate(spans)])
        positions = torch.cat([torch.arange(a, b) for a, b in spans])
        logits = model(new[None], positions[None], cache.rows(rows, [b - a for a, b in spans]))[0]
        for mine, part in zip(found, logits.split([b - a for a, b in spans]), strict=True):
            mine.append(part)
        done = list(stops)
    for row, parts in enumerate(found):
        torch.testing.assert_close(torch.cat(parts), model(ids[row : row + 1])[0], **CLOSE)


@torch.inference_mode()
def test_one_token_each_of_short_and_long_sequences(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences that share a bucket are put together, those in no company or too long are not."""
    monkeypatch.setattr("herd.model.cache._BUCKET", 4)
    monkeypatch.setattr("herd.model.cache._SHORT", 12)
    lengths, ids = [1, 2, 3, 6, 9, 10, 17, 18], tokens(8, 24)
    cache = KVCache(model.config)
    rows = [cache.open(24) for _ in lengths]
    prompts = torch.cat([ids[i, :length] for i, length in enumerate(lengths)])
    positions = torch.cat([torch.arange(length) for length in lengths])
    model(prompts[None], positions[None], cache.rows(rows, lengths))
    for step in range(6):
        at = torch.tensor(lengths) + step
        new = ids[torch.arange(8), at]
        logits = model(new[None], at[None], cache.rows(rows, [1] * 8))[0]
        for row, place in enumerate(at.tolist()):
            torch.testing.assert_close(logits[row], model(ids[row : row + 1])[0, place], **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, CHUNK, 3 * CHUNK + 5])
@torch.inference_mode()
def test_memory_is_known_beforehand(model: Transformer, dtype: torch.dtype, length: int) -> None:
    ours = deepcopy(model).to(dtype)
    cache = memory(ours.config, 2, length, dtype)
    expected = bytes_needed(ours.config, length, dtype)
    feed(ours, cache, TOKENS[:, :length], [length // 2] if length > 1 else [])
    assert held_bytes(cache) == 2 * expected == sum(row.nbytes for row in cache.rows)
    for row in cache.rows:
        row.close()
    assert held_bytes(cache) == 0


@torch.inference_mode()
def test_a_sequence_cannot_outgrow_its_memory(model: Transformer) -> None:
    with pytest.raises(AssertionError, match="memory for"):
        feed(model, memory(model.config, 2, CHUNK - 1), TOKENS, [])


@torch.inference_mode()
def test_logits_of_chosen_states_are_those_of_the_forward(model: Transformer) -> None:
    states, everything = model.states(TOKENS), model(TOKENS)
    assert states.shape == (*TOKENS.shape, 32)
    torch.testing.assert_close(model.logits(states[:, 6]), everything[:, 6])


# Far positions


@pytest.mark.parametrize("start", [10_000_000 // CHUNK * CHUNK, 2**31 - 2**31 % CHUNK + CHUNK])
@torch.inference_mode()
def test_local_layers_at_ten_million_equal_those_at_zero_exactly(start: int) -> None:
    model = build(tiny(nope_layer_interval=None))
    near = feed(model, memory(model.config), TOKENS, [9])
    assert torch.equal(feed(model, memory(model.config), TOKENS, [9], start), near)
    # The same within a chunk, for a text that does not begin on a boundary.
    near = feed(model, memory(model.config), TOKENS, [9], 3)
    assert torch.equal(feed(model, memory(model.config), TOKENS, [9], start + 3), near)


@torch.inference_mode()
def test_global_layers_at_ten_million_differ_by_temperature_only() -> None:
    model = build(tiny(attn_temperature_tuning=False))
    start = 10_000_000 // CHUNK * CHUNK
    near = feed(model, memory(model.config), TOKENS, [9])
    assert torch.equal(feed(model, memory(model.config), TOKENS, [9], start), near)
    tuned = Transformer(tiny()).eval()
    tuned.load_state_dict(model.state_dict())
    assert (feed(tuned, memory(tuned.config), TOKENS, [9], start) - near).abs().max() > 0.1


# Reading chunks on their own


def one_global_layer() -> Transformer:
    return build(tiny(num_hidden_layers=5, nope_layer_interval=3))


@torch.inference_mode()
def test_read_gives_what_a_cached_forward_remembers() -> None:
    model = one_global_layer()
    ids = tokens(1, 4 * CHUNK)
    cache = memory(model.config, 1)
    model(ids, cache=cache)
    k, v = model.read(ids.view(4, CHUNK))
    torch.testing.assert_close(k.flatten(0, 1), cache.rows[0].remembered(2)[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(v.flatten(0, 1), cache.rows[0].remembered(2)[1], rtol=0, atol=1e-5)


@torch.inference_mode()
def test_reading_chunks_then_asking_equals_one_forward() -> None:
    model = one_global_layer()
    ids = tokens(1, 3 * CHUNK + 5)
    k, v = model.read(ids[:, : 3 * CHUNK].view(3, CHUNK))
    cache = memory(model.config, 1)
    cache.rows[0].remember(2, k.flatten(0, 1), v.flatten(0, 1), 0)
    answer = model(ids[:, 3 * CHUNK :], torch.arange(3 * CHUNK, 3 * CHUNK + 5)[None], cache)
    torch.testing.assert_close(answer, model(ids)[:, 3 * CHUNK :], **CLOSE)


@torch.inference_mode()
def test_padding_right_of_a_chunk_changes_nothing() -> None:
    model = one_global_layer()
    ids = tokens(2, CHUNK)
    k, v = model.read(ids)
    k_short, v_short = model.read(ids[:, :5])
    torch.testing.assert_close(k[:, :5], k_short)
    torch.testing.assert_close(v[:, :5], v_short)


# What sees what (spec §13)


def test_visible_rows_of_a_chunk_mask() -> None:
    positions = torch.arange(10)[None]
    mask = visible(positions, positions, 4)[0]
    assert {row: mask[row].nonzero().flatten().tolist() for row in (3, 5, 8)} == {3: [0, 1, 2, 3], 5: [4, 5], 8: [8]}
    assert torch.equal(visible(positions, positions, None)[0], torch.ones(10, 10).tril().bool())


def test_padding_is_neither_seen_nor_sees() -> None:
    queries, keys = torch.tensor([[-1, 5]]), torch.tensor([[-1, 0, 4, -1, 5, 6]])
    for chunk, seen in ((None, [1, 2, 4]), (4, [2, 4])):
        mask = visible(queries, keys, chunk)[0]
        assert not mask[0].any()
        assert mask[1].nonzero().flatten().tolist() == seen
