"""Logits equal those of Hugging Face's Llama4ForCausalLM, which we did not write, for every switch of the config.

What transformers 5.23 cannot express, so that another way of saying the same stands in for it here:
- attention_chunk_size null: its chunked mask raises ValueError; a chunk longer than the text is the same function.
- nope_layer_interval null: it has no such value; `to_hf` writes the list of RoPE flags, all 1.
- positions: temperature counts from the cache's length, whatever position_ids say, so its texts start at 0.
Its eager attention takes the softmax in the model's dtype (float32 here); its flash attention cannot do chunks.
"""

from typing import Any

import pytest
import torch
from transformers import Llama4ForCausalLM, Llama4TextConfig

from herd.config import RopeScaling, TextConfig
from herd.model import Transformer
from tests.model.tiny_models import CHUNK, LENGTHS, build, memory, tiny, tokens

LLAMA_GUARD_4_LIKE = {
    "attention_chunk_size": None,
    "nope_layer_interval": None,
    "num_local_experts": 0,
    "interleave_moe_layer_step": 0,
}
SWITCHES: dict[str, dict[str, Any]] = {
    "scout-like": {"rope_scaling": RopeScaling(16.0, 1.0, 1.0, 32)},
    "maverick-like": {"interleave_moe_layer_step": 2, "use_qk_norm": False},
    "llama-guard-4-like": LLAMA_GUARD_4_LIKE,
    "first scout's rope scaling": {"rope_scaling": RopeScaling(8.0, 1.0, 4.0, 64)},
    "no qk norm": {"use_qk_norm": False},
    "no temperature": {"attn_temperature_tuning": False},
    "temperature at every token": {"floor_scale": 1},
    "steep temperature": {"attn_scale": 1.5},
    "explicit MoE layers": {"moe_layers": (0, 3)},
    "explicit MoE layers, none": {"moe_layers": ()},
    "explicit RoPE layers": {"no_rope_layers": (0, 1, 1, 0)},
    "all layers local": {"nope_layer_interval": None},
    "every second layer global": {"nope_layer_interval": 2},
    "all layers global": {"nope_layer_interval": 1},
    "null chunk": {"attention_chunk_size": None},
    "chunk 3": {"attention_chunk_size": 3},
    "chunk 1": {"attention_chunk_size": 1},
    "top-2": {"num_experts_per_tok": 2},
    "all experts": {"num_experts_per_tok": 4},
    "one expert": {"num_local_experts": 1},
    "one kv head": {"num_key_value_heads": 1},
    "as many kv heads as query heads": {"num_key_value_heads": 4},
    "three query heads to a kv head": {"num_attention_heads": 6},
    "wide heads": {"head_dim": 16},
    "tied head": {"tie_word_embeddings": True},
    "large eps": {"rms_norm_eps": 0.1},
    "theta": {"rope_theta": 500000.0},
}


def reference(cfg: TextConfig, weights: dict[str, torch.Tensor]) -> Llama4ForCausalLM:
    raw = cfg.to_hf()
    if raw["attention_chunk_size"] is None:
        raw["attention_chunk_size"] = 10**6
    model = Llama4ForCausalLM._from_config(Llama4TextConfig.from_dict(raw), attn_implementation="eager")
    model.load_state_dict(weights, strict=True)
    return model.eval()


def pair(cfg: TextConfig) -> tuple[Transformer, Llama4ForCausalLM]:
    model = build(cfg)
    return model, reference(cfg, model.state_dict())


@pytest.mark.parametrize("switch", SWITCHES)
@torch.inference_mode()
def test_logits_equal_transformers(switch: str) -> None:
    model, theirs = pair(tiny(**SWITCHES[switch]))
    for length in LENGTHS:
        ids = tokens(2, length)
        expected = theirs(ids, use_cache=False).logits
        assert expected.std() > 0.5, "logits are large enough for a difference to show"
        for cache in (None, memory(model.config)):
            logits = model(ids, cache=cache)
            assert logits.dtype == torch.float32
            assert (logits - expected).abs().max() <= 1e-4


# The other switches change the weights' shapes, which load_state_dict(strict=True) has compared.
SHAPES = {"moe_layers", "num_local_experts", "interleave_moe_layer_step", "num_key_value_heads", "head_dim"}
SHAPES |= {"num_attention_heads", "tie_word_embeddings"}


@pytest.mark.parametrize("switch", [name for name, changes in SWITCHES.items() if not SHAPES & changes.keys()])
@torch.inference_mode()
def test_every_switch_counts(switch: str) -> None:
    """The comparison above would notice a switch that is ignored: with the same weights, the logits differ."""
    base = build(tiny())
    changed = Transformer(tiny(**SWITCHES[switch])).eval()
    changed.load_state_dict(base.state_dict())
    ids = tokens(1, LENGTHS[-1])
    assert (changed(ids) - base(ids)).abs().max() > 1e-2


@torch.inference_mode()
def test_null_chunk_is_not_a_chunk() -> None:
    model = build(tiny())
    whole = Transformer(tiny(attention_chunk_size=None)).eval()
    whole.load_state_dict(model.state_dict())
    ids = tokens(1, CHUNK + 3)
    difference = (whole(ids) - model(ids)).abs().amax((0, 2))
    assert (difference[:CHUNK] < 1e-5).all()
    assert (difference[CHUNK:] > 1e-2).all()
