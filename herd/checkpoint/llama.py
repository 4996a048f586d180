"""A dense Llama checkpoint as a source of weights: Hugging Face folder here, GGUF file in `gguf_llama`.

Both give tensors by Hugging Face name with q/k rows in Hugging Face's half-rotation order.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from herd.checkpoint.files import WeightFiles, read_json
from herd.config import RopeScaling
from herd.errors import CheckpointError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a dense Llama decoder, in Hugging Face's field names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_id: tuple[int, ...]
    pad_token_id: int | None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the model and its shape."""
        D, F, V = self.hidden_size, self.intermediate_size, self.vocab_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        layer = {
            "input_layernorm": (D,),
            "post_attention_layernorm": (D,),
            "self_attn.q_proj": (q, D),
            "self_attn.k_proj": (kv, D),
            "self_attn.v_proj": (kv, D),
            "self_attn.o_proj": (D, q),
            "mlp.gate_proj": (F, D),
            "mlp.up_proj": (F, D),
            "mlp.down_proj": (D, F),
        }
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (V, D)
        for i in range(self.num_hidden_layers):
            shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
        return shapes


@dataclass(frozen=True)
class LlamaSource:
    """A checkpoint to read from: `tensor(name)` reads one, `files` are the tokenizer's files by name."""

    config: LlamaConfig
    tensor: Callable[[str], Tensor]
    files: dict[str, bytes]


def read_hf(folder: Path) -> LlamaSource:
    """A Hugging Face Llama folder. CheckpointError if it is another architecture or its tensors do not fit."""
    raw = read_json(folder / "config.json")
    config = _config(folder, raw)
    weights = WeightFiles(folder)
    if "lm_head.weight" not in weights.names:
        config = replace(config, tie_word_embeddings=True)
    shapes = config.shapes()
    ignored = {n for n in weights.names if n.endswith("rotary_emb.inv_freq")}  # a buffer that old versions stored
    if config.tie_word_embeddings:
        ignored.add("lm_head.weight")
    if missing := sorted(shapes.keys() - weights.names):
        raise CheckpointError(f"{folder} lacks {len(missing)} tensors, first {missing[0]}")
    if extra := sorted(weights.names - shapes.keys() - ignored):
        raise CheckpointError(f"{folder} has {len(extra)} tensors a Llama does not have, first {extra[0]}")
    for name, shape in shapes.items():
        if weights.shape(name) != shape:
            raise CheckpointError(f"{name} has shape {list(weights.shape(name))}; config.json says {list(shape)}")
    files = {name: (folder / name).read_bytes() for name in _TOKENIZER_FILES if (folder / name).is_file()}
    return LlamaSource(config, weights.tensor, files)


def _config(folder: Path, raw: dict[str, Any]) -> LlamaConfig:
    if raw.get("model_type") != "llama":
        raise CheckpointError(f"{folder} holds a {raw.get('model_type')!r} model; upcycling needs a dense 'llama' one")
    for name, wanted in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        if raw.get(name, wanted) != wanted:
            raise CheckpointError(f"{folder} has {name} = {raw[name]!r}; only {wanted!r} can be upcycled")
    rope = raw.get("rope_parameters") or {}
    scaling = raw.get("rope_scaling") or rope
    generation = read_json(folder / "generation_config.json") if (folder / "generation_config.json").exists() else {}
    eos = generation.get("eos_token_id", raw.get("eos_token_id"))
    try:
        heads, hidden = int(raw["num_attention_heads"]), int(raw["hidden_size"])
        return LlamaConfig(
            vocab_size=int(raw["vocab_size"]),
            hidden_size=hidden,
            intermediate_size=int(raw["intermediate_size"]),
            num_hidden_layers=int(raw["num_hidden_layers"]),
            num_attention_heads=heads,
            num_key_value_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=int(raw.get("head_dim") or hidden // heads),
            rms_norm_eps=float(raw["rms_norm_eps"]),
            rope_theta=float(raw.get("rope_theta") or rope.get("rope_theta") or 10000.0),
            rope_scaling=_scaling(folder, scaling),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            bos_token_id=raw.get("bos_token_id"),
            eos_token_id=tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),),
            pad_token_id=raw.get("pad_token_id"),
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{folder / 'config.json'} does not describe a Llama: {error!r}") from error


def _scaling(folder: Path, raw: dict[str, Any]) -> RopeScaling | None:
    kind = raw.get("rope_type", raw.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise CheckpointError(f"{folder} scales RoPE by {kind!r}; Llama 4 has only 'llama3' scaling or none")
    return RopeScaling(
        float(raw["factor"]),
        float(raw["low_freq_factor"]),
        float(raw["high_freq_factor"]),
        int(raw["original_max_position_embeddings"]),
    )
