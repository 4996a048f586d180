"""Row-wise FP8 (e4m3) for the routed experts, in the layout of Hugging Face's FBGEMM integration (spec §7)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from herd.config import TextConfig

_LARGEST = 448.0  # of e4m3
_SMALLEST_ROW = 1e-12
# Where engines that quantise activations, too, cut them off.
_ACTIVATION_BOUND = 1200.0


def is_fp8(name: str, cfg: TextConfig) -> bool:
    """Whether Meta's recipe quantises a tensor: routed experts, but not those of the first and last layer."""
    if ".experts." not in name:
        return False
    layer = int(name.split("layers.")[1].split(".")[0])
    return 0 < layer < cfg.num_hidden_layers - 1


def scale_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of the factors of experts [E, in, out]: one for each output, along another dimension for down_proj."""
    E, _, out = shape
    return (E, out, 1) if name.endswith("down_proj") else (E, 1, out)


def quantized(experts: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Codes [in, out] and factors [out] of each expert, which is their product."""
    for expert in experts:
        w = expert.float()
        factor = w.abs().amax(0).clamp(min=_SMALLEST_ROW) / _LARGEST
        yield (w / factor).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn), factor


def quantization_config(kept: list[str]) -> dict[str, object]:
    """What config.json says of it. kept: the modules that are not quantised."""
    return {
        "quant_method": "fbgemm_fp8",
        "activation_scale_ub": _ACTIVATION_BOUND,
        "modules_to_not_convert": kept,
    }
