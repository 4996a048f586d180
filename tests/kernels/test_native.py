"""The native library against the reference, for every instruction set that this machine has."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from herd import kernels
from herd.context.segment import KV
from herd.errors import ConfigError
from herd.kernels import dequantize_kv, native, quantize_kv, reference

pytestmark = pytest.mark.usefixtures("instructions")
fast = settings(max_examples=40, deadline=None, derandomize=True)


@pytest.fixture(params=[8, 4])
def bits(request: pytest.FixtureRequest) -> int:
    """Of a key or value."""
    return request.param


@fast
@given(st.integers(0, 10**6), st.integers(-30, 25), st.sampled_from([2, 6, 64, 200]), st.sampled_from([1, 7, 100]))
def test_keys_and_values_are_kept_as_the_reference_does(seed: int, exponent: int, d: int, rows: int) -> None:
    x = torch.randn(2, rows, d, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    x[:, ::5] = x[:, ::5].to(torch.bfloat16).float()
    ours, exact = native.quantize_kv(x), reference.quantize_kv(x)
    assert all(torch.equal(a, b) for a, b in zip(ours, exact, strict=True))
    ours, exact = native.quantize_kv(x, 4), reference.quantize_kv(x, 4)
    kept = ours[1].isfinite()  # others are too large
    assert torch.equal(kept, exact[1].isfinite())
    error, least = ((dequantize_kv(*each, torch.float32) - x).square().sum(-1)[kept] for each in (ours, exact))
    torch.testing.assert_close(error, least, rtol=1e-5, atol=0)
    same = (ours[0] == exact[0]).all(-1) & (ours[1] == exact[1])
    assert (same | ~kept).float().mean() > 0.99


def test_what_is_kept_of_strides_zeros_and_no_numbers(bits: int) -> None:
    x = torch.randn(5, 3, 64, generator=torch.Generator().manual_seed(0))
    x[1] = 0
    for view in (x.transpose(0, 1), x[::2, 1:], x[:0]):
        ours, exact = native.quantize_kv(view, bits), reference.quantize_kv(view, bits)
        assert all(torch.equal(a, b) for a, b in zip(ours, exact, strict=True))
    x[2, 0, 5], x[3, 0, 5], x[4, 0, 5] = math.nan, math.inf, -math.inf
    scale = native.quantize_kv(x, bits)[1]
    assert not scale[2:, 0].isfinite().any() and scale[:, 1:].isfinite().all()
    assert torch.equal(native.quantize_kv(x, bits)[0][:, 1:], reference.quantize_kv(x, bits)[0][:, 1:])


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_weights_in_bfloat16_are_packed_as_their_numbers(bits: int) -> None:
    w_NK = torch.randn(70, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    half, wide = native.pack(w_NK, bits, 32), native.pack(w_NK.float(), bits, 32)
    strided = native.pack(w_NK.T.contiguous().T, bits, 32)
    for packed in (half, strided):
        assert torch.equal(packed.packed, wide.packed) and torch.equal(packed.scale, wide.scale)


def part(k_GNd: Tensor, v_GNd: Tensor, bits: int) -> KV:
    (k, k_scale), (v, v_scale) = quantize_kv(k_GNd, bits), quantize_kv(v_GNd, bits)
    return KV(k, v, k_scale, v_scale)


def random_parts(counts: list[int], bits: int = 8, G: int = 2, d: int = 64, scale: float = 1.0) -> list[KV]:
    generator = torch.Generator().manual_seed(0)
    return [part(*torch.randn(2, G, n, d, generator=generator).mul(scale), bits) for n in counts]


def plain(part: KV) -> tuple[Tensor, Tensor]:
    """Keys and values [G, N, d] in float32."""
    return tuple(
        dequantize_kv(q, scale, torch.float32)
        for q, scale in ((part.k_GNd, part.k_scale_GN), (part.v_GNd, part.v_scale_GN))
    )


def largest_value(parts: list[KV]) -> float:
    return max(float(plain(p)[1].abs().max()) for p in parts)


def compare(q_GRd: Tensor, parts: list[KV], missed: float = 1e-3) -> None:
    """Native equals the reference but for what it says that it left out."""
    assert native.takes(q_GRd, parts)
    ours, exact = native.attend_parts(q_GRd, parts, missed), reference.attend_parts(q_GRd, parts, 0.0)
    longest = max(float(plain(p)[0].norm(dim=-1).max()) for p in parts)
    error = 2e-5 * float(q_GRd.float().norm(dim=-1).max()) * longest + 1e-5
    value = largest_value(parts)
    assert float(ours.left_out_GR.max()) <= missed
    for sums, all_sums in ((ours.lse_GR, exact.lse_GR), (ours.lse_KGR, exact.lse_KGR)):
        lacking = (all_sums - exact.lse_GR).exp() - (sums - exact.lse_GR).exp()  # shares of the softmax
        assert (lacking >= -2 * error - 1e-5).all()
        assert (lacking <= ours.left_out_GR + 2 * error + 1e-5).all()
    off_GR = (ours.out_GRd - exact.out_GRd).abs().amax(-1)
    assert (off_GR <= value * (ours.left_out_GR + 2 * error + 1e-5)).all()


@fast
@given(
    st.lists(st.integers(1, 700), min_size=1, max_size=4),
    st.sampled_from([1, 3, 20]),
    st.sampled_from([64, 128, 192, 256]),
    st.sampled_from([0.0, 0.1, 1.0, 4.0]),
    st.sampled_from([8, 4]),
)
def test_attention_of_any_size(counts: list[int], rows: int, d: int, scale: float, bits: int) -> None:
    q_GRd = torch.randn(2, rows, d, generator=torch.Generator().manual_seed(1)) * scale / math.sqrt(d)
    compare(q_GRd, random_parts(counts, bits, d=d, scale=2.0))


def test_parts_of_both_formats() -> None:
    compare(torch.randn(2, 3, 64) / 4, [*random_parts([300, 7], 8), *random_parts([77, 1], 4)])


def test_an_empty_part_counts_nothing(bits: int) -> None:
    (part,), q_GRd = random_parts([30], bits), torch.randn(2, 3, 64)
    alone, beside = (native.attend_parts(q_GRd, parts, 1e-3) for parts in ([part], [part.part(5, 5), part]))
    torch.testing.assert_close(beside.out_GRd, alone.out_GRd)
    torch.testing.assert_close(beside.lse_GR, alone.lse_GR)
    assert (beside.lse_KGR[0] - beside.lse_GR).exp().max() == 0


@pytest.mark.parametrize("d", [64, 128, 192, 256])
def test_every_code_at_every_place(d: int, bits: int) -> None:
    """One dimension of the query at a time, and keys that hold all codes there: logits are codes times scales."""
    codes = range(-127, 128) if bits == 8 else range(-8, 8)
    q_GNd = torch.tensor(codes)[None, :, None].expand(1, -1, d).to(torch.int8)
    q_GNd = reference.pack_nibbles(q_GNd) if bits == 4 else q_GNd.contiguous()
    ones = torch.ones(1, len(codes)).half()
    found = native.attend_parts(torch.eye(d)[None], [KV(q_GNd, q_GNd, ones, -ones)], 1e-7)
    weights_N = torch.tensor(codes).float().softmax(0)
    expected = -(weights_N * torch.tensor(codes)).sum()
    torch.testing.assert_close(found.out_GRd, expected.expand(1, d, d), rtol=1e-4, atol=1e-4)


def test_parts_of_a_longer_array(bits: int) -> None:
    (whole,) = random_parts([1000], bits, G=3)
    views = [
        KV(whole.k_GNd[:, a:b], whole.v_GNd[:, a:b], whole.k_scale_GN[:, a:b], whole.v_scale_GN[:, a:b])
        for a, b in ((0, 17), (500, 999), (999, 1000))
    ]
    compare(torch.randn(3, 2, 64), views)


def test_parts_that_are_looked_at_again_are_looked_up_once(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = random_parts([900], bits, G=3)[0]
    parts = kernels.Parts(whole.part(start, start + 100) for start in range(0, 900, 100))
    looks = list(torch.randn(4, 3, 2, 64))
    expected = [native.attend_parts(q_GRd, list(parts), 1e-3) for q_GRd in looks]
    with monkeypatch.context() as patch:
        found = [kernels.attend_parts(looks[0], parts, 1e-3)]
        patch.setattr(Tensor, "data_ptr", _no_more(Tensor.data_ptr, len(looks) * 8))
        found += [kernels.attend_parts(q_GRd, parts, 1e-3) for q_GRd in looks[1:]]
    for ours, theirs in zip(found, expected, strict=True):
        # What is left out depends on which thread comes first.
        shares = [(x.lse_KGR - theirs.lse_GR).exp() for x in (ours, theirs)]
        torch.testing.assert_close(*shares, rtol=0.0, atol=1e-3)
        torch.testing.assert_close(ours.out_GRd, theirs.out_GRd, rtol=0.0, atol=5e-3)


def _no_more(call: Callable[[Tensor], int], times: int) -> Callable[[Tensor], int]:
    """The same, which may be called so often."""
    left = iter(range(times))

    def counted(x: Tensor) -> int:
        assert next(left, None) is not None, f"called more than {times} times"
        return call(x)

    return counted


@pytest.mark.parametrize("missed", [1e-6, 1e-3, 0.1])
def test_what_is_left_out_is_never_more_than_allowed(missed: float, bits: int) -> None:
    """Keys all alike; one that takes everything, at the end; a ladder; many far ones that add up."""
    for kind in ("alike", "last", "ladder", "crowd"):
        key = torch.randn(64, generator=torch.Generator().manual_seed(2))
        height = {
            "alike": torch.zeros(4000),
            "last": torch.cat([torch.zeros(3999), torch.ones(1)]) * 30,
            "ladder": torch.linspace(0, 30, 4000),
            "crowd": torch.cat([torch.full((10,), 9.0), torch.zeros(3990)]),
        }[kind]
        k_GNd = (height / key.pow(2).sum())[None, :, None] * key
        parts = [part(keys_GNd, torch.randn(keys_GNd.shape), bits) for keys_GNd in k_GNd.split(900, 1)]
        compare(key.expand(1, 2, -1), parts, missed)


def test_keys_that_only_small_numbers_of_the_query_meet_are_not_passed_over(bits: int) -> None:
    """The query's first number is so large that the others round to 0, and keys that only these meet have the most."""
    d, far, near = 64, torch.zeros(1, 3000, 64), torch.zeros(1, 300, 64)
    small = 124 / 254 / 127
    q_GRd = torch.full((1, 1, d), small)
    q_GRd[..., 0] = 1
    near[..., 0], far[..., 1:] = 10, 40 / small / (d - 1)
    compare(q_GRd, [part(keys_GNd, torch.randn(keys_GNd.shape), bits) for keys_GNd in (near, far)])


