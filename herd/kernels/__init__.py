"""The operations everything hot goes through: `reference` says what is correct, `native` (C++) is used where it can be.

The variable HERD_KERNELS, set to `reference` or `native`, decides otherwise.
"""

import inspect
import os
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from herd.errors import ConfigError
from herd.formats import Format
from herd.kernels import native, panels, reference, scaled
from herd.kernels.native import Parts
from herd.kernels.reference import (
    Attention,
    Part,
    PlainWeight,
    apply_rope,
    attend,
    dequantize_kv,
    expert_mlp,
    merge_partials,
    rms_norm,
    swiglu,
)

Weight = PlainWeight | native.PackedWeight | scaled.Fp8Weight | scaled.Int4Weight

__all__ = [
    "Attention",
    "Part",
    "Parts",
    "PlainWeight",
    "Weight",
    "apply_rope",
    "attend",
    "attend_parts",
    "causal_attention",
    "dequantize_kv",
    "expert_mlp",
    "implementation",
    "kept_codes",
    "linear",
    "merge_partials",
    "operations",
    "pack",
    "place",
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


def pack(w_NK: Tensor, form: Format) -> Weight:
    """A weight rounded to the nearest numbers of a format other than bf16. It stays with what packed it."""
    if form.kind == "fp8":
        return scaled.pack_fp8(w_NK)
    if _choice().native and w_NK.device.type == "cpu":
        return native.pack(w_NK, form.bits, form.group)
    return place(reference.pack(w_NK, form.bits, form.group))


def place(weight: PlainWeight) -> Weight:
    """A weight of these codes, as what multiplies it here wants it."""
    if weight.q_NK.device.type != "cpu":
        return scaled.pack_int4(weight) if scaled.takes_int4(weight) else weight
    return panels.pack_codes(weight.q_NK, weight.scale_Ng, weight.bits) if _choice().native else weight


def kept_codes(weight: Weight) -> PlainWeight:
    """The codes and scales of a weight in 8 or 4 bits: what `place` was given, or what numbers were rounded to."""
    if isinstance(weight, native.PackedWeight):
        return PlainWeight(*panels.codes(weight), weight.bits)
    assert isinstance(weight, PlainWeight), type(weight)
    return weight


def runs_layers(weight: Tensor, head_dim: int) -> bool:
    """Whether `herd.kernels.layers` can run the layers of a model with such weights."""
    return _choice().native and weight.device.type == "cpu" and native.fits(head_dim)


def linear(x: Tensor, weight: Weight) -> Tensor:
    """See `reference.linear` and `scaled.linear`."""
    if isinstance(weight, native.PackedWeight):
        return native.linear(x, weight)
    return reference.linear(x, weight) if isinstance(weight, PlainWeight) else scaled.linear(x, weight)
