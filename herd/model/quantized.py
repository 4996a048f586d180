"""Models whose weights are in other formats than bfloat16, or packed for the native library.

Layers that compute in PyTorch hold a quantised weight each (`QuantizedLinear`). Where the native library runs the
layers (`Packed`), weights of one input are packed together. Both are made of numbers, which are rounded to the nearest
of the format, or of codes that are known (`herd.model.calibrate`).

Shape suffixes: N tokens, D hidden, F expert width, E experts.
"""

from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor, nn

from herd.errors import ConfigError
from herd.formats import Format, Weights
from herd.kernels import PlainWeight, Weight, kept_codes, linear, native, panels, runs_layers, scaled, swiglu
from herd.kernels import pack as pack_weight
from herd.kernels.heap import give_back
from herd.kernels.layers import Layer, Mlp, interleaved
from herd.kernels.native import PackedWeight
from herd.model.moe import Experts, MoE
from herd.model.packed import Packed
from herd.model.transformer import Block, Transformer

Rows = Tensor | PlainWeight  # [out, in]
Fill = Callable[[nn.Module, str], None]  # gives a module its values, by what stands before the names of its weights


def _filled(module: nn.Module, prefix: str) -> None:
    """`Fill` of models that have all values."""


class QuantizedLinear(nn.Module):
    def __init__(self, weight: Weight) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class QuantizedExperts(nn.Module):
    """As `Experts`, one weight [out, in] for each expert."""

    def __init__(self, gate_up: list[Weight], down: list[Weight]) -> None:
        super().__init__()
        self.gate_up, self.down = gate_up, down

    def forward(self, x_ND: Tensor, expert_N: Tensor) -> Tensor:
        out_ND = torch.empty_like(x_ND)
        for e in expert_N.unique().tolist():
            rows = (expert_N == e).nonzero().flatten()
            gate, up = linear(x_ND[rows], self.gate_up[e]).chunk(2, -1)
            out_ND[rows] = linear(swiglu(gate, up), self.down[e])
        return out_ND


def quantize(transformer: Transformer, weights: Weights, fill: Fill = _filled) -> None:
    """Round the weights of each part to its format, in place. Embeddings, norms and routers stay as they are, and so
    does what is quantised already.

    Where the native library can, it runs the layers from then on (`Packed`). fill: is asked for the values of each
    layer when its turn comes, and then of the head. ConfigError if a part has sizes that its format cannot have.
    """
    check(transformer, weights)
    if runs_layers(transformer.model.embed_tokens.weight, transformer.config.head_dim):
        pack(transformer, weights, fill)
        return
    for at, block in enumerate(transformer.blocks):
        fill(block, f"model.layers.{at}.")
        attn, ff = block.self_attn, block.feed_forward
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(attn, name, _rounded(getattr(attn, name), weights.attention_of(attn.local)))
        shared = ff.shared_expert if isinstance(ff, MoE) else ff
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(shared, name, _rounded(getattr(shared, name), weights.shared))
        if isinstance(ff, MoE) and isinstance(ff.experts, Experts) and weights.experts.kind != "bf16":
            # Quantised as [out, in]; checkpoints hold [in, out].
            pair = (ff.experts.gate_up_proj.detach(), ff.experts.down_proj.detach())
            gate_up, down = ([pack_weight(w.T, weights.experts) for w in part] for part in pair)
            ff.experts = QuantizedExperts(gate_up, down)  # type: ignore[assignment]
    fill(transformer.lm_head, "lm_head.")
    transformer.lm_head = _rounded(transformer.lm_head, weights.head)  # type: ignore[assignment]


def check(transformer: Transformer, weights: Weights) -> None:
    """ConfigError if a part has sizes that its format cannot have."""
    packed = runs_layers(transformer.model.embed_tokens.weight, transformer.config.head_dim)
    for name, form, N, K in _sizes(transformer, weights):
        if form.whole and K % 8:
            raise ConfigError(f"{name} has {K} inputs; {form} needs a multiple of 8")
        if form.kind == "fp8" and not packed and (N % 16 or K % 16):
            raise ConfigError(f"{name} has {N} outputs and {K} inputs; fp8 needs multiples of 16")
        if packed and K % 2:
            raise ConfigError(f"{name} has {K} inputs; beside other formats, bf16 needs a multiple of 2")


def pack_halves(transformer: Transformer, fill: Fill = _filled) -> None:
    """Let the native library run a model in bfloat16, where it can. fill: as of `quantize`."""
    if runs_layers(transformer.model.embed_tokens.weight, transformer.config.head_dim) and not any(
        K % 2 for _, _, _, K in _sizes(transformer, Weights())
    ):
        pack(transformer, Weights(), fill)


def pack(transformer: Transformer, weights: Weights, fill: Fill = _filled) -> None:
    """Let the native library run a transformer, whose layers and head are given up for that, one after the other."""
    blocks, packed = transformer.blocks, list[Layer]()
    transformer.model.layers = nn.ModuleList()  # type: ignore[assignment]
    while blocks:
        fill(blocks[0], f"model.layers.{len(packed)}.")
        packed.append(pack_block(blocks.pop(0), weights))
        give_back()
    fill(transformer.lm_head, "lm_head.")
    head = pack_rows(_rows(transformer.lm_head), weights.head)
    transformer.packed = Packed(transformer.config, packed, transformer.model.norm.weight.detach().float(), head)
    del transformer.lm_head


