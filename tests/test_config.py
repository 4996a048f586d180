"""TextConfig: the presets' numbers (spec §1, §13), round trips through transformers, refusals with numbers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Llama4TextConfig

from herd.config import BEHEMOTH_ASSUMED, MAVERICK, PRESETS, SCOUT, RopeScaling, TextConfig
from herd.errors import ConfigError, HerdError
from herd.model import Transformer

TINY = TextConfig(
    vocab_size=31,
    hidden_size=16,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    intermediate_size=12,
    intermediate_size_mlp=20,
    num_local_experts=3,
    num_experts_per_tok=1,
    max_position_embeddings=64,
)


def same_model(a: TextConfig, b: TextConfig) -> bool:
    """Equal but for the way the layers' kinds are written down."""
    layers = range(a.num_hidden_layers)
    plain = {"moe_layers": None, "no_rope_layers": None, "interleave_moe_layer_step": 1, "nope_layer_interval": None}
    kinds = [[(c.is_local(i), c.is_moe(i)) for i in layers] for c in (a, b)]
    return kinds[0] == kinds[1] and replace(a, **plain) == replace(b, **plain)


# Spec §1.4 and §1.5


@pytest.mark.parametrize(
    ("cfg", "total", "active"),
    [
        (SCOUT, 107_769_861_120, 17_172_894_720),
        (MAVERICK, 400_711_848_960, 17_184_691_200),
        (BEHEMOTH_ASSUMED, 1_991_729_233_920, 288_506_265_600),
    ],
    ids=["scout", "maverick", "behemoth-assumed"],
)
def test_parameter_totals(cfg: TextConfig, total: int, active: int) -> None:
    assert cfg.num_parameters() == total
    assert cfg.num_parameters(active=True) == active
    with torch.device("meta"):
        model = Transformer(cfg)
    assert sum(p.numel() for p in model.parameters()) == total


def test_active_parameters_without_embeddings() -> None:
    matrix = 202048 * 5120
    assert SCOUT.num_parameters(active=True) - matrix == 16_138_408_960
    assert MAVERICK.num_parameters(active=True) - 2 * matrix == 15_115_719_680


def test_active_parameters_grow_by_one_expert_a_layer() -> None:
    one, two = (replace(TINY, num_experts_per_tok=k).num_parameters(active=True) for k in (1, 2))
    assert two - one == 6 * 3 * 16 * 12


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"interleave_moe_layer_step": 2, "num_experts_per_tok": 2},
        {"num_local_experts": 0},
        {"moe_layers": (1, 2, 5)},
    ],
)
def test_parameter_formula_equals_the_built_model(changes: dict[str, Any]) -> None:
    cfg = replace(TINY, **changes)
    assert sum(p.numel() for p in Transformer(cfg).parameters()) == cfg.num_parameters()


# Spec §1.2


def test_layer_map_of_scout_and_maverick() -> None:
    for cfg in (SCOUT, MAVERICK):
        assert cfg.global_layers == tuple(range(3, 48, 4))
        assert sum(cfg.is_local(i) for i in range(48)) == 36
    assert all(SCOUT.is_moe(i) for i in range(48))
    assert [i for i in range(48) if MAVERICK.is_moe(i)] == list(range(1, 48, 2))
    assert all(MAVERICK.is_moe(i) for i in MAVERICK.global_layers)
    assert (SCOUT.use_qk_norm, MAVERICK.use_qk_norm) == (True, False)
    assert (SCOUT.rope_scaling, MAVERICK.rope_scaling) == (RopeScaling(16, 1, 1, 8192), None)


def test_behemoth_is_labelled_as_an_assumption() -> None:
    assert [name for name, cfg in PRESETS.items() if cfg is BEHEMOTH_ASSUMED] == ["behemoth-assumed"]
    assert BEHEMOTH_ASSUMED.global_layers == tuple(range(3, 96, 4))


# Hugging Face's config.json

