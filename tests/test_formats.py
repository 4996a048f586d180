"""Names of formats of weights: what they stand for, and what is refused."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd.errors import ConfigError
from herd.formats import BF16, FP8, Format, Weights, fitting_group, parse

forms = st.one_of(
    st.sampled_from([BF16, FP8]), st.builds(Format, st.sampled_from(["int8", "int4"]), st.integers(8, 4096))
)


@given(st.builds(Weights, forms, forms, forms, forms, forms))
def test_names_say_all(weights: Weights) -> None:
    assert parse(str(weights)) == weights


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("int4", Weights.all(Format("int4", 64))),
        ("int8:256", Weights.all(Format("int8", 256))),
        ("fp8", Weights.all(FP8)),
        ("bf16", Weights()),
        ("experts=int4", Weights(experts=Format("int4", 64))),
        ("attention=fp8", Weights(attention=FP8, global_attention=FP8)),
        ("attention=fp8,global_attention=bf16", Weights(attention=FP8)),
        ("int4,global_attention=bf16", replace(Weights.all(Format("int4", 64)), global_attention=BF16)),
        ("fp8,attention=bf16", Weights(experts=FP8, shared=FP8, head=FP8)),
        ("head=int8:32,shared=fp8", Weights(shared=FP8, head=Format("int8", 32))),
    ],
)
def test_what_is_not_named_is_as_what_stands_first_or_bf16(text: str, weights: Weights) -> None:
    assert parse(text) == weights


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("int5", "weights cannot be 'int5'; use bf16, int8, int4"),
        ("int4:x", "cannot be 'int4:x'"),
        ("int4:", "cannot be 'int4:'"),
        ("bf16:8", "cannot be 'bf16:8'"),
        ("int4:4", "groups of 4 inputs; use 8 or more"),
        ("router=int4", "no part 'router' .*; its parts: experts, shared, attention, global_attention, head"),
        ("experts=int4,experts=int8", "name experts twice"),
        ("experts=", "cannot be ''"),
        ("head=int8,int4", "no part 'int4'"),
    ],
)
def test_what_is_no_name_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        parse(text)


def test_bits_of_a_format() -> None:
    assert [parse(text).head.bits for text in ("bf16", "fp8", "int8", "int4:8")] == [16, 8, 8, 4]


@given(st.integers(1, 600).map(lambda n: 8 * n), st.integers(8, 400))
def test_groups_are_as_large_as_fit(inputs: int, most: int) -> None:
    group = fitting_group(inputs, most)
    assert inputs % group == group % 8 == 0 and group <= most
    assert not any(inputs % larger == 0 for larger in range(group + 8, min(most, inputs) + 1, 8))


def test_inputs_that_no_group_fits_are_refused() -> None:
    with pytest.raises(ConfigError, match="has 12 inputs; int8 and int4 need a multiple of 8"):
        fitting_group(12, 64)
