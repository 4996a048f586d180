"""The decoder as a whole: names, dtypes, causality, training, reading."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from herd.errors import ConfigError
from herd.model import Transformer
from herd.model.attention import Attention, causal_attention
from herd.model.cache import visible
from tests.model.tiny_models import CHUNK, build, memory, tiny, tokens


def test_parameter_names_are_those_of_the_checkpoints() -> None:
    names = {name for name, _ in Transformer(tiny(interleave_moe_layer_step=2, num_hidden_layers=2)).named_parameters()}
    attention = {f"self_attn.{x}_proj.weight" for x in "qkvo"}
    norms = {"input_layernorm.weight", "post_attention_layernorm.weight"}
    dense = {f"feed_forward.{x}_proj.weight" for x in ("gate", "up", "down")}
    moe = {f"feed_forward.shared_expert.{x}_proj.weight" for x in ("gate", "up", "down")}
    moe |= {"feed_forward.router.weight", "feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"}
    expected = {f"model.layers.0.{n}" for n in attention | norms | dense}
    expected |= {f"model.layers.1.{n}" for n in attention | norms | moe}
    assert names == expected | {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


def test_a_tied_head_is_one_parameter() -> None:
    model = Transformer(tiny(tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())


@torch.inference_mode()
def test_a_token_never_changes_what_stands_before_it() -> None:
    model = build(tiny())
    ids = tokens(1, 3 * CHUNK)
    logits = model(ids)
    for changed in (0, CHUNK - 1, CHUNK, 2 * CHUNK + 3):
        other = ids.clone()
        other[0, changed] = (other[0, changed] + 1) % 97
        difference = (model(other) - logits).abs().amax(-1)[0]
        assert (difference[:changed] < 1e-5).all()
        assert difference[changed] > 1e-3


@torch.inference_mode()
def test_in_a_local_model_a_chunk_knows_nothing_of_others() -> None:
    model = build(tiny(nope_layer_interval=None))
    ids = tokens(1, 3 * CHUNK)
    alone = torch.cat([model(ids[:, i : i + CHUNK]) for i in range(0, 3 * CHUNK, CHUNK)], 1)
    torch.testing.assert_close(model(ids), alone, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_rows_of_a_batch_are_independent() -> None:
    model, ids = build(tiny()), tokens(3, CHUNK + 3)
    torch.testing.assert_close(model(ids), torch.cat([model(row[None]) for row in ids]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("chunk", [None, 1, 4, 7, 29, 100])
@pytest.mark.parametrize("length", [1, 4, 8, 29, 200])
@pytest.mark.parametrize("training", [False, True])
def test_causal_attention_equals_a_mask(chunk: int | None, length: int, training: bool) -> None:
    """Whole sequences are folded into rows of chunks; a plain mask says what that must give, with gradients or not."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, length, heads, 6, generator=generator) for heads in (4, 2, 2))
    positions = torch.arange(length).expand(2, -1)
    mask = visible(positions, positions, chunk)[:, None]
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, enable_gqa=True
    )
    with torch.set_grad_enabled(training):
        out = causal_attention(q, k, v, chunk)
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_query_heads_share_neighbouring_kv_heads() -> None:
    """Head h uses kv head h // group (spec §2.3): silencing the last kv head's values silences the last heads."""
    attention = Attention(tiny(), 3)
    attention.v_proj.weight[8:] = 0
    torch.nn.init.eye_(attention.o_proj.weight)
    out = attention(torch.randn(1, 5, 32), torch.arange(5)[None], None)
    assert (out[..., :16] != 0).all() and (out[..., 16:] == 0).all()


@torch.inference_mode()
def test_bfloat16_stays_near_float32() -> None:
    model, ids = build(tiny()), tokens(1, CHUNK)
    expected = model(ids)
    logits = model.bfloat16()(ids)
    assert logits.dtype == torch.float32
    # One token routed to another expert would be fair; most logits agree to bfloat16's precision.
    assert (logits - expected).abs().median() < 0.05
    assert model(ids, cache=memory(model.config, 1, CHUNK, torch.bfloat16)).dtype == torch.float32


def test_every_weight_is_trained() -> None:
    model, ids = build(tiny(num_experts_per_tok=2)), tokens(4, 3 * CHUNK + 1)
    with torch.inference_mode():
        model(ids)  # what a first forward leaves behind must not break training
    cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all() and (weight.grad != 0).any(), name


def test_a_few_steps_learn() -> None:
    model, ids = build(tiny(tie_word_embeddings=True)), tokens(2, 2 * CHUNK)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(12):
        loss = cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("changes", [{"nope_layer_interval": None}, {"nope_layer_interval": 2}])
def test_reading_needs_exactly_one_global_layer(changes: dict[str, int | None]) -> None:
    model = Transformer(tiny(**changes))
    with pytest.raises(ConfigError, match=f"one global layer, this model has {len(model.config.global_layers)}"):
        model.read(tokens(1, CHUNK))


@torch.inference_mode()
def test_reading_stops_at_the_keys_of_the_global_layer() -> None:
    model = build(tiny(num_hidden_layers=5, nope_layer_interval=3))
    ran: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    model.read(tokens(3, CHUNK))
    layers = {name.split(".")[2] for name in ran if name.startswith("model.layers.")}
    assert layers == {"0", "1", "2"}
    used = {"input_layernorm", "self_attn.k_proj", "self_attn.v_proj"}
    assert {name for name in ran if name.startswith("model.layers.2")} == {f"model.layers.2.{n}" for n in used}
    assert not {"lm_head", "model.norm"} & set(ran)


def test_reading_more_than_a_chunk_in_a_row_is_refused() -> None:
    model = build(tiny(num_hidden_layers=5, nope_layer_interval=3))
    with pytest.raises(AssertionError, match="at most one chunk"):
        model.read(tokens(1, CHUNK + 1))
