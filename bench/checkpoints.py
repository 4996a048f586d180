"""Llama 4 checkpoints with random weights, each as a Hugging Face folder and as GGUF files: what all peers can read.

Weights follow from the seed and a tensor's name alone. They are written tensor by tensor, so that memory stays small. A
file that is there is not written again.
"""

import json
import math
import os
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
import torch
from gguf import GGMLQuantizationType
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from herd.checkpoint import read_config
from herd.checkpoint.files import ShardWriter, WeightFiles, copy_companions, new_folder, read_json, write_json
from herd.config import TextConfig
from herd.model import Transformer

SHARD_BYTES = 512 << 20
SEED = 4

# The shape of the model that ships with Herd, with more experts: one global layer.
SMALL = TextConfig(
    vocab_size=49152,
    hidden_size=512,
    num_hidden_layers=7,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    intermediate_size=1280,
    intermediate_size_mlp=2560,
    num_local_experts=16,
    num_experts_per_tok=1,
    max_position_embeddings=1 << 18,
)
# The shape of Scout, smaller: a quarter of the layers is global.
MID = replace(
    SMALL,
    hidden_size=1024,
    num_hidden_layers=16,
    head_dim=128,
    intermediate_size=2304,
    intermediate_size_mlp=4608,
)
# For the comparison of logits: local and global, dense and expert layers, more than one chunk.
TINY = replace(
    SMALL,
    vocab_size=512,
    hidden_size=128,
    num_hidden_layers=6,
    num_attention_heads=4,
    head_dim=32,
    intermediate_size=64,
    intermediate_size_mlp=128,
    interleave_moe_layer_step=2,
)
MODELS = {"tiny": TINY, "small": SMALL, "mid": MID}

_KINDS = {
    "F32": GGMLQuantizationType.F32,
    "F16": GGMLQuantizationType.F16,
    "Q8_0": GGMLQuantizationType.Q8_0,
    "Q4_0": GGMLQuantizationType.Q4_0,
}
_TOP = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}
_LAYER = {
    "input_layernorm.weight": "attn_norm",
    "self_attn.q_proj.weight": "attn_q",
    "self_attn.k_proj.weight": "attn_k",
    "self_attn.v_proj.weight": "attn_v",
    "self_attn.o_proj.weight": "attn_output",
    "post_attention_layernorm.weight": "ffn_norm",
    "feed_forward.gate_proj.weight": "ffn_gate",
    "feed_forward.up_proj.weight": "ffn_up",
    "feed_forward.down_proj.weight": "ffn_down",
    "feed_forward.router.weight": "ffn_gate_inp",
    "feed_forward.shared_expert.gate_proj.weight": "ffn_gate_shexp",
    "feed_forward.shared_expert.up_proj.weight": "ffn_up_shexp",
    "feed_forward.shared_expert.down_proj.weight": "ffn_down_shexp",
}


def write_folder(cfg: TextConfig, out: Path, *, companions: Path | None = None, dtype: torch.dtype) -> Path:
    """The checkpoint as a Hugging Face folder. companions: whose tokenizer it gets; None: one token for each byte."""
    if out.exists():
        return out
    with new_folder(out) as folder:
        writer = ShardWriter(folder, SHARD_BYTES)
        with torch.device("meta"):
            shapes = {name: p.shape for name, p in Transformer(cfg).named_parameters()}
        for name, shape in shapes.items():
            writer.add(name, _random(name, shape, dtype))
        writer.finish()
        write_json(folder / "config.json", {**cfg.to_hf(), "dtype": str(dtype).removeprefix("torch.")})
        if companions is None:
            write_byte_tokenizer(folder, cfg.vocab_size)
        else:
            copy_companions(companions, folder)
    return out


def write_gguf(folder: Path, out: Path, kind: str) -> Path:
    """The checkpoint in `folder` as a GGUF file of architecture llama4, all matrices in `kind`."""
    if out.exists():
        return out
    cfg, partial = read_config(folder), out.with_name(f"{out.name}.{os.getpid()}.partial")
    writer = gguf.GGUFWriter(partial, "llama4")
    add_settings(writer, cfg)
    add_vocabulary(writer, read_json(folder / "tokenizer.json"), cfg.vocab_size)
    with WeightFiles(folder) as weights:
        names = sorted(weights.names)
        for name in names:
            for gguf_name, shape in _renamed_shapes(name, weights.shape(name)):
                add_info(writer, gguf_name, shape, _kind_of(gguf_name, shape, kind))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name in names:
            for gguf_name, part in _renamed(name, weights.tensor(name)):
                array = part.float().contiguous().numpy()
                writer.write_tensor_data(gguf.quants.quantize(array, _kind_of(gguf_name, array.shape, kind)))
    writer.close()
    partial.rename(out)
    return out


