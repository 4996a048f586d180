"""Layers of a decoder in C++ (cpp/decoder.cpp), with packed weights and float32 activations.

Shape suffixes: N tokens, D hidden, F expert width, E experts, H query heads, G key/value heads, d head_dim, W
(H + 2 G) d, f d / 2.
"""

import ctypes
import math
import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from herd.formats import fitting_group
from herd.kernels import native
from herd.kernels.native import PackedWeight

_P, _I64, _I32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_S = TypeVar("_S", bound=ctypes.Structure)
PAGE = 4096  # bytes: what disks and operating systems read at least
_GATES = 16  # that stand together, followed by their ups (levels.h)


@dataclass(frozen=True)
class Mlp:
    """A SwiGLU block: `pack_mlp`."""

    gate_up: PackedWeight
    down: PackedWeight


@dataclass(frozen=True)
class WeightForm:
    """What is known of a packed weight without its numbers."""

    shape: tuple[int, int]
    group: int
    bits: int

    @classmethod
    def of(cls, N: int, K: int, bits: int, group: int) -> "WeightForm":
        """As `native.pack` makes them of so many outputs and inputs."""
        return cls((N, K), K if bits == 16 else fitting_group(K, group), bits)

    @property
    def codes(self) -> int:
        """Bytes of its codes."""
        return _panels(self.shape[0]) * native.PANEL * self.shape[1] * self.bits // 8

    @property
    def scales(self) -> tuple[int, int, int]:
        """Shape of its scales."""
        N, K = self.shape
        return _panels(N), 0 if self.bits == 16 else K // self.group, native.PANEL

    @property
    def nbytes(self) -> int:
        """Of codes and scales, which follow them: a multiple of 64."""
        return self.codes + 4 * math.prod(self.scales)

    def placed(self, at: Tensor) -> PackedWeight:
        """The weight that stands in these bytes."""
        scale = at[self.codes : self.nbytes].view(torch.float32).view(self.scales)
        return PackedWeight(at[: self.codes], scale, self.shape, self.group, self.bits)


