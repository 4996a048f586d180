"""PyTorch's counter of FLOPs, and what it has no formula for: the products of experts, and attention on a CPU."""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def _grouped(x_shape: Any, w_shape: Any, *_: Any, **__: Any) -> int:
    """Each row [K] is multiplied with the [K, N] of one expert."""
    return int(2 * x_shape[0] * x_shape[1] * w_shape[-1])


def _attention(q_shape: Any, k_shape: Any, v_shape: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(q_shape, k_shape, v_shape))


def flop_counter() -> FlopCounterMode:
    aten = torch.ops.aten
    formulas = {aten._grouped_mm: _grouped, aten._scaled_dot_product_flash_attention_for_cpu: _attention}
    return FlopCounterMode(display=False, custom_mapping=formulas)
