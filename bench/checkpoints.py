"""Llama 4 checkpoints with random weights, each as a Hugging Face folder and as GGUF files: what all peers can read.

Weights follow from the seed and a tensor's name alone. They are written tensor by tensor, so that memory stays small. A
file that is there is not written again.
"""

import json
import math
import zlib
from dataclasses import replace
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from herd.checkpoint import convert
from herd.checkpoint.files import ShardWriter, copy_companions, new_folder, write_json
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

_TYPES = {"F32": "fp32", "F16": "fp16", "Q8_0": "int8", "Q4_0": "int4"}  # llama.cpp's names and ours


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
    if not out.exists():
        convert(folder, out, format="gguf", dtype=_TYPES[kind])
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
