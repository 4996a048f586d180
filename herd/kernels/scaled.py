"""Products that PyTorch itself has for quantised weights: of e4m3 numbers (fp8) on any device, of 4 bits on GPUs.

On a GPU they are PyTorch's kernels. On a CPU `linear` computes the same, slowly: models that the native library runs
hold e4m3 numbers in bfloat16 instead (`herd.formats`).

Shape suffixes: M rows, N outputs, K inputs, G groups of inputs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from herd.kernels.reference import PlainWeight

_LARGEST = 448.0  # number of e4m3
_BOUND = 1200.0  # of activations: larger ones are cut off (spec §7)
_GROUPS = (32, 64, 128, 256)  # of inputs, that products of 4 bits can have
_TILES = 8  # innerKTiles of PyTorch's order: 16 inputs each


@dataclass(frozen=True)
class Fp8Weight:
    """A weight [N, K] in e4m3, with a float32 scale for each output [N, 1]. N and K are multiples of 16."""

    q_NK: Tensor
    scale_N1: Tensor


@dataclass(frozen=True)
class Int4Weight:
    """A weight in PyTorch's own order; bfloat16 scales and zeros [G, N, 2]."""

    packed: Tensor
    scale_and_zero_GN2: Tensor
    group: int


def pack_fp8(w_NK: Tensor) -> Fp8Weight:
    """Each output's largest number becomes the largest of e4m3 (spec §7)."""
    scale_N1 = w_NK.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / _LARGEST
    return Fp8Weight((w_NK.float() / scale_N1).to(torch.float8_e4m3fn).contiguous(), scale_N1)


def numbers_fp8(weight: Fp8Weight) -> Tensor:
    """What it stands for, float32 [N, K]."""
    return weight.q_NK.float() * weight.scale_N1


def takes_int4(weight: PlainWeight) -> bool:
    """Whether `pack_int4` can pack it: 4 bits, and sizes as PyTorch's kernel wants them."""
    (N, K), G = weight.q_NK.shape, weight.scale_Ng.shape[1]
    return weight.bits == 4 and K // G in _GROUPS and K % (16 * _TILES) == 0 and N % 16 == 0


def pack_int4(weight: PlainWeight) -> Int4Weight:
    """Scales are rounded to bfloat16."""
    q_NK, G = (weight.q_NK + 8).to(torch.int32), weight.scale_Ng.shape[1]
    scale_GN = weight.scale_Ng.T.bfloat16()
    if q_NK.device.type == "cpu":
        packed = torch._convert_weight_to_int4pack_for_cpu(q_NK, _TILES)
    else:
        pairs = (q_NK[:, ::2] << 4 | q_NK[:, 1::2]).to(torch.uint8)
        packed = torch._convert_weight_to_int4pack(pairs, _TILES)
    zero_GN = torch.zeros_like(scale_GN)  # of what 8 stands for
    return Int4Weight(packed, torch.stack([scale_GN, zero_GN], -1).contiguous(), q_NK.shape[1] // G)


def linear(x: Tensor, weight: Fp8Weight | Int4Weight) -> Tensor:
    """x [..., K] times weight^T in x's type: with fp8 weights each row of x becomes e4m3, with int4 ones bfloat16."""
    x_MK = x.flatten(0, -2)
    out_MN = _fp8(x_MK, weight) if isinstance(weight, Fp8Weight) else _int4(x_MK, weight)
    return out_MN.to(x.dtype).unflatten(0, x.shape[:-1])


def _fp8(x_MK: Tensor, weight: Fp8Weight) -> Tensor:
    scale_M1 = x_MK.float().abs().amax(1, keepdim=True).clamp(1e-12, _BOUND) / _LARGEST
    q_MK = (x_MK.float() / scale_M1).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
    scales = {"scale_a": scale_M1, "scale_b": weight.scale_N1.T.contiguous()}
    return torch._scaled_mm(q_MK, weight.q_NK.T, **scales, out_dtype=torch.bfloat16, use_fast_accum=True)


def _int4(x_MK: Tensor, weight: Int4Weight) -> Tensor:
    product = torch._weight_int4pack_mm_for_cpu if x_MK.device.type == "cpu" else torch._weight_int4pack_mm
    return product(x_MK.bfloat16(), weight.packed, weight.group, weight.scale_and_zero_GN2)
