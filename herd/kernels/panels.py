"""Quantised weights in the order in which the native library multiplies them (cpp/product.h), and back, in PyTorch.

Works without the library. `native.pack` rounds numbers to the nearest code and packs them in one go; here the codes are
given, as calibration or a file gives them.

Shape suffixes: N outputs, K inputs, G groups of inputs, P panels of 32 outputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from herd.kernels import native
from herd.kernels.native import PANEL, PackedWeight


def pack_codes(codes_NK: Tensor, scale_NG: Tensor, bits: int) -> PackedWeight:
    """The weight codes * scale: int8 codes from -127 to 127 in 8 bits or -8 to 7 in 4, and float32 scales of either
    sign, each of K / G inputs that follow each other. K / G is a multiple of 8."""
    (N, K), G = codes_NK.shape, scale_NG.shape[1]
    assert codes_NK.dtype == torch.int8 and bits in (4, 8) and len(scale_NG) == N and K % (8 * G) == 0
    cells_PKnk = _cells(codes_NK.to(torch.int16) + _zero(bits), 32 // bits, _zero(bits)).to(torch.uint8)
    if bits == 4:
        low, high = cells_PKnk.chunk(2, -1)
        cells_PKnk = low | high << 4
    scale_PGn = F.pad(scale_NG.float(), (0, 0, 0, -N % PANEL)).unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()
    return PackedWeight(_placed(cells_PKnk), scale_PGn, (N, K), K // G, bits)


def pack_halves(w_NK: Tensor) -> PackedWeight:
    """A weight in 16 bits, rounded to bfloat16. K is a multiple of 2."""
    N, K = w_NK.shape
    cells_PKnk = _cells(w_NK.bfloat16(), 2, 0)
    return PackedWeight(_placed(cells_PKnk.view(torch.uint8)), torch.empty(len(cells_PKnk), 0, PANEL), (N, K), K, 16)


def codes(weight: PackedWeight) -> tuple[Tensor, Tensor]:
    """What `pack_codes` was given: codes [N, K] and scales [N, G]."""
    N, K = weight.shape
    cells_PKnk = weight.packed.view(-1, K * weight.bits // 32, PANEL, 4)
    if weight.bits == 4:
        cells_PKnk = torch.cat([cells_PKnk & 15, cells_PKnk >> 4], -1)
    codes_NK = (_rows(cells_PKnk)[:N].to(torch.int16) - _zero(weight.bits)).to(torch.int8)
    return codes_NK, weight.scale.transpose(1, 2).flatten(0, 1)[:N].contiguous()


def numbers(weight: PackedWeight) -> Tensor:
    """What a packed weight stands for: float32 [N, K] or, of 16 bits, bfloat16."""
    N, K = weight.shape
    if weight.bits == 16:
        return _rows(weight.packed.view(torch.bfloat16).view(-1, K // 2, PANEL, 2))[:N].contiguous()
    codes_NK, scale_NG = codes(weight)
    return (codes_NK.unflatten(1, (-1, weight.group)) * scale_NG.unsqueeze(-1)).flatten(1)


def _zero(bits: int) -> int:
    """What is added to a code, so that what is stored is not negative."""
    return 1 << (bits - 1)


def _cells(values_NK: Tensor, inputs: int, missing: int) -> Tensor:
    """[P, K / inputs, 32, inputs], the last panel filled up with `missing`."""
    padded = F.pad(values_NK, (0, 0, 0, -len(values_NK) % PANEL), value=missing)
    return padded.unflatten(0, (-1, PANEL)).unflatten(2, (-1, inputs)).transpose(1, 2)


def _rows(cells_PKnk: Tensor) -> Tensor:
    """`_cells` undone, but for what fills up the last panel."""
    return cells_PKnk.transpose(1, 2).flatten(2).flatten(0, 1)


def _placed(cells: Tensor) -> Tensor:
    """The cells as bytes, in memory that the library reads fast."""
    bytes_ = native.room(cells.numel())
    bytes_.view(cells.shape).copy_(cells)
    return bytes_
