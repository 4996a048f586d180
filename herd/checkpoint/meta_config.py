"""Meta's params.json (spec §6.2) as a configuration."""

from pathlib import Path
from typing import Any

from herd.checkpoint.files import read_json
from herd.checkpoint.shapes import MAX_LAYERS
from herd.config import SCOUT, RopeScaling, TextConfig, VisionConfig
from herd.errors import ConfigError

PARAMS = "params.json"


def read_params(folder: Path, vocab_size: int) -> tuple[TextConfig, VisionConfig | None]:
    """What params.json says, which is not the vocabulary's size. ConfigError if it describes no Llama 4.

    What it leaves open: use_scaled_rope means a factor of 16 and a hard threshold, as in Meta's code (§1.1);
    temperature is on, as in Hugging Face's configuration (§2.5); and the number of positions is that of the instruct
    models, Scout's if RoPE is scaled and Maverick's if not.
    """
    raw = read_json(folder / PARAMS)
    try:
        raw = raw.get("model", raw)
        if raw["n_layers"] > MAX_LAYERS:
            raise ConfigError(
                f"{folder / PARAMS} asks for {raw['n_layers']:,} layers; at most {MAX_LAYERS:,} can be read"
            )
        return _text(raw, vocab_size), _vision(raw.get("vision_args"))
    except KeyError as missing:
        raise ConfigError(f"{folder / PARAMS} lacks {missing}") from None
    except (TypeError, ValueError, AttributeError, OverflowError, ZeroDivisionError) as error:
        raise ConfigError(f"{folder / PARAMS} does not describe a Llama 4: {error!r}") from error


def _text(raw: dict[str, Any], vocab_size: int) -> TextConfig:
    moe = raw.get("moe_args") or {}
    scaled = bool(raw.get("use_scaled_rope", False))
    ids = (SCOUT.bos_token_id, SCOUT.eos_token_id, SCOUT.pad_token_id)
    bos, eos, pad = ids if vocab_size == SCOUT.vocab_size else (None, (), None)
    return TextConfig(
        vocab_size=vocab_size,
        hidden_size=raw["dim"],
        num_hidden_layers=raw["n_layers"],
        num_attention_heads=raw["n_heads"],
        num_key_value_heads=raw.get("n_kv_heads") or raw["n_heads"],
        head_dim=raw.get("head_dim") or raw["dim"] // raw["n_heads"],
        intermediate_size=_expert_width(raw, moe) if moe else 0,
        intermediate_size_mlp=_dense_width(raw),
        num_local_experts=moe.get("num_experts", 0),
        num_experts_per_tok=moe.get("top_k", 1),
        max_position_embeddings=10_485_760 if scaled else 1_048_576,
        interleave_moe_layer_step=moe.get("interleave_moe_layer_step", 1),
        nope_layer_interval=raw.get("nope_layer_interval"),
        attention_chunk_size=raw.get("attention_chunk_size"),
        rope_theta=float(raw.get("rope_theta", 500000.0)),
        rope_scaling=_scaling(raw) if scaled else None,
        use_qk_norm=bool(raw.get("use_qk_norm", False)),
        rms_norm_eps=float(raw.get("norm_eps", 1e-5)),
        attn_temperature_tuning=bool(raw.get("attn_temperature_tuning", True)),
        floor_scale=int(raw.get("floor_scale", 8192)),
        attn_scale=float(raw.get("attn_scale", 0.1)),
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
    )


def _scaling(raw: dict[str, Any]) -> RopeScaling:
    factor, high = raw.get("rope_scaling_factor") or 16, raw.get("rope_high_freq_factor") or 1
    return RopeScaling(float(factor), 1.0, float(high), 8192)


def _dense_width(raw: dict[str, Any]) -> int:
    """Of a dense layer (spec §1.3)."""
    width = int(raw.get("ffn_dim_multiplier", 1.0) * int(2 * 4 * raw["dim"] / 3))
    return _rounded(width, raw.get("multiple_of", 256))


def _expert_width(raw: dict[str, Any], moe: dict[str, Any]) -> int:
    """Of an expert: halved, so that one expert and the shared one cost as much as a dense layer."""
    width = int(raw.get("ffn_dim_multiplier", 1.0) * int(2 * int(raw.get("ffn_exp", 4.0) * raw["dim"]) / 3))
    if moe.get("auto_scale_F", True):
        width = int(width / (moe.get("capacity_factor", 1.0) + 1))
    return _rounded(width, raw.get("multiple_of", 256))


def _rounded(width: int, multiple: int) -> int:
    return -(-width // multiple) * multiple


def _vision(raw: dict[str, Any] | None) -> VisionConfig | None:
    if raw is None:
        return None
    tile, patch = (raw[name]["height"] for name in ("image_size", "patch_size"))
    return VisionConfig(
        hidden_size=raw["dim"],
        num_hidden_layers=raw["n_layers"],
        num_attention_heads=raw["n_heads"],
        intermediate_size=int(raw["dim"] * raw["mlp_ratio"]),
        image_size=tile,
        patch_size=patch,
        pixel_shuffle_ratio=float(raw["pixel_shuffle_ratio"]),
        vision_output_dim=raw["output_dim"],
        projector_input_dim=raw["output_dim"],
        projector_output_dim=raw["output_dim"],
    )