VARIANTS: dict[str, TextConfig] = {
    **PRESETS,
    "tiny": TINY,
    "tied": replace(TINY, tie_word_embeddings=True, bos_token_id=3, eos_token_id=(7,), pad_token_id=0),
    "explicit lists": replace(TINY, moe_layers=(0, 4), no_rope_layers=(0, 1, 1, 0, 1, 1)),
    "no global layer": replace(TINY, nope_layer_interval=None),
    "dense": replace(TINY, num_local_experts=0, interleave_moe_layer_step=0, attention_chunk_size=None),
    "experts but no MoE layer": replace(TINY, moe_layers=()),
    "old scaling": replace(TINY, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192), rope_theta=1e4),
    "temperature off": replace(TINY, attn_temperature_tuning=False, floor_scale=7, attn_scale=0.3),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip_through_json(name: str) -> None:
    cfg = VARIANTS[name]
    back = TextConfig.from_hf(json.loads(json.dumps(cfg.to_hf())))
    assert same_model(back, cfg)
    assert back.to_hf() == cfg.to_hf() | {"nope_layer_interval": back.nope_layer_interval}


@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip_through_transformers(name: str, tmp_path: Path) -> None:
    cfg = VARIANTS[name]
    (tmp_path / "config.json").write_text(json.dumps(cfg.to_hf()))
    theirs = Llama4TextConfig.from_pretrained(tmp_path)
    assert theirs.no_rope_layers == [int(cfg.is_local(i)) for i in range(cfg.num_hidden_layers)]
    assert theirs.moe_layers == [i for i in range(cfg.num_hidden_layers) if cfg.is_moe(i)]
    assert theirs.rope_parameters["rope_theta"] == cfg.rope_theta
    assert theirs.attention_chunk_size == cfg.attention_chunk_size
    assert same_model(TextConfig.from_hf(theirs.to_dict()), cfg)
    theirs.save_pretrained(tmp_path)
    assert same_model(TextConfig.from_hf(json.loads((tmp_path / "config.json").read_text())), cfg)


def v4_scout() -> dict[str, Any]:
    """Scout's config.json as transformers 4.51 wrote it (values of spec §1.1)."""
    raw = {name: getattr(SCOUT, name) for name in (f for f in SCOUT.to_hf() if hasattr(SCOUT, f))}
    for name in ("moe_layers", "nope_layer_interval", "attn_temperature_tuning", "floor_scale", "attn_scale"):
        del raw[name]
    scaling = {"factor": 16.0, "high_freq_factor": 1.0, "low_freq_factor": 1.0, "rope_type": "llama3"}
    raw |= {"rope_scaling": scaling | {"original_max_position_embeddings": 8192}, "no_rope_layers": []}
    raw |= {"eos_token_id": [200001, 200007, 200008], "router_aux_loss_coef": 0.001, "for_llm_compressor": False}
    return raw | {"model_type": "llama4_text", "hidden_act": "silu", "attention_bias": False, "torch_dtype": "bfloat16"}


def test_v4_style() -> None:
    raw = v4_scout()
    assert TextConfig.from_hf(raw) == SCOUT
    assert TextConfig.from_hf(raw | {"attn_temperature_tuning": 4}) == SCOUT
    untyped = {k: v for k, v in raw["rope_scaling"].items() if k != "rope_type"}
    assert TextConfig.from_hf(raw | {"rope_scaling": untyped}) == SCOUT
    assert TextConfig.from_hf(raw | {"rope_scaling": untyped | {"type": "llama3"}}) == SCOUT
    assert TextConfig.from_hf(raw | {"rope_scaling": None}).rope_scaling is None


def test_v5_style() -> None:
    raw = v4_scout()
    scaling = raw.pop("rope_scaling")
    raw |= {"rope_parameters": scaling | {"rope_theta": raw.pop("rope_theta")}}
    raw |= {"no_rope_layer_interval": 4, "layer_types": (["chunked_attention"] * 3 + ["full_attention"]) * 12}
    assert TextConfig.from_hf(raw) == SCOUT
    plain = raw | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    assert TextConfig.from_hf(plain) == replace(SCOUT, rope_scaling=None, rope_theta=1e4)


def test_multimodal_config() -> None:
    raw = {"model_type": "llama4", "vision_config": {"hidden_size": 1408}, "text_config": v4_scout()}
    assert TextConfig.from_hf(raw) == SCOUT


