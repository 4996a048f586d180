"""A tiny image encoder with random weights, every part of which counts; for the decoders of tiny_models."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from herd.config import VisionConfig
from herd.model.fusion import Patches, places
from herd.model.vision import Vision
from tests.model.tiny_models import BASE

PATCH = 96  # the last id of the tiny vocabulary, which stands for one token of a tile

TINY = VisionConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=128,  # transformers can only have hidden_size times the patches that become one token
    image_size=28,
    patch_size=7,  # a grid of 4 * 4, which become 4 tokens
    vision_output_dim=24,
    projector_input_dim=24,
    projector_output_dim=24,
    boi_token_index=94,
    eoi_token_index=95,
    image_token_index=PATCH,
)


def tiny_vision(**changes: Any) -> VisionConfig:
    return replace(TINY, **changes)


def build_vision(cfg: VisionConfig = TINY, hidden_size: int = BASE.hidden_size, seed: int = 0) -> Vision:
    torch.manual_seed(seed)
    vision = Vision(cfg, hidden_size).eval()
    for name, weight in vision.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.normal_(weight, mean=1.0, std=0.3)
        elif weight.ndim == 1 or "positional" in name:
            torch.nn.init.normal_(weight, std=0.3)
        else:
            sharp = 2.0 if "q_proj" in name or "k_proj" in name else 1.5
            torch.nn.init.normal_(weight, std=sharp * weight.shape[-1] ** -0.5)
    return vision


def tiles(count: int, cfg: VisionConfig = TINY, seed: int = 2) -> Tensor:
    shape = (count, cfg.num_channels, cfg.image_size, cfg.image_size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def patches(ids_BT: Tensor, features_ND: Tensor) -> Patches:
    """The features in the places of a batch's patches."""
    return Patches(torch.tensor(places(ids_BT.flatten().tolist(), PATCH, [features_ND])), features_ND)
