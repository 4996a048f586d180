"""Weights in 8 and 4 bits that were rounded for what they multiply, on the inputs that some text gives them.

Of a weight with inputs x, codes are sought whose products are near the weight's: a small sum of |(w - codes scale) x|²,
which the second moments of x, H = mean of x xᵀ, tell. Inputs are rounded one after the other, and what one loses, the
others of the same output make up for as far as H says that they go together ("error feedback", as in GPTQ and Optimal
Brain Surgeon). Layers are calibrated bottom to top, each on what the calibrated ones below it give.

Shape suffixes: B rows of text, T tokens, M tokens of all rows, D hidden, N outputs, K inputs, g groups, E experts.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from herd.errors import ConfigError
from herd.formats import Format, Weights, fitting_group
from herd.kernels import PlainWeight, linear, place, swiglu
from herd.model.moe import Experts, MoE
from herd.model.quantized import QuantizedExperts, QuantizedLinear, check, quantize
from herd.model.transformer import Block, Transformer

DAMPING = 0.01  # of the mean second moment, added to each: inputs are a little alike in all directions
_SHARES = [1 - i / 40 for i in range(21)]  # of the scale that cuts nothing off
_ENOUGH = 4  # tokens for each input
_OUTPUTS = 2048  # that are rounded together: their groups stay in the cache
_ROWS = 4096  # that moments are added up of at a time


@torch.inference_mode()
def calibrate(
    transformer: Transformer, ids_BT: Tensor, weights: Weights, progress: Callable[[int, int], None] | None = None
) -> None:
    """Do what `quantize` does, with codes that are calibrated on these texts, each a row of tokens from position 0.

    Parts in bf16 and fp8 are as `quantize` leaves them. The result depends on nothing but the arguments. Beside the
    model there are one layer in float32, its moments, and the states of all texts in memory. progress: called with the
    layers that are done, and of all. ConfigError as of `quantize`, or if states are no finite numbers.
    """
    check(transformer, weights)
    x_BTD, blocks = transformer.model.embed_tokens(ids_BT), transformer.blocks
    for done, block in enumerate(blocks, 1):
        x_BTD = calibrate_block(block, x_BTD, weights)
        if progress is not None:
            progress(done, len(blocks))
    calibrate_layers(transformer, ("lm_head",), transformer.model.norm(x_BTD), weights.head)
    quantize(transformer, weights)


def calibrate_block(block: Block, x_BTD: Tensor, weights: Weights) -> Tensor:
    """Calibrate one layer in place; what it then makes of the states below it."""
    positions_BT = torch.arange(x_BTD.shape[1], device=x_BTD.device).expand(x_BTD.shape[:2])
    attn, ff, form = block.self_attn, block.feed_forward, weights.attention_of(block.self_attn.local)
    normed_BTD = block.input_layernorm(x_BTD)
    calibrate_layers(attn, ("q_proj", "k_proj", "v_proj"), normed_BTD, form)
    attended = attn.attended(normed_BTD, positions_BT, None)
    calibrate_layers(attn, ("o_proj",), attended, form)
    x_BTD = x_BTD + attn.o_proj(attended)
    normed_BTD = block.post_attention_layernorm(x_BTD)
    shared = ff.shared_expert if isinstance(ff, MoE) else ff
    calibrate_layers(shared, ("gate_proj", "up_proj"), normed_BTD, weights.shared)
    hidden = swiglu(shared.gate_proj(normed_BTD), shared.up_proj(normed_BTD))
    calibrate_layers(shared, ("down_proj",), hidden, weights.shared)
    if isinstance(ff, MoE) and weights.experts.whole:
        ff.experts = cast(Experts, _calibrated_experts(ff, normed_BTD.flatten(0, -2), weights.experts))
    return x_BTD + ff(normed_BTD)


def calibrate_layers(parent: nn.Module, names: tuple[str, ...], x: Tensor, form: Format) -> None:
    """Put calibrated layers in the places of linear ones that share their inputs x [..., K]."""
    if form.whole:
        weights = [cast(nn.Linear, getattr(parent, name)).weight.detach() for name in names]
        together = with_feedback(torch.cat(weights), moments(x.flatten(0, -2)), form)
        codes, scales = (part.split([len(w) for w in weights]) for part in (together.q_NK, together.scale_Ng))
        for name, q_NK, scale_Ng in zip(names, codes, scales, strict=True):
            setattr(parent, name, QuantizedLinear(place(PlainWeight(q_NK, scale_Ng, form.bits))))


def _calibrated_experts(moe: MoE, x_MD: Tensor, form: Format) -> QuantizedExperts:
    """Each expert on the tokens that are routed to it.

    If they are too few to tell what goes together, others are added, evenly spread, as this expert would see them.
    """
    experts = moe.experts
    routed_ND, expert_N = moe.route(x_MD)
    gate_up, down = [], []
    for e, (gate_up_DF, down_FD) in enumerate(zip(experts.gate_up_proj, experts.down_proj, strict=True)):
        inputs = routed_ND[expert_N == e]
        if (lacking := min(_ENOUGH * len(gate_up_DF) - len(inputs), len(x_MD))) > 0:
            others_MD = x_MD[:: len(x_MD) // lacking][:lacking]
            inputs = torch.cat([inputs, _scored(moe, others_MD, e)])
        gate_up.append(place(with_feedback(gate_up_DF.T, moments(inputs), form)))
        hidden = swiglu(*linear(inputs, gate_up[-1]).chunk(2, -1))
        down.append(place(with_feedback(down_FD.T, moments(hidden), form)))
    return QuantizedExperts(gate_up, down)


def _scored(moe: MoE, x_MD: Tensor, expert: int) -> Tensor:
    """What an expert would see of tokens."""
    return torch.sigmoid(moe.router(x_MD)[:, expert : expert + 1].float()).to(x_MD.dtype) * x_MD


def moments(x_MK: Tensor) -> Tensor:
    """Mean of x xᵀ, float32 [K, K]."""
    total_KK = x_MK.new_zeros(x_MK.shape[1], x_MK.shape[1], dtype=torch.float32)
    for rows in x_MK.split(_ROWS):
        total_KK.addmm_(rows.float().T, rows.float())
    return total_KK / max(len(x_MK), 1)


def with_feedback(w_NK: Tensor, H_KK: Tensor, form: Format) -> PlainWeight:
    """Codes of a weight whose products with inputs of such moments are near those of the weight."""
    U_KK, group = _errors_spread(H_KK), fitting_group(len(H_KK), form.group)
    parts = [_rounded(rows.float().T.contiguous(), U_KK, form.bits, group) for rows in w_NK.split(_OUTPUTS)]
    codes, scales = zip(*parts, strict=True)
    return PlainWeight(torch.cat(codes), torch.cat(scales), form.bits)


def _rounded(left_KN: Tensor, U_KK: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Codes [N, K] and scales [N, g] of some outputs; left_KN, what is still to be rounded, is used up."""
    K, N = left_KN.shape
    low, high = (-127, 127) if bits == 8 else (-8, 7)
    q_KN, scale_gN = torch.empty_like(left_KN), left_KN.new_empty(K // group, N)
    for g, first in enumerate(range(0, K, group)):
        end = first + group
        piece_kN, spread_kK = left_KN[first:end], U_KK[first:end]
        scale_gN[g] = scale_N = best_scale(piece_kN, spread_kK[:, first:end].diagonal() ** -2, bits)
        lost_kN = torch.empty_like(piece_kN)
        for k in range(group):
            q_KN[first + k] = code_N = (piece_kN[k] / scale_N).round_().clamp_(low, high)
            lost_kN[k] = (piece_kN[k] - code_N * scale_N) / spread_kK[k, first + k]
            piece_kN[k + 1 :].addr_(spread_kK[k, first + k + 1 : end], lost_kN[k], alpha=-1)
        left_KN[end:].addmm_(spread_kK[:, end:].T, lost_kN, alpha=-1)
    return q_KN.T.to(torch.int8).contiguous(), scale_gN.T.contiguous()


def _errors_spread(H_KK: Tensor) -> Tensor:
    """Upper triangular [K, K]: row k tells where an error of input k goes, among the inputs behind it."""
    mean, one_KK = H_KK.diagonal().mean().clamp(min=1e-12), torch.eye(len(H_KK), device=H_KK.device)
    for damping in (DAMPING, 10 * DAMPING, 100 * DAMPING):  # more where float32 is too coarse for less
        factor_KK, failed = torch.linalg.cholesky_ex(H_KK + damping * mean * one_KK)
        if not failed:
            spread_KK, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor_KK), upper=True)
        if not failed:
            return spread_KK
    raise ConfigError("a layer's inputs are no finite numbers on this text, so that it cannot be calibrated")


def best_scale(w_kN: Tensor, matters_k: Tensor, bits: int) -> Tensor:
    """The scale [N] of each output's group of k inputs, of either sign, whose weighted squared error is least.

    The number furthest from 0 becomes the lowest code or, with a smaller scale, is cut off so that others are finer.
    """
    if bits == 8:
        return w_kN.abs().amax(0).clamp(min=1e-6) / 127
    furthest_N = w_kN.gather(0, w_kN.abs().argmax(0, keepdim=True))[0]
    furthest_N = torch.where(furthest_N.abs() < 1e-6, 1e-6, furthest_N)
    best_N, least_N = furthest_N / -8, torch.full_like(furthest_N, torch.inf)
    for share in _SHARES:
        scale_N = furthest_N * (share / -8)
        error_kN = (w_kN / scale_N).round_().clamp_(-8, 7).mul_(scale_N).sub_(w_kN)
        error_N = matters_k @ error_kN.square_()
        best_N = torch.where(error_N < least_N, scale_N, best_N)
        least_N = torch.minimum(error_N, least_N)
    return best_N
