"""Quantised models: what is quantised, how far off they are, and what is refused."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from herd import kernels
from herd.errors import ConfigError
from herd.formats import Weights, fitting_group, parse
from herd.kernels import native, panels, reference, scaled
from herd.model import Transformer
from herd.model.moe import Experts
from herd.model.quantized import QuantizedExperts, QuantizedLinear, pack_block, quantize
from tests.model.tiny_models import tiny

CONFIG = tiny(
    hidden_size=64,
    num_hidden_layers=3,
    head_dim=16,
    intermediate_size=32,
    intermediate_size_mlp=128,
    moe_layers=(1,),
    no_rope_layers=(1, 0, 1),
    vocab_size=96,
)
PARTS = ("experts", "shared", "attention", "global_attention", "head")
needs_library = pytest.mark.skipif(native.find() is None, reason="the native library is not built here")


def build(**changes: int) -> Transformer:
    torch.manual_seed(0)
    return Transformer(replace(CONFIG, **changes)).eval()


@pytest.fixture(scope="module")
def model() -> Transformer:
    return build()


@pytest.fixture(scope="module")
def packable() -> Transformer:
    """One whose layers the native library runs."""
    return build(head_dim=64).bfloat16()


def quantized(model: Transformer, text: str) -> Transformer:
    other = deepcopy(model)
    quantize(other, parse(text))
    return other


IDS = torch.randint(96, (2, 40), generator=torch.Generator().manual_seed(1))


def off(model: Transformer, exact: Transformer) -> float:
    with torch.inference_mode():
        expected = exact(IDS)
        return float((model(IDS) - expected).norm() / expected.norm())


@pytest.mark.parametrize("which", ["model", "packable"])
def test_fewer_bits_are_further_off(which: str, request: pytest.FixtureRequest) -> None:
    exact: Transformer = request.getfixturevalue(which)
    errors = [off(quantized(exact, text), exact) for text in ("int8", "fp8", "int4")]
    assert errors == sorted(errors) and errors[0] < 0.03 < errors[-1] < 0.3


def test_everything_but_routers_embeddings_and_norms_is_quantised(model: Transformer) -> None:
    other = quantized(model, "int8:32")
    left = {name for name, part in other.named_modules() if isinstance(part, nn.Linear | Experts)}
    assert left == {"model.layers.1.feed_forward.router"}
    assert sum(isinstance(part, QuantizedLinear) for part in other.modules()) == 3 * 4 + 2 * 3 + 3 + 1
    assert torch.equal(other.model.embed_tokens.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize("part", PARTS)
def test_a_part_is_quantised_alone(model: Transformer, part: str) -> None:
    other = quantized(model, f"{part}=int4:8")
    changed = [name for name, layer in other.named_modules() if isinstance(layer, QuantizedLinear | QuantizedExperts)]
    attention = [f"model.layers.{i}.self_attn.{n}_proj" for i in range(3) for n in "qkvo"]
    dense = [f"model.layers.{i}.feed_forward.{n}_proj" for i in (0, 2) for n in ("gate", "up", "down")]
    shared = [f"model.layers.1.feed_forward.shared_expert.{n}_proj" for n in ("gate", "up", "down")]
    experts = ["model.layers.1.feed_forward.experts"]
    wanted = {"experts": experts, "shared": dense + shared, "attention": attention, "head": ["lm_head"]}
    wanted["global_attention"] = [name for name in attention if ".1." in name]
    assert sorted(changed) == sorted(wanted[part])


def expected(w_NK: Tensor, text: str) -> Tensor:
    """What a weight in a format stands for."""
    form = parse(text).head
    if form.kind == "fp8":
        return scaled.numbers_fp8(scaled.pack_fp8(w_NK)).bfloat16().float()
    plain = reference.pack(w_NK, form.bits, form.group)
    return (plain.q_NK.unflatten(1, (plain.scale_Ng.shape[1], -1)) * plain.scale_Ng.unsqueeze(-1)).flatten(1)


@needs_library
@pytest.mark.parametrize("text", ["int4:8", "int8:32", "fp8"])
def test_packed_weights_are_those_of_each_part_in_its_format(packable: Transformer, text: str) -> None:
    block = packable.blocks[1]
    attn, moe = block.self_attn, block.feed_forward
    qkv = torch.cat([attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight])
    weights_of = {
        "attention": (lambda x: (x.qkv, x.out), (qkv, attn.o_proj.weight)),
        "shared": (lambda x: (x.shared.down,), (moe.shared_expert.down_proj.weight,)),
        "experts": (lambda x: [e.down for e in x.experts], [w.T for w in moe.experts.down_proj]),
    }
    for part in weights_of:
        layer = pack_block(deepcopy(block), parse(f"{part}={text}"))
        for name, (packed, plain) in weights_of.items():
            for ours, w_NK in zip(packed(layer), plain, strict=True):
                wanted = expected(w_NK.detach(), text) if name == part else w_NK.float()
                assert torch.equal(panels.numbers(ours).float(), wanted)


@needs_library
@pytest.mark.parametrize("text", ["int8", "experts=int4,shared=int8,attention=fp8", "head=int4"])
def test_packed_models_give_what_the_layers_of_pytorch_give(
    packable: Transformer, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = quantized(packable, text).float()
    assert ours.packed is not None
    monkeypatch.setenv("HERD_KERNELS", "reference")
    theirs = quantized(packable, text).float()
    assert theirs.packed is None
    # Activations are rounded to bfloat16 or e4m3, or not.
    assert off(ours, theirs) < (0.04 if "fp8" in text else 0.01)


@torch.inference_mode()
def test_each_row_goes_through_its_own_expert(model: Transformer) -> None:
    experts, form = model.float().blocks[1].feed_forward.experts, parse("int8:32").experts
    weights = ([kernels.pack(w.T, form) for w in part] for part in (experts.gate_up_proj, experts.down_proj))
    quantised, x_ND = QuantizedExperts(*weights), torch.randn(7, 64)
    expert_N = torch.tensor([3, 0, 0, 2, 3, 3, 0])
    found_ND = quantised(x_ND, expert_N)
    for n, e in enumerate(expert_N.tolist()):
        torch.testing.assert_close(quantised(x_ND[n : n + 1], torch.tensor([e]))[0], found_ND[n])
    assert (found_ND - experts(x_ND, expert_N)).norm() < 0.03 * found_ND.norm()


@pytest.mark.parametrize(
    ("changes", "text", "reason"),
    [
        ({"intermediate_size_mlp": 100}, "int8", r"down_proj has 100 inputs; int8:64 needs a multiple of 8"),
        (
            {"intermediate_size": 40},
            "fp8",
            r"experts has 80 outputs and 64 inputs|experts has 64 outputs and 40 inputs",
        ),
        ({"vocab_size": 97}, "head=fp8", "lm_head has 97 outputs and 64 inputs; fp8 needs multiples of 16"),
        ({"head_dim": 64, "intermediate_size_mlp": 99}, "attention=int4", "99 inputs; .* bf16 needs a multiple of 2"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, int], text: str, reason: str) -> None:
    if "bf16" in reason and native.find() is None:
        pytest.skip("PyTorch's layers take it")
    odd = build(**changes)
    with pytest.raises(ConfigError, match=reason):
        quantize(odd, parse(text))
    assert all(isinstance(block.self_attn.q_proj, nn.Linear) for block in odd.blocks), "nothing was changed"


def test_groups_are_as_large_as_fit() -> None:
    assert [fitting_group(K, 256) for K in (64, 576, 1024, 8)] == [64, 192, 256, 8]
    assert reference.pack(torch.randn(3, 576), 8, 256).scale_Ng.shape == (3, 3)


def test_the_reference_quantises_within_half_a_step() -> None:
    w_NK = torch.randn(5, 64)
    for bits, steps in ((8, 127), (4, 8)):
        weight = reference.pack(w_NK, bits, 32)
        step_NgK = weight.scale_Ng.unsqueeze(-1)
        back = (weight.q_NK.unflatten(1, (2, 32)) * step_NgK).flatten(1)
        # In 4 bits 8 is not a number: the largest positive ones lose up to a whole step.
        limit = 0.5 if bits == 8 else 1.0
        assert ((w_NK - back).abs().unflatten(1, (2, 32)) <= (limit + 1e-4) * step_NgK).all()
        assert torch.allclose(weight.scale_Ng.max() * steps, w_NK.abs().max())


@pytest.mark.parametrize("M", [1, 5])
def test_products_of_pytorch_are_those_of_the_numbers(M: int) -> None:
    """Run on the CPU here, on a GPU by its own kernels."""
    generator = torch.Generator().manual_seed(M)
    w_NK, x_MK = torch.randn(48, 256, generator=generator), torch.randn(M, 256, generator=generator)
    plain = reference.pack(w_NK, 4, 64)
    assert scaled.takes_int4(plain) and not scaled.takes_int4(reference.pack(w_NK, 4, 16))
    numbers = (plain.q_NK.unflatten(1, (4, 64)) * plain.scale_Ng.bfloat16().float().unsqueeze(-1)).flatten(1)
    _close(scaled.linear(x_MK, scaled.pack_int4(plain)), x_MK.bfloat16().float() @ numbers.T, 0.01)
    eight = scaled.pack_fp8(w_NK)
    rounded = scaled.numbers_fp8(eight)
    assert (rounded - w_NK).abs().max() <= w_NK.abs().max() / 16
    assert torch.allclose(rounded.abs().amax(1), w_NK.abs().amax(1))
    _close(scaled.linear(x_MK, eight), x_MK @ rounded.T, 0.04)
    found = scaled.linear(x_MK.bfloat16().view(M, 1, 256), eight)
    assert found.dtype == torch.bfloat16 and found.shape == (M, 1, 48)


def test_large_activations_are_cut_off_in_fp8() -> None:
    """Beyond 1,200 (spec §7)."""
    x_MK = torch.zeros(1, 16)
    x_MK[0, 0] = 5000.0
    assert float(scaled.linear(x_MK, scaled.pack_fp8(torch.eye(16)))[0, 0]) == 1200.0


def _close(found: Tensor, expected: Tensor, share: float) -> None:
    assert (found - expected).norm() < share * expected.norm()


def test_a_choice_of_formats_says_itself() -> None:
    assert str(Weights()) == "bf16" and str(parse("experts=int4,head=bf16")) == "experts=int4:64"
