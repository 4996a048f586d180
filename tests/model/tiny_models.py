"""Tiny configurations and models with random weights that make every part of the architecture count."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from herd.config import TextConfig
from herd.model import KVCache, Transformer
from herd.model.cache import KVRows

CHUNK = 8
LENGTHS = (CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5)

BASE = TextConfig(
    vocab_size=97,
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=48,
    intermediate_size_mlp=88,
    num_local_experts=4,
    num_experts_per_tok=1,
    max_position_embeddings=1024,
    attention_chunk_size=CHUNK,
    rope_theta=100.0,
    floor_scale=5,
    attn_scale=0.4,
)


def tiny(**changes: Any) -> TextConfig:
    return replace(BASE, **changes)


def build(cfg: TextConfig, seed: int = 0) -> Transformer:
    """A model whose attention, routing and logits (spread about 1 to 3) depend clearly on everything."""
    torch.manual_seed(seed)
    model = Transformer(cfg).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(weight, mean=1.0, std=0.3)
        else:
            # Experts are stored [in, out], everything else [out, in].
            fan_in = weight.shape[-2] if "experts" in name else weight.shape[-1]
            sharp = 2.0 if "router" in name or "q_proj" in name or "k_proj" in name else 1.0
            torch.nn.init.normal_(weight, std=sharp * fan_in**-0.5)
    return model


def tokens(rows: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(BASE.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def memory(cfg: TextConfig, rows: int = 2, tokens: int = 64, dtype: torch.dtype = torch.float32) -> KVRows:
    """An empty cache for a batch of so many sequences of at most so many tokens."""
    cache = KVCache(cfg, dtype)
    return cache.rows([cache.open(tokens) for _ in range(rows)])
