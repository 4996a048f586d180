"""Rotary angles of local layers and the temperature of global layers, as functions of the position (spec §2)."""

import math

import torch
from torch import Tensor

from herd.config import TextConfig


def inverse_frequencies(cfg: TextConfig) -> Tensor:
    """Angle per position step of each channel pair, float32 [d/2], with llama3 scaling if configured (spec §2.2)."""
    pairs = torch.arange(0, cfg.head_dim, 2, dtype=torch.float64)
    inv_freq = cfg.rope_theta ** (-pairs / cfg.head_dim)
    s = cfg.rope_scaling
    if s is None:
        return inv_freq.float()
    turns = s.original_max_position_embeddings * inv_freq / (2 * math.pi)
    # With low = high (Scout) the blended band is empty, and dividing by high - low would be 0/0.
    width = max(s.high_freq_factor - s.low_freq_factor, 1e-12)
    keep = ((turns - s.low_freq_factor) / width).clamp(0, 1)
    return (inv_freq * keep + inv_freq / s.factor * (1 - keep)).float()


def rope_angles(positions_BT: Tensor, inv_freq: Tensor, chunk: int | None) -> Tensor:
    """Angles [B, T, d/2]. Positions are taken modulo the chunk: exact, and float32 stays precise at 10M (spec §2.4)."""
    if chunk is not None:
        positions_BT = positions_BT % chunk
    return positions_BT.unsqueeze(-1).float() * inv_freq


def temperature(positions_BT: Tensor, cfg: TextConfig) -> Tensor:
    """Factor on the queries of global layers, float32 [B, T]: 1 + a * ln(floor((p + 1) / floor_scale) + 1)."""
    steps = torch.floor((positions_BT.double() + 1) / cfg.floor_scale)
    return (torch.log1p(steps) * cfg.attn_scale + 1).float()