def pack_block(block: Block, weights: Weights) -> Layer:
    """One layer for the native library; the block loses its experts. Weights that are quantised already keep their
    codes."""
    attn, ff = block.self_attn, block.feed_forward
    moe, shared = (ff, ff.shared_expert) if isinstance(ff, MoE) else (None, ff)
    qkv = _changed(lambda *parts: torch.cat(parts), _rows(attn.q_proj), _rows(attn.k_proj), _rows(attn.v_proj))
    return Layer(
        attention_norm_D=block.input_layernorm.weight.detach().float(),
        mlp_norm_D=block.post_attention_layernorm.weight.detach().float(),
        qkv=pack_rows(qkv, weights.attention_of(attn.local)),
        out=pack_rows(_rows(attn.o_proj), weights.attention_of(attn.local)),
        shared=_mlp(_rows(shared.gate_proj), _rows(shared.up_proj), _rows(shared.down_proj), weights.shared),
        experts=() if moe is None else tuple(_experts(moe.experts, weights.experts)),
        router_ED=None if moe is None else moe.router.weight.detach().float().contiguous(),
        top_k=0 if moe is None else moe.top_k,
        local=attn.local,
        qk_norm=attn.cfg.use_qk_norm,
    )


def pack_rows(rows: Rows, form: Format) -> PackedWeight:
    """Numbers rounded to a format and packed for the native library, or codes as they are."""
    if isinstance(rows, PlainWeight):
        return panels.pack_codes(rows.q_NK, rows.scale_Ng, rows.bits)
    if form.kind == "fp8":
        rows = scaled.numbers_fp8(scaled.pack_fp8(rows))
    return native.pack(rows, *form.packed)


def _rounded(layer: nn.Module, form: Format) -> nn.Module:
    if form.kind == "bf16" or isinstance(layer, QuantizedLinear):
        return layer
    return QuantizedLinear(pack_weight(cast(nn.Linear, layer).weight.detach(), form))


def _rows(layer: nn.Module) -> Rows:
    """The weight of a linear layer: numbers, or codes if it is quantised."""
    return kept_codes(layer.weight) if isinstance(layer, QuantizedLinear) else cast(nn.Linear, layer).weight.detach()


def _changed(change: Callable[..., Tensor], *weights: Rows) -> Rows:
    """Weights whose rows are joined, put in another order or left out: all of them numbers, or all codes."""
    codes = [w for w in weights if isinstance(w, PlainWeight)]
    if not codes:
        return change(*weights)
    assert len(codes) == len(weights) and len({w.bits for w in codes}) == 1
    return PlainWeight(change(*(w.q_NK for w in codes)), change(*(w.scale_Ng for w in codes)), codes[0].bits)


def _mlp(gate_FD: Rows, up_FD: Rows, down_DF: Rows, form: Format) -> Mlp:
    return Mlp(pack_rows(_changed(interleaved, gate_FD, up_FD), form), pack_rows(down_DF, form))


def _experts(experts: nn.Module, form: Format) -> list[Mlp]:
    """All gates and ups, then all downs, so that a layer's numbers are given up in two steps."""
    gate_ups = list[PackedWeight]()
    for rows in _given_up(experts, "gate_up"):
        gate, up = (_changed(lambda rows, half=half: rows.chunk(2)[half], rows) for half in (0, 1))
        gate_ups.append(pack_rows(_changed(interleaved, gate, up), form))
        del rows, gate, up
        give_back()
    downs = [pack_rows(rows, form) for rows in _given_up(experts, "down")]
    return list(map(Mlp, gate_ups, downs))


def _given_up(experts: nn.Module, part: str) -> Iterator[Rows]:
    """Gates above ups, or down, of each expert, [out, in]; the experts lose them."""
    if isinstance(experts, QuantizedExperts):
        yield from map(kept_codes, getattr(experts, part))
        return
    weight_EKN = getattr(experts, f"{part}_proj").detach()
    delattr(experts, f"{part}_proj")
    yield from (weight_KN.T for weight_KN in weight_EKN)


def _sizes(transformer: Transformer, weights: Weights) -> Iterator[tuple[str, Format, int, int]]:
    """Name, format, outputs and inputs of every weight that has a format."""
    for name, layer in transformer.named_modules():
        if isinstance(layer, Experts):
            for weight in (layer.gate_up_proj, layer.down_proj):
                yield name, weights.experts, weight.shape[2], weight.shape[1]
        elif isinstance(layer, nn.Linear) and not name.endswith(".router"):
            form = weights.head if name == "lm_head" else weights.shared
            if ".self_attn." in name:
                form = weights.attention_of(transformer.config.is_local(int(name.split(".")[2])))
            yield name, form, layer.out_features, layer.in_features
