"""Tiny packed folders."""

from pathlib import Path

from herd import checkpoint
from herd.config import TextConfig
from herd.model import Transformer
from tests.model.tiny_models import build, tiny

# Local and global, dense and expert layers; heads that the native library takes, and widths that are no whole panels.
CONFIG = tiny(
    hidden_size=72,
    num_hidden_layers=5,
    head_dim=64,
    intermediate_size=40,
    intermediate_size_mlp=104,
    num_experts_per_tok=2,
    moe_layers=(1, 3, 4),
    no_rope_layers=(1, 1, 0, 1, 0),
    attention_chunk_size=40,
)
EXPERTS = 12  # of all layers


def plain_folder(folder: Path, cfg: TextConfig = CONFIG) -> Transformer:
    """A model whose numbers bfloat16 can hold, and its Hugging Face folder, in float32."""
    model = build(cfg).bfloat16().float()
    checkpoint.save(model, folder)
    return model


def pack_folder(source: Path, out: Path, formats: str) -> Path:
    checkpoint.convert(source, out, format="herd", dtype=formats)
    return out
