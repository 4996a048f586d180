"""Layers of a decoder in C++ (cpp/decoder.cpp), with packed weights and float32 activations.

Shape suffixes: N tokens, D hidden, F expert width, E experts, H query heads, G key/value heads, d head_dim, W
(H + 2 G) d, f d / 2.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from herd.kernels import native
from herd.kernels.native import PackedWeight

_P, _I64, _I32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_S = TypeVar("_S", bound=ctypes.Structure)
_GATES = 16  # that stand together, followed by their ups (levels.h)


@dataclass(frozen=True)
class Mlp:
    """A SwiGLU block: `pack_mlp`."""

    gate_up: PackedWeight
    down: PackedWeight


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
    pad = -len(gate_FD) % _GATES
    gate, up = (nn.functional.pad(w, (0, 0, 0, pad)).unflatten(0, (-1, _GATES)) for w in (gate_FD, up_FD))
    gate_up = torch.stack([gate, up], 1).flatten(0, 2)
    return Mlp(native.pack(gate_up, bits, group), native.pack(down_DF, bits, group))


def memory(tokens: int, G: int, d: int) -> Tensor:
    """Room for keys and values of so many tokens in one layer."""
    return torch.zeros(2 * G * whole_panels(tokens) * d, dtype=torch.bfloat16)


def whole_panels(tokens: int) -> int:
    """For how many tokens there is room where so many are asked for."""
    return -(-tokens // native.PANEL) * native.PANEL


def addresses(memories: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    """What `Span.memory` points to; good while the memories live."""
    return (_P * len(memories))(*(m.data_ptr() for m in memories))


class Layers:
    """Some layers, one after the other."""

    def __init__(self, shape: Shape, layers: Sequence[Layer]) -> None:
        self.shape, self.layers = shape, list(layers)
        self._experts = [_array(_Mlp, [_mlp(e) for e in layer.experts]) for layer in layers]
        self._layers = _array(_Layer, [_layer(x, e) for x, e in zip(layers, self._experts, strict=True)])
        self._decoder = _Decoder(shape.D, shape.H, shape.G, shape.d, shape.eps)
        self._library = native.library()

    def run(self, first: int, last: int, tokens: Tokens, spans: Sequence[Span]) -> None:
        """Layers from `first` to before `last`; `Span.memory` begins at `first`. Sequences see only themselves."""
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
        self._library.herd_finish(
            ctypes.byref(self._decoder), layer, ctypes.byref(batch), attended_NHd.data_ptr(), threads
        )


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
