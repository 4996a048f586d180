"""Operations in C++ (cpp/), for CPUs: loaded with ctypes, one instruction set chosen for this machine."""

import ctypes
import functools
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from herd.formats import fitting_group
from herd.kernels.reference import Attention, Part

_P, _I64, _I32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_WIDEST = 256  # head_dim, a multiple of 64
PANEL = 32  # outputs that are packed together (levels.h)
_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_BITS = {torch.int8: 8, torch.uint8: 4}  # of keys and values


# As struct Tokens in levels.h.
_TOKENS = np.dtype(
    [*((name, np.uint64) for name in ("keys", "values", "key_scale", "value_scale")), ("count", "i8"), ("bits", "i4")],
    align=True,
)


class Parts(tuple[Part, ...]):
    """Parts that are attended to again and again: what the library needs to know of them is looked up once."""

    @functools.cached_property
    def quantized(self) -> bool:
        """Whether all of them are in 8 or 4 bits."""
        return all(part.k_GNd.dtype in _BITS for part in self)

    @functools.cached_property
    def table(self) -> npt.NDArray[np.void]:
        """Where the tokens of each part and head stand, [K, G]."""
        table = np.zeros((len(self), len(self[0].k_GNd) if self else 0), _TOKENS)
        for k, part in enumerate(self):
            assert part.k_scale_GN is not None and part.v_scale_GN is not None
            arrays = (part.k_GNd, part.v_GNd, part.k_scale_GN, part.v_scale_GN)
            assert all(a[0].is_contiguous() for a in arrays), "tokens of a head stand side by side"
            row, (G, N) = table[k], part.k_GNd.shape[:2]
            for name, a in zip(_TOKENS.names or (), arrays, strict=False):
                row[name] = a.data_ptr() + np.arange(G, dtype=np.uint64) * (a.stride(0) * a.itemsize)
            row["count"], row["bits"] = N, _BITS[part.k_GNd.dtype]
        return table


def find() -> str | None:
    """Where the library is: beside this file or, from an editable install, where the package's import hook knows."""
    found = importlib.util.find_spec("herd.kernels.herd_kernels")
    return None if found is None else found.origin


class Weight(ctypes.Structure):
    """As in levels.h."""

    _fields_ = (("packed", _P), ("scale", _P), ("N", _I64), ("K", _I64), ("group", _I32), ("bits", _I32))


@dataclass(frozen=True)
class PackedWeight:
    """A weight [N, K] in the library's order, with float32 scales [panels, K / group, 32], none in 16 bits."""

    packed: Tensor
    scale: Tensor
    shape: tuple[int, int]
    group: int
    bits: int

    @property
    def nbytes(self) -> int:
        """Of numbers and scales."""
        return self.packed.nbytes + self.scale.nbytes

    def struct(self) -> Weight:
        """It as the library sees it; good while this object lives."""
        (N, K), scale = self.shape, self.scale
        return Weight(self.packed.data_ptr(), scale.data_ptr(), N, K, self.group, self.bits)


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """The library and its instruction set, or None and the reason."""
    path = find()
    if path is None:
        return None, "not built: there was no C++ compiler at installation"
    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        return None, f"cannot be loaded: {error}"
    library.herd_level.restype = ctypes.c_char_p
    library.herd_use_level.argtypes = (ctypes.c_char_p,)
    library.herd_causal.argtypes = (_P, _P, _P, _I64, _I64, _I64, _I64, _I64, _P, _I64)
    library.herd_pack.argtypes = (_P, _I32, ctypes.POINTER(Weight), _I64)
    library.herd_linear.argtypes = (ctypes.POINTER(Weight), _P, _I64, _I64, _P, _I64, _I32, _I64)
    library.herd_large_pages.argtypes = (_P, _I64)
    library.herd_project.argtypes = (_P, _P, _P, _P, _I64)
    library.herd_finish.argtypes = (_P, _P, _P, _P, _I64)
    library.herd_run.argtypes = (_P, _P, _I64, _P, _P, _I64, _I64)
    library.herd_own.argtypes = (_P, _P, _P, _P, _I64, _I64, _P, _I64)
    library.herd_route.argtypes, library.herd_route.restype = (_P, _P, _P, _P, _P, _I64), _P
    library.herd_feed_forward.argtypes = (_P, ctypes.c_char_p, _I64)
    library.herd_add_routed.argtypes = (_P, _I64)
    library.herd_attend.argtypes = (_P, _I64, _I64, _I64, _P, _I64, ctypes.c_float, _P, _I64, _P, _P, _P, _P)
    library.herd_keep.argtypes = (_P, _I64, _I64, _I32, _P, _P)
    return library, library.herd_level().decode()


def library() -> ctypes.CDLL:
    """The library, where there is one."""
    found, why = load()
    assert found is not None, why
    return found


def takes(q_GRd: Tensor, parts: Sequence[Part]) -> bool:
    """Whether `attend_parts` can do this: 8 or 4 bits on the CPU, head_dim a multiple of 64."""
    return fits(q_GRd.shape[-1]) and _known(parts).quantized


def fits(head_dim: int) -> bool:
    """Whether heads have so many dimensions as attention here can take: a multiple of 64, at most 256."""
    return head_dim % 64 == 0 and head_dim <= _WIDEST