def _random(name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Normal numbers that keep activations near 1: norms about 1, the others by their number of inputs."""
    generator = torch.Generator().manual_seed(SEED << 32 | zlib.crc32(name.encode()))
    x = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return (1 + 0.1 * x).to(dtype)
    if "embed_tokens" in name:
        return x.to(dtype)
    inputs = shape[1]  # matrices are [out, in], experts [E, in, out]
    return x.div_(math.sqrt(inputs)).to(dtype)


def _renamed(name: str, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor by llama.cpp's name: gate and up of experts apart, all experts as [E, out, in]."""
    if name in _TOP:
        yield f"{_TOP[name]}.weight", x
        return
    _, _, layer, rest = name.split(".", 3)
    if rest == "feed_forward.experts.gate_up_proj":
        gate, up = x.transpose(1, 2).chunk(2, 1)
        yield f"blk.{layer}.ffn_gate_exps.weight", gate
        yield f"blk.{layer}.ffn_up_exps.weight", up
    elif rest == "feed_forward.experts.down_proj":
        yield f"blk.{layer}.ffn_down_exps.weight", x.transpose(1, 2)
    else:
        yield f"blk.{layer}.{_LAYER[rest]}.weight", x


def _renamed_shapes(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    for gguf_name, part in _renamed(name, torch.empty(shape, device="meta")):
        yield gguf_name, tuple(part.shape)


def _kind_of(gguf_name: str, shape: tuple[int, ...], kind: str) -> GGMLQuantizationType:
    """Norms and routers stay in 32 bits, as llama.cpp's own converter has it."""
    return _KINDS["F32" if len(shape) == 1 or "ffn_gate_inp" in gguf_name else kind]


def add_info(writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> None:
    """Announce a tensor. They are all announced before the first is written."""
    types: dict[GGMLQuantizationType, Any] = {_KINDS["F32"]: np.float32, _KINDS["F16"]: np.float16}
    if kind in types:
        dtype = np.dtype(types[kind])
        writer.add_tensor_info(name, shape, dtype, math.prod(shape) * dtype.itemsize)
    else:
        packed = gguf.quant_shape_to_byte_shape(shape, kind)
        writer.add_tensor_info(name, packed, np.dtype(np.uint8), math.prod(packed), raw_dtype=kind)


def add_settings(writer: gguf.GGUFWriter, cfg: TextConfig) -> None:
    """llama.cpp itself sets what has no key: chunks of 8192, every fourth layer global, temperature, QK-norm."""
    assert (cfg.attention_chunk_size, cfg.nope_layer_interval, cfg.use_qk_norm) == (8192, 4, True)
    for i in range(cfg.num_hidden_layers):
        assert cfg.is_local(i) == bool((i + 1) % 4) and cfg.is_moe(i) == ((i + 1) % cfg.interleave_moe_layer_step == 0)
    assert cfg.rope_scaling is None, "its factors are not written"
    writer.add_block_count(cfg.num_hidden_layers)
    writer.add_context_length(cfg.max_position_embeddings)
    writer.add_embedding_length(cfg.hidden_size)
    writer.add_feed_forward_length(cfg.intermediate_size_mlp)
    writer.add_expert_feed_forward_length(cfg.intermediate_size)
    writer.add_head_count(cfg.num_attention_heads)
    writer.add_head_count_kv(cfg.num_key_value_heads)
    writer.add_key_length(cfg.head_dim)
    writer.add_value_length(cfg.head_dim)
    writer.add_layer_norm_rms_eps(cfg.rms_norm_eps)
    writer.add_rope_freq_base(cfg.rope_theta)
    writer.add_rope_dimension_count(cfg.head_dim)
    writer.add_expert_count(cfg.num_local_experts)
    writer.add_expert_used_count(cfg.num_experts_per_tok)
    writer.add_interleave_moe_layer_step(cfg.interleave_moe_layer_step)
    writer.add_vocab_size(cfg.vocab_size)


def add_vocabulary(writer: gguf.GGUFWriter, core: dict[str, Any], size: int) -> None:
    """core: a tokenizer.json."""
    vocab = {**core["model"]["vocab"], **{token["content"]: token["id"] for token in core["added_tokens"]}}
    tokens = sorted(vocab, key=vocab.__getitem__)
    assert [vocab[t] for t in tokens] == list(range(size)), f"{len(tokens)} tokens for {size} embeddings"
    special = {token["content"] for token in core["added_tokens"] if token["special"]}
    pairs = core["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([control if token in special else normal for token in tokens])
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in pairs])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


def write_byte_tokenizer(folder: Path, size: int) -> None:
    """One token for each byte, one merge (llama.cpp wants some), and special tokens that fill the vocabulary."""
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "aa"]
    vocab = {token: i for i, token in enumerate(alphabet)}
    core = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("a", "a")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([f"<|{i}|>" for i in range(len(alphabet), size)])
    core.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": f"<|{size - 1}|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
