"""Plain PyTorch definitions of the hot operations, for any device; native versions must agree with these.

Shape suffixes: B batch, T queries, S keys, N tokens of all sequences, D hidden, F expert width, E experts,
H query heads, G key/value heads (H = G * group), d head_dim, K parts of a context, R query rows of one key/value
head.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from herd.formats import fitting_group

_SMALLEST = 2.0**-14  # normal number of float16
_SCALES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # of four bits, as shares of the one that cuts nothing off


def rms_norm(x: Tensor, weight_D: Tensor | None, eps: float) -> Tensor:
    """Normalise the last axis in float32, cast back, then scale in the input's dtype (spec §1.3)."""
    x32 = x.float()
    y = (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    return y if weight_D is None else y * weight_D


def apply_rope(x_BTHd: Tensor, angles_BTf: Tensor) -> Tensor:
    """Rotate the interleaved channel pairs (2i, 2i+1) by the given angles [B, T, d/2], in float32 (spec §2.1)."""
    pairs = torch.view_as_complex(x_BTHd.float().unflatten(-1, (-1, 2)).contiguous())
    turn = torch.polar(torch.ones_like(angles_BTf), angles_BTf).unsqueeze(2)
    return torch.view_as_real(pairs * turn).flatten(-2).to(x_BTHd.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def attend(q_BTHd: Tensor, k_BSGd: Tensor, v_BSGd: Tensor, visible_BTS: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax attention over one set of keys, scaled by 1/sqrt(d), softmax in float32.

    visible_BTS is True where a query may look; None means everywhere. Returns out [B, T, H, d] in float32 and the
    log of the softmax denominator lse [B, T, H]; a query that sees nothing gets out 0 and lse -inf, so that
    `merge_partials` can join results over disjoint sets of keys exactly.
    """
    G, d = k_BSGd.shape[2:]
    q = q_BTHd.unflatten(2, (G, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # B G (group T) d
    k, v = k_BSGd.permute(0, 2, 3, 1), v_BSGd.permute(0, 2, 1, 3)
    logits = (q @ k).float().unflatten(2, (-1, q_BTHd.shape[1])) / math.sqrt(d)  # B G group T S
    if visible_BTS is not None:
        logits = logits.masked_fill(~visible_BTS[:, None, None], -math.inf)
    lse = logits.logsumexp(-1)
    weights = torch.exp(logits - lse.nan_to_num(neginf=0.0).unsqueeze(-1))
    out = weights.flatten(2, 3).to(v.dtype) @ v
    out = out.unflatten(2, (-1, q_BTHd.shape[1])).permute(0, 3, 1, 2, 4).flatten(2, 3)
    return out.float(), lse.permute(0, 3, 1, 2).flatten(2, 3)


def causal_attention(q_BTHd: Tensor, k_BTGd: Tensor, v_BTGd: Tensor) -> Tensor:
    """Softmax attention of every token to itself and those before it, scaled by 1/sqrt(d): [B, T, H, d] in q's type."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHd, k_BTGd, v_BTGd))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def merge_partials(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Join (out, lse) pairs of `attend` over disjoint sets of keys into the result over their union."""
    if len(parts) == 1:
        return parts[0]
    outs, lses = zip(*parts, strict=True)
    lse_P = torch.stack(lses)
    total = lse_P.logsumexp(0)
    share = torch.exp(lse_P - total.nan_to_num(neginf=0.0))
    return (torch.stack(outs) * share.unsqueeze(-1)).sum(0), total


def expert_mlp(x_ND: Tensor, expert_N: Tensor, gate_up_EDF: Tensor, down_EFD: Tensor) -> Tensor:
    """SwiGLU of row n with the weights of expert_N[n]; each expert multiplies only its own rows (spec §3.1).

    gate_up_EDF holds gate and up side by side: [E, D, 2F].
    """
    sorted_N, order_N = expert_N.sort(stable=True)
    experts_E = torch.arange(len(gate_up_EDF), device=expert_N.device)
    ends_E = torch.searchsorted(sorted_N, experts_E, right=True, out_int32=True)
    hidden_NF = swiglu(*_grouped(x_ND[order_N], gate_up_EDF, ends_E).chunk(2, -1))
    return torch.empty_like(x_ND).index_copy(0, order_N, _grouped(hidden_NF, down_EFD, ends_E))


def _grouped(x_ND: Tensor, w_EDF: Tensor, ends_E: Tensor) -> Tensor:
    """Rows up to ends_E[0] times the first weight, from there up to ends_E[1] times the second, and so on."""
    # PyTorch's operation, which needs not wait for a GPU to say how many rows there are, takes rows of 16 bytes.
    if x_ND.dtype != torch.float64 and not any(x.shape[-1] * x.itemsize % 16 for x in (x_ND, w_EDF)):
        return F.grouped_mm(x_ND, w_EDF, offs=ends_E)
    ends = [0, *ends_E.tolist()]
    rows = [x_ND[start:end] for start, end in pairwise(ends)]
    return torch.cat([x @ w for x, w in zip(rows, w_EDF.unbind(0), strict=True)])


def quantize_kv(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Symmetric codes over the last axis, x ≈ code * scale: (codes, scale float16 with the last axis dropped).

    8 bits: int8 from -127 to 127. 4 bits: -8 to 7, two to a byte (`pack_nibbles`), for an even last axis; the scale,
    of either sign, is the one of a few whose squared error is least.
    """
    x = x.float()
    if bits == 4:
        return _quantize_4(x)
    scale = (x.abs().amax(-1) / 127).clamp(min=_SMALLEST).half()
    q = (x / scale.float().unsqueeze(-1)).round().clamp(-127, 127)
    return q.to(torch.int8), scale


def _quantize_4(x: Tensor) -> tuple[Tensor, Tensor]:
    # The number furthest from 0 becomes -8 or, with a smaller scale, is cut off so that the others are finer.
    furthest = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    q, scale, least = x, furthest, torch.full_like(furthest, math.inf)
    for share in _SCALES:
        tried = (furthest * (share / -8)).half().float()
        tried = torch.where(tried.abs() < _SMALLEST, _SMALLEST, tried)
        tried_q = (x / tried).round_().clamp_(-8, 7)
        error = (tried_q * tried).sub_(x).square_().sum(-1, keepdim=True)
        better = error < least
        q, scale = torch.where(better, tried_q, q), torch.where(better, tried, scale)
        least = torch.where(better, error, least)
    return pack_nibbles(q.to(torch.int8)), scale.squeeze(-1).half()


def pack_nibbles(q: Tensor) -> Tensor:
    """Numbers from -8 to 7 [..., d] as uint8 [..., d / 2]: 8 is added, and byte i holds number i in its low half and
    number i + d / 2 in its high half."""
    low, high = (q + 8).to(torch.uint8).chunk(2, -1)
    return low | high << 4


def dequantize_kv(q: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The numbers that codes of `quantize_kv` stand for, 4 bits where they are uint8; without a scale, q itself."""
    if scale is None:
        return q.to(dtype)
    if q.dtype == torch.uint8:
        q = torch.cat([q & 15, q >> 4], -1).to(torch.int8) - 8
    return (q.to(torch.float32) * scale.float().unsqueeze(-1)).to(dtype)


class Part(Protocol):
    """Keys and values [G, N, d] of some tokens: as `quantize_kv` makes them, with scales [G, N], or float32 without."""

    @property
    def k_GNd(self) -> Tensor: ...
    @property
    def v_GNd(self) -> Tensor: ...
    @property
    def k_scale_GN(self) -> Tensor | None: ...
    @property
    def v_scale_GN(self) -> Tensor | None: ...


@dataclass(frozen=True)
class Attention:
    """Float32 results of `attend_parts`: out, log-denominators of all tokens and of each part, and the most that the
    share of the softmax (that of tokens elsewhere included) can be whose values were left out.

    Log-denominators may lack tokens whose values were left out.
    """

    out_GRd: Tensor
    lse_GR: Tensor
    lse_KGR: Tensor
    left_out_GR: Tensor


def attend_parts(q_GRd: Tensor, parts: Sequence[Part], missed: float, elsewhere_GR: Tensor | None = None) -> Attention:
    """Softmax attention of q, already scaled, over all tokens of all parts; every query sees every token.

    Tokens may be left out whose shares of the softmax are together below `missed`; here none are. elsewhere_GR: log of
    the sum of exp(logit) of tokens that are not in the parts; they count in these shares, and in nothing else.
    """
    G, R, _ = q_GRd.shape
    out_GRd, lse_GR = torch.zeros(q_GRd.shape), torch.full((G, R), -math.inf)
    lses = []
    for part in parts:
        k_GNd = dequantize_kv(part.k_GNd, part.k_scale_GN, torch.float32)
        v_GNd = dequantize_kv(part.v_GNd, part.v_scale_GN, torch.float32)
        logits_GRN = q_GRd.float() @ k_GNd.transpose(1, 2)
        lses.append(logits_GRN.logsumexp(-1))
        part_out_GRd = logits_GRN.softmax(-1) @ v_GNd
        out_GRd, lse_GR = merge_partials([(out_GRd, lse_GR), (part_out_GRd, lses[-1])])
    return Attention(out_GRd, lse_GR, torch.stack(lses), torch.zeros(G, R))


@dataclass(frozen=True)
class PlainWeight:
    """A weight [N, K] as whole numbers of steps: int8 codes of 8 or 4 bits, and float32 scales [N, K / group]."""

    q_NK: Tensor
    scale_Ng: Tensor
    bits: int


def pack(w_NK: Tensor, bits: int, group: int) -> PlainWeight:
    """A weight rounded to the nearest codes, for `linear`, symmetric: 8 bits from -127 to 127, 4 bits from -8 to 7
    (spec §7).

    K is a multiple of 8. group: how many inputs share a scale at most, see `herd.formats.fitting_group`.
    """
    group = fitting_group(w_NK.shape[1], group)
    low, high = (-127, 127) if bits == 8 else (-8, 7)
    w_NgK = w_NK.float().unflatten(1, (-1, group))
    scale_Ng = w_NgK.abs().amax(-1).clamp(min=1e-6) / -low
    q_NgK = (w_NgK / scale_Ng.unsqueeze(-1)).round().clamp(low, high)
    return PlainWeight(q_NgK.flatten(1).to(torch.int8).contiguous(), scale_Ng, bits)


def linear(x: Tensor, weight: PlainWeight) -> Tensor:
    """x [..., K] times weight^T, [..., N] in x's type. Each row is quantised to int8 over the same groups of inputs."""
    groups = weight.scale_Ng.shape[1]
    x_MgK = x.flatten(0, -2).float().unflatten(1, (groups, -1))
    most_Mg1 = x_MgK.abs().amax(-1, keepdim=True)
    # Not 127 / most, which torch computes as a reciprocal times 127: another number, and ties are frequent in bfloat16.
    inverse_Mg1 = (torch.tensor(127.0) / most_Mg1).nan_to_num(posinf=0.0)
    q_gMK = (x_MgK * inverse_Mg1).round().transpose(0, 1)
    w_gKN = weight.q_NK.float().unflatten(1, (groups, -1)).permute(1, 2, 0)
    out_MN = (q_gMK @ w_gKN * (most_Mg1 / 127).transpose(0, 1) * weight.scale_Ng.T.unsqueeze(1)).sum(0)
    return out_MN.to(x.dtype).unflatten(0, x.shape[:-1])