def attend_parts(q_GRd: Tensor, parts: Sequence[Part], missed: float, elsewhere_GR: Tensor | None = None) -> Attention:
    """As `reference.attend_parts`. Queries count as two int8 numbers each, so that logits differ by at most 1.6e-5
    sqrt(d) |q| |k|."""
    (G, R, d), K = q_GRd.shape, len(parts)
    q_GRd = q_GRd.float().contiguous()
    elsewhere_GR = torch.full((G, R), -math.inf) if elsewhere_GR is None else elsewhere_GR.float().contiguous()
    table = _known(parts).table
    out_GRd, lse_GR = torch.empty(G, R, d), torch.empty(G, R)
    lse_KGR, left_out_GR = torch.empty(K, G, R), torch.empty(G, R)
    results = (x.data_ptr() for x in (out_GRd, lse_GR, lse_KGR, left_out_GR))
    known, threads = elsewhere_GR.data_ptr(), torch.get_num_threads()
    library().herd_attend(q_GRd.data_ptr(), G, R, d, table.ctypes.data, K, missed, known, threads, *results)
    return Attention(out_GRd, lse_GR, lse_KGR, left_out_GR)


def quantize_kv(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """As `reference.quantize_kv`; of two scales for 4 bits with all but the same error, it may choose the other."""
    d, x = x.shape[-1], x.float().contiguous()
    codes = torch.empty(*x.shape[:-1], d * bits // 8, dtype=torch.int8 if bits == 8 else torch.uint8)
    scale = torch.empty(x.shape[:-1], dtype=torch.float16)
    library().herd_keep(x.data_ptr(), scale.numel(), d, bits, codes.data_ptr(), scale.data_ptr())
    return codes, scale


def _known(parts: Sequence[Part]) -> Parts:
    return parts if isinstance(parts, Parts) else Parts(parts)


def takes_causal(*parts: Tensor) -> bool:
    """Whether `causal_attention` can do this: bfloat16 without gradients, head_dim a multiple of 64."""
    taken = all(x.dtype == torch.bfloat16 and x.device.type == "cpu" and fits(x.shape[-1]) for x in parts)
    return taken and not (torch.is_grad_enabled() and any(x.requires_grad for x in parts))


def causal_attention(q_BTHd: Tensor, k_BTGd: Tensor, v_BTGd: Tensor) -> Tensor:
    """As `reference.causal_attention`; weights are rounded to bfloat16 before they meet values."""
    q, k, v = (x.contiguous() for x in (q_BTHd, k_BTGd, v_BTGd))
    (B, T, H, d), G, out_BTHd = q.shape, k.shape[2], torch.empty_like(q)
    addresses = (x.data_ptr() for x in (q, k, v))
    library().herd_causal(*addresses, B, T, H, G, d, out_BTHd.data_ptr(), torch.get_num_threads())
    return out_BTHd


class _Room:
    """Large pieces of memory that weights are cut from, one behind the other, so that they lie in large pages. Without
    the library, pages are as they are."""

    def __init__(self) -> None:
        self._piece, self._used = torch.empty(0, dtype=torch.uint8), 0

    def take(self, nbytes: int) -> Tensor:
        if self._used + nbytes > len(self._piece):
            with torch.inference_mode(False):  # others may write into it outside of that
                self._piece, self._used = torch.empty(max(nbytes, _PIECE), dtype=torch.uint8), 0
            if (library := load()[0]) is not None:
                library.herd_large_pages(self._piece.data_ptr(), len(self._piece))
        taken = self._piece[self._used : self._used + nbytes]
        self._used += -(-nbytes // 64) * 64  # lines of the cache
        return taken


_PIECE = 256 << 20  # bytes; what is not used is never touched
_room = _Room()


def room(nbytes: int) -> Tensor:
    """Memory for a weight, uint8 [nbytes]."""
    return _room.take(nbytes)


def pack(w_NK: Tensor, bits: int, group: int) -> PackedWeight:
    """As `reference.pack`; 16 bits are bfloat16, where group counts for nothing."""
    N, K = w_NK.shape
    group = K if bits == 16 else fitting_group(K, group)
    panels = -(-N // PANEL)
    packed = room(panels * PANEL * K * bits // 8)
    scales = (panels, 0 if bits == 16 else K // group, PANEL)
    # Not among the copies that packing makes for a time, whose memory could not be used again for what lies between.
    scale = room(4 * math.prod(scales)).view(torch.float32).view(scales).zero_()
    weight = PackedWeight(packed, scale, (N, K), group, bits)
    w_NK = w_NK.contiguous() if w_NK.dtype in _TYPES else w_NK.float().contiguous()
    struct, threads = ctypes.byref(weight.struct()), torch.get_num_threads()
    library().herd_pack(w_NK.data_ptr(), _TYPES[w_NK.dtype], struct, threads)
    return weight


def linear(x: Tensor, weight: PackedWeight) -> Tensor:
    """As `reference.linear`."""
    (N, K), x_MK = weight.shape, x.flatten(0, -2).contiguous()
    assert x_MK.shape[1] == K and x.device.type == "cpu", (x.shape, weight.shape, x.device)
    out_MN = x_MK.new_empty(len(x_MK), N)
    kind, threads = _TYPES[x.dtype], torch.get_num_threads()
    w = ctypes.byref(weight.struct())
    library().herd_linear(w, x_MK.data_ptr(), K, len(x_MK), out_MN.data_ptr(), N, kind, threads)
    return out_MN.unflatten(0, x.shape[:-1])