@pytest.mark.parametrize("missed", [1e-4, 1e-3])
def test_nearly_uniform_keys_leave_out_what_they_say(missed: float, bits: int) -> None:
    """Shares all near missed / tokens, some above and some below: against the sum over what was not read."""
    generator = torch.Generator().manual_seed(3)
    k_GNd = torch.ones(1, 3000, 64) + torch.randn(1, 3000, 64, generator=generator) * 0.3
    k_GNd[:, ::1000] *= 1 - math.log(missed) / 64
    parts = [part(keys_GNd, torch.ones(keys_GNd.shape), bits) for keys_GNd in k_GNd.split(1100, 1)]
    q_GRd = torch.ones(1, 1, 64)
    found = native.attend_parts(q_GRd, parts, missed)
    read = float(found.out_GRd.mean()) / float(reference.attend_parts(q_GRd, parts, 0.0).out_GRd.mean())
    assert 0 < float(found.left_out_GR) <= missed
    assert read == pytest.approx(1 - float(found.left_out_GR), abs=1e-5)


def test_values_that_do_not_matter_are_not_read(bits: int) -> None:
    parts = random_parts([512], bits, G=1)
    q_GRd = plain(parts[0])[0][:, 100:101] * 2
    before = native.attend_parts(q_GRd, parts, 1e-3)
    parts[0].v_GNd[:, :100], parts[0].v_GNd[:, 101:] = 0, 0
    assert torch.equal(native.attend_parts(q_GRd, parts, 1e-3).out_GRd, before.out_GRd)
    assert 0 < float(before.left_out_GR) < 1e-3


