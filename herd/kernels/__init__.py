"""The operations everything hot goes through: `reference` says what is correct, `native` (C++) is used where it can be.

The variable HERD_KERNELS, set to `reference` or `native`, decides otherwise.
"""

import inspect
import os
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from herd.errors import ConfigError
from herd.kernels import native, reference
from herd.kernels.native import Parts
from herd.kernels.reference import (
    Attention,
    Part,
    apply_rope,
    attend,
    dequantize_kv,
    expert_mlp,
    merge_partials,
    rms_norm,
    swiglu,
)

Weight = reference.PlainWeight | native.PackedWeight

__all__ = [
    "Attention",
    "Part",
    "Parts",
    "Weight",
    "apply_rope",
    "attend",
    "attend_parts",
    "causal_attention",
    "dequantize_kv",
    "expert_mlp",
    "implementation",
    "linear",
    "merge_partials",
    "operations",
    "pack",
    "quantize_kv",
    "rms_norm",
    "runs_layers",
    "swiglu",
]


class _Choice(NamedTuple):
    native: bool
    why: str


def _choice() -> _Choice:
    """Whether the native library is used, and why. ConfigError if HERD_KERNELS asks for what there is not."""
    wanted = os.environ.get("HERD_KERNELS", "")
    library, why = native.load()
    if wanted not in ("", "native", "reference"):
        raise ConfigError(f"HERD_KERNELS is {wanted!r}; it can be reference or native")
    if wanted == "reference":
        return _Choice(False, "HERD_KERNELS")
    if library is not None:
        return _Choice(True, why)
    if wanted == "native":
        raise ConfigError(f"HERD_KERNELS is native, but the native library is {why}; unset it, or install Herd again")
    return _Choice(False, f"the native library is {why}")


def implementation() -> str:
    """Which one is used, and why: `native (avx512)`, `reference (...)`.

    ConfigError if HERD_KERNELS asks for what there is not.
    """
    choice = _choice()
    return f"{'native' if choice.native else 'reference'} ({choice.why})"


def operations() -> dict[str, str]:
    """What each hot operation is done by where it can be, and why. "layers" is all of a layer in one.

    Operations are what the reference defines and this module offers: what it offers as it is has no native version.
    """
    ours = {name: globals()[name] for name in __all__ if inspect.isfunction(getattr(reference, name, None))}
    only = {name: "reference (no native version)" for name in ours if ours[name] is getattr(reference, name)}
    return {name: only.get(name, implementation()) for name in sorted({*ours, "layers"})}


def attend_parts(q_GRd: Tensor, parts: Sequence[Part], missed: float, elsewhere_GR: Tensor | None = None) -> Attention:
    """See `reference.attend_parts`."""
    use = native if _choice().native and native.takes(q_GRd, parts) else reference
    return use.attend_parts(q_GRd, parts, missed, elsewhere_GR)


def quantize_kv(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """See `reference.quantize_kv`."""
    return (native if _choice().native and x.device.type == "cpu" else reference).quantize_kv(x, bits)


def causal_attention(q_BTHd: Tensor, k_BTGd: Tensor, v_BTGd: Tensor) -> Tensor:
    """See `reference.causal_attention`."""
    use = native if _choice().native and native.takes_causal(q_BTHd, k_BTGd, v_BTGd) else reference
    return use.causal_attention(q_BTHd, k_BTGd, v_BTGd)


def pack(w_NK: Tensor, bits: int, group: int) -> Weight:
    """See `reference.pack`. A weight stays with the implementation that packed it."""
    return (native if _choice().native else reference).pack(w_NK, bits, group)


def runs_layers(weight: Tensor, head_dim: int) -> bool:
    """Whether `herd.kernels.layers` can run the layers of a model with such weights."""
    return _choice().native and weight.device.type == "cpu" and native.fits(head_dim)


def linear(x: Tensor, weight: Weight) -> Tensor:
    """See `reference.linear`."""
    return native.linear(x, weight) if isinstance(weight, native.PackedWeight) else reference.linear(x, weight)
