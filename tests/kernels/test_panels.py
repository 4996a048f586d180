"""Packed codes: as `native.pack` packs them, with the product that the reference has, and back without a loss."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from herd.kernels import native, panels, reference
from herd.kernels.reference import PlainWeight

fast = settings(max_examples=60, deadline=None, derandomize=True)
outputs = st.integers(1, 100)
groups = st.tuples(st.integers(1, 5), st.sampled_from([8, 16, 24, 64]))  # how many, and of how many inputs
needs_library = pytest.mark.skipif(native.find() is None, reason="the native library is not built here")


def drawn(N: int, G: int, group: int, bits: int, seed: int) -> tuple[Tensor, Tensor]:
    """Codes of the whole range, and scales of both signs."""
    generator = torch.Generator().manual_seed(seed)
    low, high = (-127, 128) if bits == 8 else (-8, 8)
    codes_NK = torch.randint(low, high, (N, G * group), generator=generator, dtype=torch.int8)
    return codes_NK, torch.randn(N, G, generator=generator)


@fast
@given(outputs, groups, st.sampled_from([4, 8]), st.integers(0, 9))
def test_codes_and_scales_come_back(N: int, sizes: tuple[int, int], bits: int, seed: int) -> None:
    codes_NK, scale_NG = drawn(N, *sizes, bits, seed)
    packed = panels.pack_codes(codes_NK, scale_NG, bits)
    assert (packed.shape, packed.bits, packed.group) == (tuple(codes_NK.shape), bits, sizes[1])
    assert len(packed.packed) == -(-N // 32) * 32 * codes_NK.shape[1] * bits // 8
    found = panels.codes(packed)
    assert torch.equal(found[0], codes_NK) and torch.equal(found[1], scale_NG)
    expected = codes_NK * scale_NG.repeat_interleave(sizes[1], 1)
    assert torch.equal(panels.numbers(packed), expected)


@needs_library
@fast
@given(outputs, groups, st.sampled_from([4, 8]), st.sampled_from([1, 4, 13]))
def test_the_library_multiplies_them_as_the_reference_does(N: int, sizes: tuple[int, int], bits: int, M: int) -> None:
    codes_NK, scale_NG = drawn(N, *sizes, bits, M)
    x_MK = torch.randn(M, codes_NK.shape[1], generator=torch.Generator().manual_seed(N))
    ours = native.linear(x_MK, panels.pack_codes(codes_NK, scale_NG, bits))
    expected = reference.linear(x_MK, PlainWeight(codes_NK, scale_NG, bits))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@needs_library
@fast
@given(outputs, groups, st.sampled_from([4, 8]), st.integers(0, 9))
def test_codes_of_the_reference_are_packed_as_the_library_packs_numbers(
    N: int, sizes: tuple[int, int], bits: int, seed: int
) -> None:
    w_NK = torch.randn(N, sizes[0] * sizes[1], generator=torch.Generator().manual_seed(seed))
    theirs, plain = native.pack(w_NK, bits, sizes[1]), reference.pack(w_NK, bits, sizes[1])
    ours = panels.pack_codes(plain.q_NK, plain.scale_Ng, bits)
    assert torch.equal(ours.packed, theirs.packed) and torch.equal(ours.scale, theirs.scale)
    assert (ours.shape, ours.group, ours.bits) == (theirs.shape, theirs.group, theirs.bits)


@needs_library
@fast
@given(outputs, st.integers(1, 70))
def test_halves_are_packed_as_the_library_packs_them_and_come_back(N: int, pairs: int) -> None:
    w_NK = torch.randn(N, 2 * pairs, generator=torch.Generator().manual_seed(N))
    ours, theirs = panels.pack_halves(w_NK), native.pack(w_NK, 16, 0)
    assert torch.equal(ours.packed, theirs.packed) and ours.scale.shape == theirs.scale.shape
    assert (ours.shape, ours.group, ours.bits) == (theirs.shape, theirs.group, theirs.bits)
    assert torch.equal(panels.numbers(ours), w_NK.bfloat16())
