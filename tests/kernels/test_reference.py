"""The definitions of the hot operations against independent, slower or simpler ones."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu
from torch.overrides import TorchFunctionMode

from herd.kernels.reference import (
    apply_rope,
    attend,
    dequantize_kv,
    expert_mlp,
    merge_partials,
    quantize_kv,
    rms_norm,
    swiglu,
)

fast = settings(max_examples=40, deadline=None, derandomize=True)


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


# Norm, rope, swiglu


def test_rms_norm() -> None:
    x, weight = random(3, 5, 16, scale=3.0), random(16, seed=1)
    expected = x / torch.sqrt((x**2).mean(-1, keepdim=True) + 0.01)
    torch.testing.assert_close(rms_norm(x, None, 0.01), expected)
    torch.testing.assert_close(rms_norm(x, weight, 0.01), expected * weight)


def test_rms_norm_multiplies_the_weight_in_the_input_dtype() -> None:
    x, weight = random(4, 64).bfloat16(), random(64, seed=1).bfloat16()
    normed = (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)).bfloat16()
    assert torch.equal(rms_norm(x, weight, 1e-5), normed * weight)
    assert not torch.equal(rms_norm(x, weight, 1e-5), (normed.float() * weight.float() * 1.001).bfloat16())


@pytest.mark.parametrize("c", [3.0, -50.0])
def test_norm_of_equal_entries(c: float) -> None:
    """Spec §13: all entries become sign(c), not c / |x|."""
    torch.testing.assert_close(rms_norm(torch.full((128,), c), None, 1e-5), torch.full((128,), math.copysign(1, c)))


def test_rope_turns_interleaved_pairs() -> None:
    x = random(2, 3, 4, 8).double()
    angles = random(2, 3, 4, seed=1).abs() * 30
    expected = torch.empty_like(x)
    for b in range(2):
        for t in range(3):
            for i in range(4):
                turn = complex(math.cos(angles[b, t, i]), math.sin(angles[b, t, i]))
                for h in range(4):
                    z = complex(x[b, t, h, 2 * i], x[b, t, h, 2 * i + 1]) * turn
                    expected[b, t, h, 2 * i], expected[b, t, h, 2 * i + 1] = z.real, z.imag
    torch.testing.assert_close(apply_rope(x.float(), angles).double(), expected, rtol=1e-5, atol=1e-5)


def test_rope_keeps_dtype_and_takes_any_strides() -> None:
    x, angles = random(2, 4, 3, 8), random(2, 3, 4, seed=1)
    turned = apply_rope(x.transpose(1, 2), angles)
    assert torch.equal(turned, apply_rope(x.transpose(1, 2).contiguous(), angles))
    assert apply_rope(x.transpose(1, 2).bfloat16(), angles).dtype == torch.bfloat16


def test_rope_and_norm_commute() -> None:
    """Spec §2.3: a turn keeps the norm, so the order only changes the rounding."""
    x, angles = random(2, 3, 4, 8), random(2, 3, 4, seed=1) * 9
    a = rms_norm(apply_rope(x, angles), None, 1e-5)
    torch.testing.assert_close(a, apply_rope(rms_norm(x, None, 1e-5), angles))


def test_swiglu() -> None:
    gate, up = random(3, 8), random(3, 8, seed=1)
    torch.testing.assert_close(swiglu(gate, up), gate / (1 + torch.exp(-gate)) * up)


# Attention in parts


def exact(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor]:
    """torch's attention, with zeros where nothing is visible, and the log of the denominator in float64."""
    group = q.shape[2] // k.shape[2]
    mask = None if visible is None else visible[:, None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    logits = q.double() @ k.double().repeat_interleave(group, 1).mT / math.sqrt(q.shape[-1])
    if mask is not None:
        out = out.masked_fill(~mask.any(-1, keepdim=True), 0.0)
        logits = logits.masked_fill(~mask, -math.inf)
    return out.transpose(1, 2), logits.logsumexp(-1).transpose(1, 2).float()


@fast
@given(
    B=st.integers(1, 2),
    T=st.integers(1, 4),
    cuts=st.lists(st.integers(0, 12), max_size=4),
    heads=st.sampled_from([(4, 4), (4, 2), (6, 2), (3, 1)]),
    density=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_parts_merge_to_attention_over_the_union(
    B: int, T: int, cuts: list[int], heads: tuple[int, int], density: float, seed: int
) -> None:
    S, d, (H, G) = 12, 8, heads
    q, k, v = random(B, T, H, d, seed=seed, scale=3.0), random(B, S, G, d, seed=seed + 1), random(B, S, G, d, seed=3)
    # Some queries see nothing in one part, some see nothing at all, and some parts hold no key.
    visible = torch.rand(B, T, S, generator=torch.Generator().manual_seed(seed)) < density
    edges = [0, *sorted(cuts), S]
    parts = [attend(q, k[:, a:b], v[:, a:b], visible[..., a:b]) for a, b in pairwise(edges)]
    out, lse = merge_partials(parts)
    expected_out, expected_lse = exact(q, k, v, visible)
    torch.testing.assert_close(out, expected_out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)
    # In any grouping the result is the same.
    middle = len(parts) // 2 + 1
    grouped = merge_partials([merge_partials(parts[:middle]), *parts[middle:]])
    torch.testing.assert_close(grouped[0], out, rtol=1e-5, atol=1e-5)


def test_attend_without_a_mask_sees_everything() -> None:
    q, k, v = random(2, 3, 4, 8), random(2, 7, 2, 8, seed=1), random(2, 7, 2, 8, seed=2)
    for got, expected in zip(attend(q, k, v, None), exact(q, k, v, None), strict=True):
        torch.testing.assert_close(got, expected)


def test_a_query_that_sees_nothing() -> None:
    q, k, v = random(1, 2, 2, 4), random(1, 3, 1, 4, seed=1), random(1, 3, 1, 4, seed=2)
    visible = torch.tensor([[[False] * 3, [True, False, False]]])
    out, lse = attend(q, k, v, visible)
    assert (out[0, 0] == 0).all()
    assert (lse[0, 0] == -math.inf).all()
    torch.testing.assert_close(out[0, 1], v[0, 0].expand(2, -1))
    out, lse = attend(q, k[:, :0], v[:, :0], visible[..., :0])
    assert out.shape == q.shape
    assert (out == 0).all() and (lse == -math.inf).all()
    out, lse = merge_partials([(out, lse), (out, lse)])
    assert (out == 0).all() and (lse == -math.inf).all()


def test_merging_survives_huge_logits() -> None:
    q, k, v = random(1, 2, 2, 8, scale=1e3), random(1, 6, 2, 8, seed=1, scale=1e3), random(1, 6, 2, 8, seed=2)
    out, _ = merge_partials([attend(q, k[:, :2], v[:, :2], None), attend(q, k[:, 2:], v[:, 2:], None)])
    torch.testing.assert_close(out, exact(q, k, v, None)[0])


def test_attention_of_bfloat16_is_returned_in_float32() -> None:
    q, k, v = (random(1, 5, 2, 16, seed=s).bfloat16() for s in range(3))
    out, lse = attend(q, k, v, None)
    assert (out.dtype, lse.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(out, exact(q.float(), k.float(), v.float(), None)[0], rtol=0.03, atol=0.03)


def test_gradients_flow_through_merged_parts() -> None:
    """Training over a context splits the keys; rows that see nothing in a part must not poison the gradient."""
    q, k, v = random(1, 3, 4, 8), random(1, 6, 2, 8, seed=1), random(1, 6, 2, 8, seed=2)
    visible = torch.ones(1, 3, 6, dtype=torch.bool)
    visible[0, 1, :3] = False
    grads = []
    for edges in ([0, 6], [0, 3, 6]):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        a, b, c = leaves
        spans = list(pairwise(edges))
        out, _ = merge_partials([attend(a, b[:, i:j], c[:, i:j], visible[..., i:j]) for i, j in spans])
        out.square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for whole, parts in zip(*grads, strict=True):
        assert parts.isfinite().all()
        torch.testing.assert_close(parts, whole)


# Experts


def expert_weights(E: int, D: int, F: int) -> tuple[Tensor, Tensor]:
    return random(E, D, 2 * F, seed=5), random(E, F, D, seed=6)


def naive_experts(x_ND: Tensor, expert_N: Tensor, gate_up_EDF: Tensor, down_EFD: Tensor) -> Tensor:
    rows = []
    for x, e in zip(x_ND, expert_N.tolist(), strict=True):
        gate, up = (x @ gate_up_EDF[e]).chunk(2)
        rows.append(silu(gate) * up @ down_EFD[e])
    return torch.stack(rows) if rows else x_ND


@fast
@given(choice=st.lists(st.integers(0, 4), max_size=30), seed=st.integers(0, 1000))
def test_experts_equal_a_loop_over_tokens(choice: list[int], seed: int) -> None:
    """Empty experts (most of five, often) and no token at all included."""
    x, expert = random(len(choice), 6, seed=seed), torch.tensor(choice, dtype=torch.long)
    weights = expert_weights(5, 6, 7)
    torch.testing.assert_close(expert_mlp(x, expert, *weights), naive_experts(x, expert, *weights))


def test_gradients_of_experts_equal_those_of_the_loop() -> None:
    expert = torch.tensor([3, 0, 3, 3, 1])
    grads = []
    for function in (expert_mlp, naive_experts):
        leaves = [t.clone().requires_grad_() for t in (random(5, 6), *expert_weights(4, 6, 7))]
        function(leaves[0], expert, *leaves[1:]).square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for ours, naive in zip(*grads, strict=True):
        torch.testing.assert_close(ours, naive)
    assert (grads[0][1][2] == 0).all(), "an expert without tokens gets no gradient"


class CountMultiplications(TorchFunctionMode):
    """Adds up the scalar multiplications of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        names = {"matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "einsum", "addmm", "baddbmm", "linear"}
        if getattr(func, "__name__", "") in names:
            assert isinstance(args[0], Tensor), "einsum's cost is not counted here"
            self.total += out.numel() * args[0].shape[-1]
        return out


@pytest.mark.parametrize("E", [2, 16, 64])
def test_each_token_is_multiplied_by_one_expert_only(E: int) -> None:
    N, D, F = 40, 6, 8
    expert = torch.randint(E, (N,), generator=torch.Generator().manual_seed(0))
    with CountMultiplications() as counter:
        expert_mlp(random(N, D), expert, *expert_weights(E, D, F))
    assert counter.total == N * 3 * D * F


# Keys and values in 8 and 4 bits


@fast
@given(seed=st.integers(0, 10**6), exponent=st.integers(-12, 12), d=st.sampled_from([1, 2, 64]))
def test_quantization_error_is_half_a_step(seed: int, exponent: int, d: int) -> None:
    x = random(3, 5, 2, d, seed=seed, scale=2.0**exponent)
    q, scale = quantize_kv(x)
    assert (q.dtype, scale.dtype, q.shape, scale.shape) == (torch.int8, torch.float16, x.shape, x.shape[:-1])
    error = (dequantize_kv(q, scale, torch.float32) - x).abs()
    assert (error <= scale.float().unsqueeze(-1) * 0.501).all()
    # Rows of ordinary size use the whole range of int8.
    ordinary = x.abs().amax(-1) > 127 * 2.0**-14
    assert (q.abs().amax(-1)[ordinary] >= 126).all()


def test_zero_rows_stay_zero() -> None:
    x = random(4, 2, 8)
    x[1, 0] = 0
    q, scale = quantize_kv(x)
    assert (q[1, 0] == 0).all() and scale.isfinite().all() and (scale > 0).all()
    restored = dequantize_kv(q, scale, torch.float32)
    assert (restored[1, 0] == 0).all() and restored.isfinite().all()


def test_quantization_is_idempotent_and_keeps_signs() -> None:
    x = random(64, 2, 16)
    q, scale = quantize_kv(x)
    again, scale_again = quantize_kv(dequantize_kv(q, scale, torch.float32))
    assert torch.equal(q, again)
    torch.testing.assert_close(scale, scale_again, rtol=2e-3, atol=0)
    assert torch.equal(quantize_kv(-x)[0], -q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantize_to_dtype(dtype: torch.dtype) -> None:
    x = random(4, 2, 8).to(dtype)
    restored = dequantize_kv(*quantize_kv(x), dtype)
    assert restored.dtype == dtype
    torch.testing.assert_close(restored, x, rtol=0, atol=0.03)


@fast
@given(seed=st.integers(0, 10**6), exponent=st.integers(-9, 12), d=st.sampled_from([2, 8, 64, 128]))
def test_four_bits_are_at_least_as_near_as_the_plain_rule(seed: int, exponent: int, d: int) -> None:
    x = random(3, 5, 2, d, seed=seed, scale=2.0**exponent)
    q, scale = quantize_kv(x, 4)
    assert (q.dtype, scale.dtype, q.shape) == (torch.uint8, torch.float16, (3, 5, 2, d // 2))
    assert scale.shape == x.shape[:-1]
    plain = (x.abs().amax(-1, keepdim=True) / 8).half().float()
    sign = torch.where(x.gather(-1, x.abs().argmax(-1, keepdim=True)) > 0, -1.0, 1.0)
    simple = (x / (plain * sign)).round().clamp(-8, 7) * plain * sign
    error, most = ((y - x).square().sum(-1) for y in (dequantize_kv(q, scale, torch.float32), simple))
    assert (error <= most * 1.001 + 1e-12).all()
    if d == 64:
        assert error.sum() < 0.013 * x.square().sum(), "16 even levels for a normal distribution: 0.0115 at best"


def test_four_bits_hold_two_numbers_in_a_byte() -> None:
    """Which goes where is part of the format on disk."""
    q, scale = quantize_kv(torch.tensor([[-8.0, 7.0, 0.0, 3.0]]), 4)
    assert (q.tolist(), scale.tolist()) == ([[0x80, 0xBF]], [1.0])
    assert dequantize_kv(q, scale, torch.float32).tolist() == [[-8.0, 7.0, 0.0, 3.0]]
    flipped, minus = quantize_kv(torch.tensor([[8.0, -7.0, 0.0, -3.0]]), 4)
    assert torch.equal(flipped, q) and minus.tolist() == [-1.0]


def test_four_bits_of_numbers_that_fit_only_with_a_smaller_scale() -> None:
    x = torch.tensor([[5.5e5, -4e5, 0.0, 1e5]])
    assert torch.allclose(dequantize_kv(*quantize_kv(x, 4), torch.float32), x, rtol=0, atol=0.1 * 5.5e5)


def test_four_bits_of_zeros_and_tiny_numbers() -> None:
    for value in (0.0, 1e-9, -1e-9):
        restored = dequantize_kv(*quantize_kv(torch.full((3, 8), value), 4), torch.float32)
        assert (restored == 0).all()
