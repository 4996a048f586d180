"""Layers of a decoder in plain PyTorch and float32, which round where the native ones say that they do.

Shape suffixes: as in herd/kernels/layers.py, and T new tokens of a sequence, S all its tokens, A = H d.
"""

import ctypes
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from herd.kernels import native, reference
from herd.kernels.layers import Layer, Mlp, Shape, Span, Tokens, addresses, memory, pack_mlp

GROUP = 24  # of inputs that share a scale
Block = tuple[Tensor, Tensor, Tensor]  # gate [F, D], up [F, D], down [D, F]


@dataclass(frozen=True)
class Plain:
    """A layer's weights as numbers; mlps: the shared block, then the experts."""

    shape: Shape
    bits: int
    attention_norm_D: Tensor
    mlp_norm_D: Tensor
    qkv_WD: Tensor
    out_DA: Tensor
    mlps: list[Block]
    router_ED: Tensor | None = None
    top_k: int = 0
    local: bool = True
    qk_norm: bool = False

    def packed(self) -> Layer:
        """It as the library takes it."""
        shared, *experts = (self._packed(*mlp) for mlp in self.mlps)
        matrices = (native.pack(w, self.bits, GROUP) for w in (self.qkv_WD, self.out_DA))
        norms = (self.attention_norm_D, self.mlp_norm_D)
        return Layer(
            *norms, *matrices, shared, tuple(experts), self.router_ED, self.top_k, self.local, self.qk_norm
        )  # fmt: skip

    def _packed(self, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> Mlp:
        return pack_mlp(gate_FD, up_FD, down_DF, self.bits, GROUP)

    def _times(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.bits == 16:
            return x.bfloat16().float() @ weight.bfloat16().float().T
        return reference.linear(x, reference.pack(weight, self.bits, GROUP))

    def _mlp(self, x_ND: Tensor, mlp: Block) -> Tensor:
        gate_FD, up_FD, down_DF = mlp
        return self._times(reference.swiglu(self._times(x_ND, gate_FD), self._times(x_ND, up_FD)), down_DF)

    def project(self, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """As `Layers.project`."""
        x_ND, shape = reference.rms_norm(tokens.x_ND, self.attention_norm_D, self.shape.eps), self.shape
        heads_NHd = self._times(x_ND, self.qkv_WD).unflatten(1, (-1, shape.d))
        q, k, v = heads_NHd.split([shape.H, shape.G, shape.G], 1)
        if self.local:
            q, k = (self._turned(part, tokens.turns_Nf2) for part in (q, k))
        elif tokens.temperature_N is not None:
            q = q * tokens.temperature_N[:, None, None]
        return q, k, v

    def _turned(self, x_NHd: Tensor, turns_Nf2: Tensor) -> Tensor:
        a, b, cos, sin = x_NHd[..., 0::2], x_NHd[..., 1::2], turns_Nf2[:, None, :, 0], turns_Nf2[:, None, :, 1]
        x_NHd = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
        return reference.rms_norm(x_NHd, None, self.shape.eps) if self.qk_norm else x_NHd

    def finish(self, tokens: Tokens, attended_NHd: Tensor) -> None:
        """As `Layers.finish`."""
        tokens.x_ND.add_(self._times(attended_NHd.flatten(1), self.out_DA))
        x_ND = reference.rms_norm(tokens.x_ND, self.mlp_norm_D, self.shape.eps)
        tokens.x_ND.add_(self._mlp(x_ND, self.mlps[0]))
        if self.router_ED is None:
            return
        logits_NK, expert_NK = (x_ND @ self.router_ED.T).topk(self.top_k)
        for n, experts in enumerate(expert_NK.tolist()):
            for k, e in enumerate(experts):
                routed_1D = x_ND[n : n + 1] * torch.sigmoid(logits_NK[n, k])
                tokens.x_ND[n : n + 1] += self._mlp(routed_1D, self.mlps[1 + e])


def attend(q_THd: Tensor, k_SGd: Tensor, v_SGd: Tensor) -> Tensor:
    """Attention [T, H, d] of the last T of S tokens; everything that meets in a product is rounded to bfloat16, weights
    when they are relative to the largest logit so far, of spans of 512 keys."""
    (T, H, d), (S, G, _) = q_THd.shape, k_SGd.shape
    q, k, v = (q_THd / math.sqrt(d)).bfloat16().float(), k_SGd.bfloat16().float(), v_SGd.bfloat16().float()
    logits = torch.einsum("tgqd,sgd->gqts", q.unflatten(1, (G, H // G)), k)
    logits = logits.masked_fill(~torch.ones(T, S).tril(S - T).bool(), -math.inf)
    most = torch.full((*logits.shape[:3], 1), -1e30)
    total, out_gqtd = torch.zeros_like(most), torch.zeros(*logits.shape[:3], d)
    for part, v_part in zip(logits.split(512, -1), v.split(512), strict=True):
        before, most = most, torch.maximum(most, part.amax(-1, keepdim=True))
        weights, shrunk = torch.exp(part - most), torch.exp(before - most)
        total = total * shrunk + weights.sum(-1, keepdim=True)
        out_gqtd = out_gqtd * shrunk + torch.einsum("gqts,sgd->gqtd", weights.bfloat16().float(), v_part)
    return (out_gqtd / total).permute(2, 0, 1, 3).flatten(1, 2)


class Sequence:
    """What one sequence remembers: keys and values of each plain layer, and the native memory of each. rooms: for how
    many tokens there is room in local layers, and in global ones."""

    def __init__(self, layers: list[Plain], rooms: tuple[int, int]) -> None:
        G, d = layers[0].shape.G, layers[0].shape.d
        self.layers, self.rooms = layers, rooms
        self.kv = [(torch.empty(0, G, d), torch.empty(0, G, d)) for _ in layers]
        self._memory = [memory(rooms[0] if layer.local else rooms[1], G, d) for layer in layers]
        self._table = addresses(self._memory)
        self._past = [0, 0]

    def span(self, first: int, tokens: int) -> Span:
        """Its next tokens, which stand from `first` of the batch on."""
        span = Span(first, tokens, *self._past, *self.rooms, ctypes.addressof(self._table))
        self._past = [past + tokens for past in self._past]
        return span

    def begin_chunk(self) -> None:
        """Local layers see nothing of what was before."""
        self._past[0] = 0
        for at, layer in enumerate(self.layers):
            if layer.local:
                k_SGd, v_SGd = self.kv[at]
                self.kv[at] = k_SGd[:0], v_SGd[:0]


def run(layers: list[Plain], tokens: Tokens, news: list[tuple[Sequence, int, int]]) -> None:
    """As `Layers.run`, for (sequence, first token in the batch, number of tokens). Other tokens attend to nothing."""
    for at, layer in enumerate(layers):
        q_NHd, k_NGd, v_NGd = layer.project(tokens)
        attended_NHd = torch.zeros_like(q_NHd)
        for sequence, first, count in news:
            new, (k_SGd, v_SGd) = slice(first, first + count), sequence.kv[at]
            sequence.kv[at] = torch.cat([k_SGd, k_NGd[new]]), torch.cat([v_SGd, v_NGd[new]])
            attended_NHd[new] = attend(q_NHd[new], *sequence.kv[at])
        layer.finish(tokens, attended_NHd)
