"""Quantised models: what is quantised, how far off they are, and what is refused."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn

from herd.errors import ConfigError
from herd.kernels import reference
from herd.model import Transformer
from herd.model.moe import Experts
from herd.model.quantized import QuantizedExperts, QuantizedLinear, quantize
from tests.model.tiny_models import tiny

CONFIG = tiny(
    hidden_size=64,
    num_hidden_layers=3,
    head_dim=16,
    intermediate_size=32,
    intermediate_size_mlp=128,
    moe_layers=(1,),
    no_rope_layers=(1, 0, 1),
)


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(CONFIG).eval()


@torch.inference_mode()
def test_a_quantised_model_is_close_and_eight_bits_are_closer(model: Transformer) -> None:
    ids = torch.randint(96, (2, 40), generator=torch.Generator().manual_seed(1))
    exact = model(ids)
    off = {}
    for bits in (8, 4):
        other = deepcopy(model)
        quantize(other, bits, 32)
        off[bits] = float((other(ids) - exact).norm() / exact.norm())
    assert off[8] < 0.02 < off[4] < 0.3


def test_everything_but_routers_embeddings_and_norms_is_quantised(model: Transformer) -> None:
    other = deepcopy(model)
    quantize(other, 8, 32)
    left = {name for name, part in other.named_modules() if isinstance(part, nn.Linear | Experts)}
    assert left == {"model.layers.1.feed_forward.router"}
    assert sum(isinstance(part, QuantizedLinear) for part in other.modules()) == 3 * 4 + 2 * 3 + 3 + 1
    assert torch.equal(other.model.embed_tokens.weight, model.model.embed_tokens.weight)


@torch.inference_mode()
def test_each_row_goes_through_its_own_expert(model: Transformer) -> None:
    experts = model.blocks[1].feed_forward.experts
    quantised, x_ND = QuantizedExperts(experts, 8, 32), torch.randn(7, 64)
    expert_N = torch.tensor([3, 0, 0, 2, 3, 3, 0])
    found_ND = quantised(x_ND, expert_N)
    for n, e in enumerate(expert_N.tolist()):
        torch.testing.assert_close(quantised(x_ND[n : n + 1], torch.tensor([e]))[0], found_ND[n])
    assert (found_ND - experts(x_ND, expert_N)).norm() < 0.03 * found_ND.norm()


def test_what_does_not_fit_is_refused(model: Transformer) -> None:
    with pytest.raises(ConfigError, match="8 or 4 bits in groups of 8 or more, not 3 in 32"):
        quantize(deepcopy(model), 3, 32)
    odd = Transformer(replace(CONFIG, intermediate_size_mlp=100))
    with pytest.raises(ConfigError, match=r"down_proj has 100 inputs; only multiples of 8"):
        quantize(odd, 8, 128)


def test_groups_are_as_large_as_fit() -> None:
    assert [reference.fitting_group(K, 256) for K in (64, 576, 1024, 8)] == [64, 192, 256, 8]
    assert reference.pack(torch.randn(3, 576), 8, 256).scale_gN.shape == (3, 3)


def test_the_reference_quantises_within_half_a_step() -> None:
    w_NK = torch.randn(5, 64)
    for bits, steps in ((8, 127), (4, 8)):
        weight = reference.pack(w_NK, bits, 32)
        step_NgK = weight.scale_gN.T.unsqueeze(-1)
        back = (weight.q_NK.unflatten(1, (2, 32)) * step_NgK).flatten(1)
        # In 4 bits 8 is not a number: the largest positive ones lose up to a whole step.
        limit = 0.5 if bits == 8 else 1.0
        assert ((w_NK - back).abs().unflatten(1, (2, 32)) <= (limit + 1e-4) * step_NgK).all()
        assert torch.allclose(weight.scale_gN.max() * steps, w_NK.abs().max())
