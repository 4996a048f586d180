"""The checkpoint that is bigger than memory: the same numbers for Herd and for llama.cpp."""

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from bench.offload_model import halves, random_weight
from herd.kernels import panels
from herd.kernels.layers import apart


@pytest.mark.parametrize(("N", "K"), [(32, 32), (64, 96), (160, 256)])
def test_both_forms_of_a_weight_are_the_same_numbers(N: int, K: int) -> None:
    weight = random_weight(np.random.Generator(np.random.SFC64(1)), N, K)
    ours = panels.numbers(weight.packed()).numpy()
    theirs = gguf.dequantize(weight.q4_0(), GGMLQuantizationType.Q4_0)
    assert ours.shape == (N, K) and np.array_equal(ours, theirs)
    gate, up = apart(panels.numbers(weight.packed()), N // 2)
    for part, expected in zip(halves(weight), (gate, up), strict=True):
        assert np.array_equal(gguf.dequantize(part, GGMLQuantizationType.Q4_0), expected.numpy())
    if N * K > 10_000:
        assert abs(ours.mean()) < 0.1 / K**0.5 and 0.9 < ours.std() * K**0.5 < 1.1
