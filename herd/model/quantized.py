"""A model whose linear layers hold weights in 8 or 4 bits; activations are quantised to int8 as they come.

Shape suffixes: N tokens, D hidden, F expert width, E experts.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from herd.errors import ConfigError
from herd.kernels import Weight, linear, runs_layers, swiglu
from herd.kernels import pack as pack_weight
from herd.model.moe import Experts, MoE
from herd.model.packed import Bits, pack
from herd.model.transformer import Transformer


class QuantizedLinear(nn.Module):
    def __init__(self, weight: Tensor, bits: int, group: int) -> None:
        super().__init__()
        self.weight = pack_weight(weight.detach(), bits, group)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class QuantizedExperts(nn.Module):
    """As `Experts`, one packed weight for each expert."""

    def __init__(self, experts: Experts, bits: int, group: int) -> None:
        super().__init__()
        # Packed as [out, in]; checkpoints hold [in, out].
        self.gate_up: list[Weight] = [pack_weight(w.detach().T, bits, group) for w in experts.gate_up_proj]
        self.down: list[Weight] = [pack_weight(w.detach().T, bits, group) for w in experts.down_proj]

    def forward(self, x_ND: Tensor, expert_N: Tensor) -> Tensor:
        out_ND = torch.empty_like(x_ND)
        for e in expert_N.unique().tolist():
            rows = (expert_N == e).nonzero().flatten()
            gate, up = linear(x_ND[rows], self.gate_up[e]).chunk(2, -1)
            out_ND[rows] = linear(swiglu(gate, up), self.down[e])
        return out_ND


def quantize(transformer: Transformer, bits: int, group: int) -> None:
    """Quantise every linear layer in place, the head included; embeddings, norms and routers stay as they are.

    Where the native library can, it runs the layers from then on (`Packed`). ConfigError if bits is not 8 or 4, or a
    layer's inputs are no multiple of group, or that of 8.
    """
    if bits not in (4, 8) or group < 8:
        raise ConfigError(f"weights can have 8 or 4 bits in groups of 8 or more, not {bits} in {group}")
    for name, inputs in _inputs(transformer):
        if inputs % 8:
            raise ConfigError(f"{name} has {inputs} inputs; only multiples of 8 can be quantised")
    if runs_layers(transformer.lm_head.weight, transformer.config.head_dim):
        pack(transformer, Bits(bits, group))
        return
    for parent in list(transformer.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, Experts):
                setattr(parent, name, QuantizedExperts(layer, bits, group))
            elif isinstance(layer, nn.Linear) and not (isinstance(parent, MoE) and name == "router"):
                setattr(parent, name, QuantizedLinear(layer.weight, bits, group))


def pack_halves(transformer: Transformer) -> None:
    """Let the native library run a model in bfloat16, where it can."""
    if runs_layers(transformer.lm_head.weight, transformer.config.head_dim) and not any(
        inputs % 2 for _, inputs in _inputs(transformer)
    ):
        pack(transformer, Bits(16, 0))


def _inputs(transformer: Transformer) -> Iterator[tuple[str, int]]:
    for name, layer in transformer.named_modules():
        if isinstance(layer, nn.Linear) and not name.endswith(".router"):
            yield name, layer.in_features
        elif isinstance(layer, Experts):
            yield from ((name, weight.shape[1]) for weight in (layer.gate_up_proj, layer.down_proj))