@dataclass(frozen=True)
class MlpForm:
    """What is known of an `Mlp` without its numbers."""

    gate_up: WeightForm
    down: WeightForm

    @classmethod
    def of(cls, D: int, F: int, bits: int, group: int) -> "MlpForm":
        """As `pack_mlp` makes them."""
        return cls(WeightForm.of(2 * (F + -F % _GATES), D, bits, group), WeightForm.of(D, F, bits, group))

    @property
    def nbytes(self) -> int:
        """Of both, one after the other, in whole pages, so that it can be read alone and past the page cache."""
        return -(-(self.gate_up.nbytes + self.down.nbytes) // PAGE) * PAGE

    def placed(self, at: Tensor) -> Mlp:
        """The block that stands in these bytes."""
        return Mlp(self.gate_up.placed(at), self.down.placed(at[self.gate_up.nbytes :]))


@dataclass(frozen=True)
class Layer:
    """Weights of one layer; norms and router are float32. qkv: all heads' q, then k, then v. No experts: dense."""

    attention_norm_D: Tensor
    mlp_norm_D: Tensor
    qkv: PackedWeight
    out: PackedWeight
    shared: Mlp
    experts: tuple[Mlp, ...]
    router_ED: Tensor | None
    top_k: int
    local: bool
    qk_norm: bool


@dataclass(frozen=True)
class Shape:
    """hidden_size, heads, their dimensions and the epsilon of norms."""

    D: int
    H: int
    G: int
    d: int
    eps: float


@dataclass(frozen=True)
class Tokens:
    """States of tokens [N, D], which a layer changes in place, cosines and sines of their angles, and the temperature
    of global queries, if there is one. All float32 and contiguous."""

    x_ND: Tensor
    turns_Nf2: Tensor
    temperature_N: Tensor | None


class Span(ctypes.Structure):
    """New tokens of one sequence, in one attention chunk; as `Sequence` in levels.h."""

    _fields_ = (
        *((name, _I64) for name in ("first", "tokens", "local_past", "global_past")),
        *((name, _I64) for name in ("local_capacity", "global_capacity")),
        ("memory", _P),
    )


class _Mlp(ctypes.Structure):
    _fields_ = (("gate_up", native.Weight), ("down", native.Weight))


class _Layer(ctypes.Structure):
    _fields_ = (
        ("attention_norm", _P),
        ("mlp_norm", _P),
        ("qkv", native.Weight),
        ("out", native.Weight),
        ("shared", _Mlp),
        ("experts", _P),
        ("router", _P),
        ("E", _I64),
        ("top_k", _I64),
        ("local", _I32),
        ("qk_norm", _I32),
    )


class _Decoder(ctypes.Structure):
    _fields_ = (("D", _I64), ("H", _I64), ("G", _I64), ("d", _I64), ("eps", ctypes.c_float))


class _Batch(ctypes.Structure):
    _fields_ = (("N", _I64), ("x", _P), ("turns", _P), ("temperature", _P))


def pack_mlp(gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor, bits: int, group: int) -> Mlp:
    """The weights of a SwiGLU block, see `native.pack`."""
    return Mlp(native.pack(interleaved(gate_FD, up_FD), bits, group), native.pack(down_DF, bits, group))


def interleaved(gate_FD: Tensor, up_FD: Tensor) -> Tensor:
    """Gates and ups as `Mlp` has them: 16 gates, the 16 ups that belong to them, and so on; missing ones are 0."""
    pad = -len(gate_FD) % _GATES
    gate, up = (nn.functional.pad(w, (0, 0, 0, pad)).unflatten(0, (-1, _GATES)) for w in (gate_FD, up_FD))
    return torch.stack([gate, up], 1).flatten(0, 2)


def apart(gate_up: Tensor, F: int) -> tuple[Tensor, Tensor]:
    """`interleaved` undone, for F gates."""
    gate, up = gate_up.unflatten(0, (-1, 2, _GATES)).unbind(1)
    return gate.flatten(0, 1)[:F], up.flatten(0, 1)[:F]


def memory(tokens: int, G: int, d: int) -> Tensor:
    """Room for keys and values of so many tokens in one layer."""
    return torch.zeros(2 * G * whole_panels(tokens) * d, dtype=torch.bfloat16)


def whole_panels(tokens: int) -> int:
    """For how many tokens there is room where so many are asked for."""
    return -(-tokens // native.PANEL) * native.PANEL


def read_memory(kept: Sequence[Tensor], G: int, d: int, first: int, stop: int) -> Tensor:
    """Copy of the keys and values [L, 2, G, S, d] of tokens first..stop-1 in the memories of some layers, all of which
    have room for as many tokens."""
    at = first % native.PANEL
    parts = zip(*_panels_of(kept, G, d, first, stop), strict=True)
    both = [torch.stack(part).reshape(len(kept), G, -1, d)[:, :, at : at + stop - first] for part in parts]
    return torch.stack(both, 1)


def write_memory(kept: Sequence[Tensor], kv_L2GSd: Tensor, first: int) -> None:
    """Put keys and values, as `read_memory` gives them, at `first` and behind it."""
    L, _, G, S, d = kv_L2GSd.shape
    begin = first // native.PANEL * native.PANEL
    panels = _panels_of(kept, G, d, begin, first + S)
    whole = read_memory(kept, G, d, begin, whole_panels(first + S))
    whole[:, :, :, first - begin : first - begin + S] = kv_L2GSd
    for part, now in zip(zip(*panels, strict=True), whole.unbind(1), strict=True):
        torch._foreach_copy_(list(part), list(now.reshape(L, *part[0].shape).unbind()))


def _panels_of(kept: Sequence[Tensor], G: int, d: int, first: int, stop: int) -> list[tuple[Tensor, Tensor]]:
    """Views of keys and of values of each memory in the whole panels that hold tokens first..stop-1: their dimensions
    are those of [G, S, d], taken apart. How they lie in memory, own.h says. By one operation each, because there are
    many layers, and between operations other threads may take the interpreter."""
    wide, at = native.PANEL, first // native.PANEL
    count, head = -(-stop // wide) - at, kept[0].numel() // G  # numbers of a head
    room = head // (2 * d)
    k = ((G, count, wide, d // 2, 2), (head, wide * d, 2, 2 * wide, 1), at * wide * d)
    v = ((G, count, wide // 2, 2, d // wide, wide), (head, wide * wide, 2 * wide, 1, wide * room, 2), room * d)
    return [(one.as_strided(*k), one.as_strided(*v[:2], v[2] + at * wide * wide)) for one in kept]


def addresses(memories: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    """What `Span.memory` points to; good while the memories live."""
    return (_P * len(memories))(*(m.data_ptr() for m in memories))


class Source(Protocol):
    """Where experts come from that are not all in memory: what `Layer.experts` holds of them is their shapes."""

    def load(self, layer: int, wanted: Sequence[int], x_ND: Tensor) -> Generator[Mapping[int, Mlp], None, None]:
        """Experts of a layer by number, until all that are wanted were there. First, and at once, those that are in
        memory, maybe none; then waits for others. They are there until the next ones are asked for.

        x_ND: the states that this layer adds to, which tell what the next layer may want.
        """
        ...


class Layers:
    """Some layers, one after the other."""

    def __init__(self, shape: Shape, layers: Sequence[Layer], source: Source | None = None) -> None:
        """source: of the experts, where they are not in memory."""
        self.shape, self.layers, self._source = shape, list(layers), source
        self._turn = threading.Lock()  # of the thread whose experts are in place
        self._experts = [_array(_Mlp, [_mlp(e) for e in layer.experts]) for layer in layers]
        self._layers = _array(_Layer, [_layer(x, e) for x, e in zip(layers, self._experts, strict=True)])
        self._decoder = _Decoder(shape.D, shape.H, shape.G, shape.d, shape.eps)
        self._library = native.library()

    def run(self, first: int, last: int, tokens: Tokens, spans: Sequence[Span]) -> None:
        """Layers from `first` to before `last`; `Span.memory` begins at `first`. Sequences see only themselves."""
        if self._source is not None:
            for at in range(first, last):
                self.finish(at, tokens, self._attend(at, at - first, tokens, spans))
            return
        layers = ctypes.byref(self._layers, first * ctypes.sizeof(_Layer))
        batch, sequences, threads = _batch(tokens), _array(Span, spans), torch.get_num_threads()
        self._library.herd_run(
            ctypes.byref(self._decoder), layers, last - first, ctypes.byref(batch), sequences, len(spans), threads
        )

    def project(self, at: int, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [N, H, d], keys and values [N, G, d] of a layer: rotated, normalised, with their temperature."""
        shape, layer = self.shape, ctypes.byref(self._layers, at * ctypes.sizeof(_Layer))
        qkv_NW = torch.empty(len(tokens.x_ND), (shape.H + 2 * shape.G) * shape.d)
        batch, threads = _batch(tokens), torch.get_num_threads()
        self._library.herd_project(ctypes.byref(self._decoder), layer, ctypes.byref(batch), qkv_NW.data_ptr(), threads)
        q_NHd, k_NGd, v_NGd = qkv_NW.unflatten(1, (-1, shape.d)).split([shape.H, shape.G, shape.G], 1)
        return q_NHd, k_NGd, v_NGd

    def finish(self, at: int, tokens: Tokens, attended_NHd: Tensor) -> None:
        """The rest of a layer, from what attention gave."""
        layer, attended_NHd = ctypes.byref(self._layers, at * ctypes.sizeof(_Layer)), attended_NHd.float().contiguous()
        batch, threads = _batch(tokens), torch.get_num_threads()
        given = (ctypes.byref(self._decoder), layer, ctypes.byref(batch), attended_NHd.data_ptr())
        if self._source is None or not self.layers[at].experts:
            self._library.herd_finish(*given, threads)
            return
        count_E = (_I32 * len(self.layers[at].experts))()
        with self._turn:
            routed = self._library.herd_route(*given, count_E, threads)
            try:
                self._feed_forward(at, routed, list(count_E), tokens.x_ND)
            finally:
                self._library.herd_add_routed(routed, threads)

    def _feed_forward(self, at: int, routed: int, count_E: Sequence[int], x_ND: Tensor) -> None:
        """The shared block and the experts that have tokens, as they come."""
        assert self._source is not None
        wanted, shared = [e for e, count in enumerate(count_E) if count], True
        with closing(self._source.load(at, wanted, x_ND)) as coming:
            for experts in coming:
                for e, mlp in experts.items():
                    self._experts[at][e] = _mlp(mlp)
                which = bytes([shared, *(e in experts for e in range(len(count_E)))])
                self._library.herd_feed_forward(routed, which, torch.get_num_threads())
                shared = False

    def _attend(self, at: int, memory: int, tokens: Tokens, spans: Sequence[Span]) -> Tensor:
        """What attention gives of sequences that see only themselves, [N, H, d]; memory: which of theirs."""
        layer = ctypes.byref(self._layers, at * ctypes.sizeof(_Layer))
        attended_NHd = torch.empty(len(tokens.x_ND), self.shape.H, self.shape.d)
        batch, sequences, threads = _batch(tokens), _array(Span, spans), torch.get_num_threads()
        given = (ctypes.byref(self._decoder), layer, ctypes.byref(batch), sequences, len(spans), memory)
        self._library.herd_own(*given, attended_NHd.data_ptr(), threads)
        return attended_NHd


def _panels(N: int) -> int:
    return -(-N // native.PANEL)


def _array(kind: type[_S], items: Sequence[_S]) -> ctypes.Array[_S]:
    return (kind * len(items))(*items)


def _batch(tokens: Tokens) -> _Batch:
    parts = (tokens.x_ND, tokens.turns_Nf2)
    assert all(part.dtype == torch.float32 and part.is_contiguous() for part in parts)
    temperature = None if tokens.temperature_N is None else tokens.temperature_N.data_ptr()
    return _Batch(len(tokens.x_ND), *(part.data_ptr() for part in parts), temperature)


def _mlp(mlp: Mlp) -> _Mlp:
    return _Mlp(mlp.gate_up.struct(), mlp.down.struct())


def _layer(layer: Layer, experts: ctypes.Array[_Mlp]) -> _Layer:
    norms = (layer.attention_norm_D.data_ptr(), layer.mlp_norm_D.data_ptr())
    router = None if layer.router_ED is None else layer.router_ED.data_ptr()
    routed = (ctypes.addressof(experts), router, len(experts), layer.top_k)
    weights = (layer.qkv.struct(), layer.out.struct(), _mlp(layer.shared))
    return _Layer(*norms, *weights, *routed, layer.local, layer.qk_norm)
