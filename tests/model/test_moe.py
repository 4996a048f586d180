"""The mixture of experts: score on the input, sum over the chosen experts, work for the chosen ones only."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from herd.kernels import reference
from herd.model.moe import MoE
from tests.model.tiny_models import tiny

D, F = 32, 48


def moe(**changes: Any) -> MoE:
    torch.manual_seed(0)
    layer = MoE(tiny(**changes))
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return layer


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(1))


def expert(layer: MoE, e: int, x: Tensor) -> Tensor:
    """Expert e as spec §3.2 lays it out: gate in the first F columns, up in the last, matrices [in, out]."""
    gate_up, down = layer.experts.gate_up_proj[e], layer.experts.down_proj[e]
    return silu(x @ gate_up[:, :F]) * (x @ gate_up[:, F:]) @ down


def by_hand(layer: MoE, x: Tensor, top_k: int) -> Tensor:
    """Spec §3.1, one token after the other."""
    rows = []
    for token in x.view(-1, D):
        logits = layer.router.weight @ token
        out = layer.shared_expert(token)
        for e in logits.argsort(descending=True)[:top_k].tolist():
            out = out + expert(layer, e, torch.sigmoid(logits[e]) * token)
        rows.append(out)
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize("top_k", [1, 2, 4])
@torch.inference_mode()
def test_moe_by_hand(top_k: int) -> None:
    layer = moe(num_experts_per_tok=top_k)
    x = inputs(2, 5)
    torch.testing.assert_close(layer(x), by_hand(layer, x, top_k), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_identical_experts() -> None:
    """Spec §13: out = Shared(x) + Expert(σ(max logit) · x); scaling the output instead would be wrong."""
    layer = moe()
    for weight in (layer.experts.gate_up_proj, layer.experts.down_proj):
        weight.copy_(weight[:1].expand_as(weight))
    x = inputs(3, 4)
    score = torch.sigmoid(layer.router(x).amax(-1, keepdim=True))
    torch.testing.assert_close(layer(x), layer.shared_expert(x) + expert(layer, 0, score * x), rtol=1e-4, atol=1e-4)
    on_output = layer.shared_expert(x) + score * expert(layer, 0, x)
    assert (layer(x) - on_output).abs().max() > 0.1


def test_gradients_reach_the_router_through_the_score() -> None:
    layer, copy = moe(num_experts_per_tok=2), moe(num_experts_per_tok=2)
    x = inputs(2, 3)
    layer(x).square().sum().backward()
    by_hand(copy, x, 2).square().sum().backward()
    assert layer.router.weight.grad is not None and (layer.router.weight.grad != 0).any()
    for (name, ours), theirs in zip(layer.named_parameters(), copy.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-3, msg=name)


@torch.inference_mode()
def test_no_token_and_one_token() -> None:
    layer = moe()
    assert layer(inputs(1, 0)).shape == (1, 0, D)
    x = inputs(3, 1)
    torch.testing.assert_close(torch.cat([layer(row[None]) for row in x]), layer(x), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_work_does_not_grow_with_the_number_of_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every matrix product is over rows of its own expert: as many rows in all as tokens times top-k."""
    rows: list[int] = []

    def counting(gate: Tensor, up: Tensor) -> Tensor:
        rows.append(len(gate))
        return silu(gate) * up

    monkeypatch.setattr(reference, "swiglu", counting)
    for experts, top_k in ((4, 1), (32, 1), (32, 3)):
        rows.clear()
        moe(num_local_experts=experts, num_experts_per_tok=top_k)(inputs(2, 10))
        assert sum(rows) == 20 * top_k
        assert 0 not in rows, "an expert without tokens does nothing"