def test_llama_guard_4_style() -> None:
    """Dense: as transformers' converter writes it, with no experts, step 0, an empty list and a large interval."""
    raw = TINY.to_hf() | {"num_local_experts": 0, "interleave_moe_layer_step": 0, "moe_layers": []}
    del raw["nope_layer_interval"]
    raw |= {"no_rope_layers": [], "no_rope_layer_interval": 80, "attention_chunk_size": None}
    cfg = TextConfig.from_hf(raw)
    assert not any(cfg.is_moe(i) for i in range(6))
    assert cfg.global_layers == ()
    assert cfg.attention_chunk_size is None
    theirs = Llama4TextConfig.from_dict(raw)
    assert (theirs.moe_layers, theirs.no_rope_layers) == ([], [1] * 6)


def test_lists_mean_what_they_mean_to_transformers() -> None:
    raw = TINY.to_hf()
    del raw["nope_layer_interval"]
    for changes in (
        {"no_rope_layers": [], "no_rope_layer_interval": 2},
        {"no_rope_layers": None, "moe_layers": None, "interleave_moe_layer_step": 3},
        {"moe_layers": []},
        {"moe_layers": [5]},
    ):
        cfg, theirs = TextConfig.from_hf(raw | changes), Llama4TextConfig.from_dict(raw | changes)
        assert [int(cfg.is_local(i)) for i in range(6)] == theirs.no_rope_layers
        assert [i for i in range(6) if cfg.is_moe(i)] == theirs.moe_layers


def test_full_attention_everywhere_is_a_null_chunk() -> None:
    raw = TINY.to_hf() | {"no_rope_layers": [1] * 6, "layer_types": ["full_attention"] * 6}
    assert TextConfig.from_hf(raw).attention_chunk_size is None


def test_tokens_are_kept() -> None:
    raw = TINY.to_hf()
    assert TextConfig.from_hf(raw | {"eos_token_id": 5}).eos_token_id == (5,)
    assert TextConfig.from_hf(raw | {"eos_token_id": [5, 6]}).eos_token_id == (5, 6)
    assert TextConfig.from_hf(raw | {"eos_token_id": None}).eos_token_id == ()
    assert replace(TINY, eos_token_id=(5, 6)).to_hf()["eos_token_id"] == [5, 6]


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": "16"}, "hidden_size is '16'"),
        ({"vocab_size": -3}, "vocab_size is -3"),
        ({"floor_scale": 0}, "floor_scale is 0"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "4 query heads cannot share 3"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"attention_chunk_size": 0}, "attention_chunk_size is 0"),
        ({"nope_layer_interval": 0}, "nope_layer_interval is 0"),
        ({"interleave_moe_layer_step": 0}, "interleave_moe_layer_step is 0"),
        ({"no_rope_layers": (1, 0)}, "lists 2 layers, the model has 6"),
        ({"moe_layers": (2, 6)}, r"moe_layers names layers \[6\]; the model has layers 0 to 5"),
        ({"num_experts_per_tok": 4}, "num_experts_per_tok is 4 of 3 experts"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0 of 3 experts"),
        ({"num_local_experts": 0, "moe_layers": (1,)}, "num_experts_per_tok is 1 of 0 experts"),
        ({"intermediate_size": 0}, "intermediate_size is 0"),
        ({"num_local_experts": 0, "intermediate_size_mlp": 0}, "intermediate_size_mlp is 0"),
    ],
)
def test_bad_values_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(TINY, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"head_dim": None, "vocab_size": None}, "lacks vocab_size, head_dim"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "rope scaling lacks 'low_freq_factor'"),
        ({"rope_scaling": RopeScaling(8.0, 1.0, 4.0, 8192).to_hf() | {"factor": 0}}, "positive"),
        ({"rope_scaling": RopeScaling(8.0, 1.0, 4.0, 8192).to_hf() | {"low_freq_factor": 5.0}}, "4.0 below .* 5.0"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"layer_types": ["chunked_attention"] * 5 + ["full_attention"]}, "layer_types"),
    ],
)
def test_foreign_files_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        TextConfig.from_hf(TINY.to_hf() | changes)
    assert isinstance(caught.value, HerdError)
    assert "\n" not in str(caught.value)
