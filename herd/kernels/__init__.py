"""The operations everything hot goes through. `reference` defines what is correct."""

from herd.kernels.reference import (
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
    "apply_rope",
    "attend",
    "dequantize_kv",
    "expert_mlp",
    "merge_partials",
    "quantize_kv",
    "rms_norm",
    "swiglu",
]
