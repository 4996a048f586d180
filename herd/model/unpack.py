"""Weights that were packed for the native library as PyTorch's layers, where that is not there: right, but slow.

Shape suffixes: N outputs, F expert width, D hidden.
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from herd.kernels import PlainWeight, kept_codes, panels, place
from herd.kernels.layers import Layer, Mlp, apart
from herd.kernels.native import PackedWeight
from herd.model.moe import DenseMLP, Experts, MoE
from herd.model.quantized import QuantizedExperts, QuantizedLinear, Rows
from herd.model.transformer import Transformer


def unpack(transformer: Transformer, packed: Sequence[Layer], head: PackedWeight) -> None:
    """Fill layers and head of a transformer, whose embedding is there and tells the type of activations."""
    cfg, dtype = transformer.config, transformer.model.embed_tokens.weight.dtype
    transformer.lm_head = _linear(_rows(head, dtype))
    transformer.model.norm.weight = _parameter(transformer.model.norm.weight.to(dtype))
    heads = [n * cfg.head_dim for n in (cfg.num_attention_heads, cfg.num_key_value_heads, cfg.num_key_value_heads)]
    for block, layer in zip(transformer.blocks, packed, strict=True):
        block.input_layernorm.weight = _parameter(layer.attention_norm_D.to(dtype))
        block.post_attention_layernorm.weight = _parameter(layer.mlp_norm_D.to(dtype))
        attn, qkv = block.self_attn, _rows(layer.qkv, dtype)
        attn.q_proj, attn.k_proj, attn.v_proj = (_linear(part) for part in _parts(qkv, lambda w: w.split(heads)))
        attn.o_proj = _linear(_rows(layer.out, dtype))
        if not isinstance(block.feed_forward, MoE):
            _fill(block.feed_forward, layer.shared, cfg.intermediate_size_mlp, dtype)
            continue
        assert layer.router_ED is not None
        moe, F = block.feed_forward, cfg.intermediate_size
        moe.router.weight = _parameter(layer.router_ED.to(dtype))
        _fill(moe.shared_expert, layer.shared, F, dtype)
        moe.experts = cast(Experts, _experts(layer.experts, F, dtype))


def _rows(weight: PackedWeight, dtype: torch.dtype) -> Rows:
    return panels.numbers(weight).to(dtype) if weight.bits == 16 else kept_codes(weight)


def _parts(rows: Rows, cut: Callable[[Tensor], Sequence[Tensor]]) -> list[Rows]:
    """Some of the outputs each."""
    if isinstance(rows, Tensor):
        return list(cut(rows))
    return [PlainWeight(q, scale, rows.bits) for q, scale in zip(cut(rows.q_NK), cut(rows.scale_Ng), strict=True)]


def _linear(rows: Rows) -> nn.Linear:
    if isinstance(rows, PlainWeight):
        return cast(nn.Linear, QuantizedLinear(place(rows)))
    with torch.device("meta"):
        linear = nn.Linear(1, 1, bias=False)
    linear.weight = _parameter(rows)
    return linear


def _parameter(x: Tensor) -> nn.Parameter:
    return nn.Parameter(x, requires_grad=False)


def _fill(mlp: DenseMLP, packed: Mlp, F: int, dtype: torch.dtype) -> None:
    gate_up = _rows(packed.gate_up, dtype)
    mlp.gate_proj, mlp.up_proj = (_linear(part) for part in _parts(gate_up, lambda w: apart(w, F)))
    mlp.down_proj = _linear(_rows(packed.down, dtype))


def _experts(packed: Sequence[Mlp], F: int, dtype: torch.dtype) -> nn.Module:
    gate_up = [_parts(_rows(e.gate_up, dtype), lambda w: (torch.cat(apart(w, F)),))[0] for e in packed]
    down = [_rows(e.down, dtype) for e in packed]
    if isinstance(down[0], PlainWeight):
        return QuantizedExperts(*([place(cast(PlainWeight, w)) for w in part] for part in (gate_up, down)))
    experts = Experts.__new__(Experts)
    nn.Module.__init__(experts)
    experts.gate_up_proj, experts.down_proj = (
        _parameter(torch.stack([cast(Tensor, w).T for w in part])) for part in (gate_up, down)
    )
    return experts
