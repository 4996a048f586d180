"""A dense Llama in a GGUF file as a source of weights: dequantised, renamed, rows in Hugging Face's order."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from herd.checkpoint.gguf_header import check_header
from herd.checkpoint.gguf_tokenizer import tokenizer_files
from herd.checkpoint.llama import LlamaConfig, LlamaSource, llama3_scaling
from herd.errors import CheckpointError

_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def read_gguf(path: Path) -> LlamaSource:
    """A GGUF file of architecture `llama`; tensors come dequantised, float16 and bfloat16 as stored.

    CheckpointError if the file is damaged, of another architecture, or its tensors do not fit its config.
    """
    fields, tensors = _open(path)
    config = _config(path, fields, tensors)
    shapes = config.shapes()
    if missing := sorted(gg for gg in map(_gguf_name, shapes) if gg not in tensors):
        raise CheckpointError(f"{path} lacks {len(missing)} tensors, first {missing[0]}")
    if extra := sorted(tensors.keys() - set(map(_gguf_name, shapes)) - {"rope_freqs.weight"}):
        raise CheckpointError(f"{path} has {len(extra)} tensors a dense Llama does not have, first {extra[0]}")
    for name, shape in shapes.items():
        stored = _shape(tensors[_gguf_name(name)])
        if stored != shape:
            raise CheckpointError(f"{path}: {_gguf_name(name)} has shape {list(stored)}, expected {list(shape)}")

    def tensor(name: str) -> Tensor:
        value = _dequantize(path, tensors[_gguf_name(name)], shapes[name])
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        # llama.cpp stores the rows of q and k as interleaved pairs; Hugging Face wants halves.
        return value if heads is None else pairs_to_halves(value, heads)

    return LlamaSource(config, tensor, tokenizer_files(path, fields))


def pairs_to_halves(w: Tensor, heads: int) -> Tensor:
    """Rows of each head from interleaved pairs (0, d/2, 1, d/2 + 1, ...) to halves (0, 1, ..., d - 1)."""
    return w.view(heads, -1, 2, w.shape[-1]).transpose(1, 2).reshape(w.shape)


def _open(path: Path) -> tuple[dict[str, Any], dict[str, gguf.ReaderTensor]]:
    """Metadata and tensors by name."""
    check_header(path)
    try:
        reader = gguf.GGUFReader(path)
        return {name: field.contents() for name, field in reader.fields.items()}, {t.name: t for t in reader.tensors}
    except (ValueError, IndexError, KeyError, OverflowError, TypeError, MemoryError) as error:
        raise CheckpointError(f"{path} is not a readable GGUF file: {error!r}") from error


def _gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in _TOP:
        return f"{_TOP[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{_NAMES[part]}.weight"


def _shape(tensor: gguf.ReaderTensor) -> tuple[int, ...]:
    return tuple(int(n) for n in reversed(tensor.shape))


def _dequantize(path: Path, tensor: gguf.ReaderTensor, shape: tuple[int, ...]) -> Tensor:
    kind = tensor.tensor_type
    try:
        if kind == gguf.GGMLQuantizationType.F16:
            return torch.from_numpy(np.array(tensor.data).view(np.float16)).view(shape)
        if kind == gguf.GGMLQuantizationType.BF16:
            return torch.from_numpy(np.array(tensor.data).view(np.int16)).view(torch.bfloat16).view(shape)
        values = np.array(gguf.quants.dequantize(tensor.data, kind), dtype=np.float32)
        return torch.from_numpy(values).view(shape)
    except (NotImplementedError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot dequantise {tensor.name} ({kind.name}): {error}") from error


def _config(path: Path, fields: dict[str, Any], tensors: dict[str, gguf.ReaderTensor]) -> LlamaConfig:
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise CheckpointError(f"{path} holds a {architecture!r} model; upcycling needs architecture 'llama'")
    if fields.get("llama.expert_count"):
        raise CheckpointError(f"{path} holds a mixture of experts already; upcycling needs a dense model")

    def number(name: str) -> Any:
        value = fields.get(f"llama.{name}")
        if not isinstance(value, int | float):
            raise CheckpointError(f"{path} lacks the number llama.{name}")
        return value

    heads, hidden = int(number("attention.head_count")), int(number("embedding_length"))
    head_dim = int(fields.get("llama.attention.key_length", hidden // max(heads, 1)))
    if "token_embd.weight" not in tensors:
        raise CheckpointError(f"{path} lacks the tensor token_embd.weight")
    if int(fields.get("llama.rope.dimension_count", head_dim)) != head_dim:
        raise CheckpointError(f"{path} rotates only part of each head; that cannot be upcycled")
    if fields.get("llama.rope.scaling.type", "none") != "none":
        raise CheckpointError(f"{path} scales RoPE by {fields['llama.rope.scaling.type']!r}; that cannot be upcycled")
    theta = _short(fields.get("llama.rope.freq_base", 10000.0))
    scaling = None
    if "rope_freqs.weight" in tensors:
        scaling = llama3_scaling(tensors["rope_freqs.weight"].data.astype(float).ravel().tolist(), theta)
        if scaling is None:
            raise CheckpointError(f"{path} scales RoPE by factors that are not the llama3 rule; it cannot be upcycled")
    eos = fields.get("tokenizer.ggml.eos_token_id")
    return LlamaConfig(
        vocab_size=_shape(tensors["token_embd.weight"])[0],
        hidden_size=hidden,
        intermediate_size=int(number("feed_forward_length")),
        num_hidden_layers=int(number("block_count")),
        num_attention_heads=heads,
        num_key_value_heads=int(fields.get("llama.attention.head_count_kv", heads)),
        head_dim=head_dim,
        rms_norm_eps=_short(number("attention.layer_norm_rms_epsilon")),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings="output.weight" not in tensors,
        bos_token_id=fields.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=() if eos is None else (int(eos),),
        pad_token_id=fields.get("tokenizer.ggml.padding_token_id"),
    )


def _short(value: float) -> float:
    """The decimal number that was stored as float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
