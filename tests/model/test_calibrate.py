"""Calibrated weights: nearer to what they multiply than rounded ones, the same again, and nothing else changed."""

from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from herd import kernels
from herd.errors import ConfigError
from herd.formats import Format, parse
from herd.kernels import reference
from herd.kernels.reference import PlainWeight
from herd.model import Transformer
from herd.model.calibrate import best_scale, calibrate, moments, with_feedback
from herd.model.quantized import QuantizedExperts, quantize
from tests.model.tiny_models import build, tiny

CONFIG = tiny(hidden_size=64, head_dim=16, intermediate_size=64, intermediate_size_mlp=96, moe_layers=(1, 3))
fast = settings(max_examples=20, deadline=None, derandomize=True)


def numbers(weight: PlainWeight) -> Tensor:
    return (weight.q_NK.unflatten(1, (weight.scale_Ng.shape[1], -1)) * weight.scale_Ng.unsqueeze(-1)).flatten(1)


def alike(M: int, K: int, seed: int) -> Tensor:
    """Inputs that go together: few things make up most of them, and some are large."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(M, 6, generator=generator) @ torch.randn(6, K, generator=generator)
    return (few + 0.3 * torch.randn(M, K, generator=generator)) * torch.rand(K, generator=generator).add(0.2) ** -1


@fast
@given(st.integers(20, 60), st.sampled_from([(32, 8), (96, 32), (64, 64)]), st.integers(0, 99))
def test_products_are_nearer_than_those_of_rounded_weights(N: int, sizes: tuple[int, int], seed: int) -> None:
    K, group = sizes
    w_NK = torch.randn(N, K, generator=torch.Generator().manual_seed(seed))
    x_MK = alike(500, K, seed)
    found = with_feedback(w_NK, moments(x_MK), Format("int4", group))
    assert found.q_NK.min() >= -8 and found.q_NK.max() <= 7
    assert found.scale_Ng.shape == (N, K // group)
    off, rounded = (float(((numbers(each) - w_NK) @ x_MK.T).norm()) for each in (found, reference.pack(w_NK, 4, group)))
    assert off < 0.75 * rounded


def test_inputs_that_have_nothing_in_common_are_rounded_each_for_itself() -> None:
    w_NK = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    for kind, high in (("int4", 7), ("int8", 127)):
        found = with_feedback(w_NK, torch.eye(64) * 3.0, Format(kind, 32))
        nearest = (w_NK.unflatten(1, (2, 32)) / found.scale_Ng.unsqueeze(-1)).round().clamp(-high - (high == 7), high)
        assert torch.equal(found.q_NK, nearest.flatten(1).to(torch.int8))


def test_inputs_that_are_all_but_the_same_or_none_at_all() -> None:
    w_NK, form = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)), Format("int4", 8)
    for x_MK in (
        torch.ones(9, 32) * 1e9,
        torch.cat([torch.full((9, 1), 1e9), torch.full((9, 31), 1e-9)], 1),
        torch.zeros(3, 32),
    ):
        found = with_feedback(w_NK, moments(x_MK), form)
        assert (numbers(found) - w_NK).norm() < w_NK.norm()
    with pytest.raises(ConfigError, match="no finite numbers on this text"):
        with_feedback(w_NK, moments(torch.full((3, 32), torch.inf)), form)


@fast
@given(st.integers(0, 10**6), st.sampled_from([0.0, 1e-9, 1.0, 1e4]))
def test_a_scale_is_at_least_as_good_as_the_one_that_cuts_nothing_off(seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    w_kN, matters_k = torch.randn(16, 5, generator=generator) * size, torch.rand(16, generator=generator)

    def error(scale_N: Tensor) -> Tensor:
        return matters_k @ (w_kN - (w_kN / scale_N).round().clamp(-8, 7) * scale_N).square()

    found_N = best_scale(w_kN, matters_k, 4)
    assert found_N.isfinite().all() and (found_N != 0).all()
    whole_N = w_kN.abs().amax(0).clamp(min=1e-6) / 8
    assert (error(found_N) <= torch.minimum(error(whole_N), error(-whole_N)) * 1.0001 + 1e-30).all()


@pytest.fixture(scope="module")
def model() -> Transformer:
    return build(CONFIG)


TEXT = torch.randint(97, (8, 40), generator=torch.Generator().manual_seed(1))
OTHER = torch.randint(97, (8, 40), generator=torch.Generator().manual_seed(2))


def off(model: Transformer, exact: Transformer) -> float:
    with torch.inference_mode():
        expected = exact(OTHER)
        return float((model(OTHER) - expected).norm() / expected.norm())


@pytest.mark.parametrize("text", ["int4:32", "shared=int4,experts=int4", "attention=int4:16,head=int8"])
def test_a_calibrated_model_is_nearer_on_another_text(model: Transformer, text: str) -> None:
    ours, rounded = deepcopy(model), deepcopy(model)
    calibrate(ours, TEXT, parse(text))
    quantize(rounded, parse(text))
    assert off(ours, model) < 0.9 * off(rounded, model)


def weights(model: Transformer) -> dict[str, Tensor]:
    """Codes of what is quantised, numbers of the rest."""
    found = dict(model.named_parameters())
    for name, part in model.named_modules():
        if isinstance(part, QuantizedExperts):
            parts = {f"{name} {i}": w for i, w in enumerate(part.gate_up + part.down)}
        else:
            weight = getattr(part, "weight", None)
            parts = {} if weight is None or isinstance(weight, Tensor) else {name: weight}
        found |= {at: kernels.kept_codes(w).q_NK for at, w in parts.items()}
    return found


def test_the_same_text_gives_the_same_codes_and_only_these(model: Transformer) -> None:
    first, second = deepcopy(model), deepcopy(model)
    seen: list[tuple[int, int]] = []
    calibrate(first, TEXT, parse("experts=int4,attention=int8,shared=bf16"), lambda *at: seen.append(at))
    calibrate(second, TEXT, parse("experts=int4,attention=int8"))
    ours, again, before = weights(first), weights(second), weights(model)
    assert ours.keys() == again.keys() and all(torch.equal(ours[name], again[name]) for name in ours)
    changed = {name.split()[0].split(".")[-1] for name in ours if name not in before}
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj", "experts"}
    assert all(torch.equal(ours[name], before[name]) for name in ours if name in before)
    assert seen == [(i, 4) for i in range(1, 5)]


def test_an_expert_that_no_token_goes_to_is_calibrated_on_what_it_would_see(model: Transformer) -> None:
    lonely = deepcopy(model)
    with torch.no_grad():
        for at in (1, 3):
            lonely.blocks[at].feed_forward.router.weight[0] = 0  # never the most
    exact, rounded = deepcopy(lonely), deepcopy(lonely)
    calibrate(lonely, TEXT, parse("experts=int4"))
    quantize(rounded, parse("experts=int4"))
    seen: list[Tensor] = []
    exact.blocks[1].feed_forward.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, 1)))
    with torch.inference_mode():
        exact(OTHER)
        x_ND, expert_N = seen[0] / 2, torch.zeros(len(seen[0]), dtype=torch.long)
        wanted, ours, theirs = (m.blocks[1].feed_forward.experts(x_ND, expert_N) for m in (exact, lonely, rounded))
    assert (ours - wanted).norm() < 0.9 * (theirs - wanted).norm()


@pytest.mark.skipif(not kernels.runs_layers(torch.empty(0), 64), reason="the native library is not used here")
def test_where_the_library_runs_layers_it_runs_calibrated_ones() -> None:
    exact = build(tiny(hidden_size=64, head_dim=64, intermediate_size=64, intermediate_size_mlp=96, moe_layers=(1, 3)))
    exact = exact.bfloat16()
    ours, rounded = deepcopy(exact), deepcopy(exact)
    calibrate(ours, TEXT, parse("int4:32"))
    quantize(rounded, parse("int4:32"))
    assert ours.packed is not None and rounded.packed is not None
    assert [w.nbytes for w in ours.packed.weights()] == [w.nbytes for w in rounded.packed.weights()]
    assert off(ours, exact) < 0.9 * off(rounded, exact)