def test_tokens_elsewhere_count_in_what_may_be_left_out(bits: int) -> None:
    parts = random_parts([700, 300], bits, scale=2.0)
    q_GRd = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1)) / 8
    exact = reference.attend_parts(q_GRd, parts, 0.0)
    for more in (-5.0, 0.0, 3.0, 30.0):
        elsewhere_GR = exact.lse_GR + more
        found = native.attend_parts(q_GRd, parts, 1e-3, elsewhere_GR)
        share_GR = 1 / (1 + math.exp(more))
        lacking_GR = (1 - (found.lse_GR - exact.lse_GR).exp()) * share_GR
        assert (lacking_GR <= found.left_out_GR + 1e-4).all()
        off_GR = (found.out_GRd - exact.out_GRd).abs().amax(-1) * share_GR
        value = largest_value(parts)
        assert float(found.left_out_GR.max()) <= 1e-3
        assert (off_GR <= value * (found.left_out_GR + 1e-4)).all()
    assert not found.out_GRd.any(), "nothing here matters, so no value was read"


@pytest.mark.parametrize("scale", [0.0, 1e-6, 300.0])
def test_extreme_numbers(scale: float, bits: int) -> None:
    parts = random_parts([40], bits, scale=scale)
    for q_GRd in (torch.zeros(2, 1, 64), torch.full((2, 1, 64), 1e4), -torch.full((2, 1, 64), 1e4)):
        found = native.attend_parts(q_GRd, parts, 1e-3)
        assert all(x.isfinite().all() for x in vars(found).values())


