"""The operations everything hot goes through: `reference` says what is correct, `native` (C++) is used where it can be.

The variable HERD_KERNELS, set to `reference` or `native`, decides otherwise.
"""

import os
from collections.abc import Sequence

from torch import Tensor

from herd.errors import ConfigError
from herd.kernels import native, reference
from herd.kernels.reference import (
    Attention,
    Part,
    apply_rope,
    attend,
    dequantize_kv,
    expert_mlp,
    merge_partials,
    quantize_kv,
    rms_norm,
    swiglu,
)

__all__ = [
    "Attention",
    "Part",
    "apply_rope",
    "attend",
    "attend_parts",
    "dequantize_kv",
    "expert_mlp",
    "implementation",
    "merge_partials",
    "operations",
    "quantize_kv",
    "rms_norm",
    "swiglu",
]


def implementation() -> str:
    """Which one is used, and why: `native (avx512)`, `reference (...)`.

    ConfigError if HERD_KERNELS asks for what there is not.
    """
    wanted = os.environ.get("HERD_KERNELS", "")
    library, why = native.load()
    if wanted not in ("", "native", "reference"):
        raise ConfigError(f"HERD_KERNELS is {wanted!r}; it can be reference or native")
    if wanted == "reference":
        return "reference (HERD_KERNELS)"
    if library is not None:
        return f"native ({why})"
    if wanted == "native":
        raise ConfigError(f"HERD_KERNELS is native, but the native library is {why}; unset it, or install Herd again")
    return f"reference (the native library is {why})"


def operations() -> dict[str, str]:
    """What each hot operation is done by, and why."""
    names = ("apply_rope", "attend", "expert_mlp", "merge_partials", "quantize_kv", "rms_norm", "swiglu")
    return {"attend_parts": implementation(), **dict.fromkeys(names, "reference (no native version)")}


def attend_parts(q_GRd: Tensor, parts: Sequence[Part], missed: float) -> Attention:
    """See `reference.attend_parts`."""
    use = native if implementation().startswith("native") and native.takes(q_GRd, parts) else reference
    return use.attend_parts(q_GRd, parts, missed)