def test_what_it_does_not_take_goes_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    odd, narrow = random_parts([9], d=8), torch.randn(2, 1, 8)
    assert not native.takes(narrow, odd)
    expected = reference.attend_parts(narrow, odd, 0.0)
    torch.testing.assert_close(kernels.attend_parts(narrow, odd, 1e-3).out_GRd, expected.out_GRd)


def test_the_variable_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.implementation().startswith("native (")
    monkeypatch.setenv("HERD_KERNELS", "reference")
    assert kernels.implementation() == "reference (HERD_KERNELS)"
    monkeypatch.setenv("HERD_KERNELS", "fast")
    with pytest.raises(ConfigError, match="'fast'; it can be reference or native"):
        kernels.implementation()


@fast
@given(
    st.integers(0, 30),
    st.sampled_from([1, 31, 32, 70]),
    st.sampled_from([(64, 32), (64, 64), (24, 8), (384, 128)]),
    st.sampled_from([4, 8]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_linear_of_any_size(M: int, N: int, sizes: tuple[int, int], bits: int, dtype: torch.dtype) -> None:
    K, group = sizes
    generator = torch.Generator().manual_seed(M + N)
    w_NK, x_MK = torch.randn(N, K, generator=generator), torch.randn(M, K, generator=generator).to(dtype)
    ours = native.linear(x_MK, native.pack(w_NK, bits, group))
    expected = reference.linear(x_MK, reference.pack(w_NK, bits, group))
    assert ours.dtype == dtype and ours.shape == (M, N)
    close = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(ours, expected, rtol=close, atol=close)


@pytest.mark.parametrize("rows", [1, 13, 200])
def test_linear_of_rows_and_weights_that_are_zero_or_large(rows: int) -> None:
    x_MK = torch.zeros(rows, 64)
    x_MK[-1] = 1e6
    w_NK = torch.full((40, 64), -3.0)
    w_NK[7] = 0
    found = native.linear(x_MK, native.pack(w_NK, 8, 32))
    assert (found[:-1] == 0).all() and (found[:, 7].abs() < 100).all()
    torch.testing.assert_close(found[-1, :7], torch.full((7,), -3.0 * 64e6), rtol=1e-5, atol=0.0)


def test_linear_keeps_leading_axes_and_takes_strides() -> None:
    x = torch.randn(2, 3, 128)[..., ::2]
    weight = native.pack(torch.randn(10, 64), 8, 64)
    assert torch.equal(native.linear(x, weight), native.linear(x.reshape(6, 64), weight).view(2, 3, 10))


@fast
@given(st.integers(1, 3), st.integers(1, 130), st.sampled_from([(1, 1), (9, 3), (4, 2)]), st.sampled_from([64, 128]))
def test_causal_attention_of_any_size(B: int, T: int, heads: tuple[int, int], d: int) -> None:
    generator = torch.Generator().manual_seed(T)
    q, k, v = (torch.randn(B, T, n, d, generator=generator).bfloat16() for n in (heads[0], heads[1], heads[1]))
    if not native.takes_causal(q, k, v):
        pytest.skip("this instruction set has none")
    exact = reference.causal_attention(q.float(), k.float(), v.float())
    torch.testing.assert_close(native.causal_attention(q, k, v).float(), exact, rtol=2e-2, atol=2e-2)


def test_causal_attention_with_gradients_or_other_types_is_left_to_the_reference() -> None:
    x = torch.randn(1, 3, 2, 64)
    assert not native.takes_causal(x, x, x)
    half = x.bfloat16().requires_grad_()
    assert not native.takes_causal(half, half, half)
    assert kernels.causal_attention(half, half, half).requires_grad
