"""Keys and values: the table of spec §9 to the byte, contexts' formats; and activations."""

import pytest

from herd.config import BEHEMOTH_ASSUMED, MAVERICK, SCOUT, TextConfig
from herd.errors import ConfigError
from herd.plan.memory import activations, kv, kv_bytes_per_token, parse_kv, step_tokens
from tests.model.tiny_models import tiny

K, M, GiB = 1024, 1024**2, 1024**3
FORMATS = ("bf16", "fp8", "int4")  # the columns of spec §9, which counts no scales


@pytest.mark.parametrize("cfg", [SCOUT, MAVERICK], ids=["scout", "maverick"])
@pytest.mark.parametrize(
    ("context", "total_GiB"),
    [
        (8 * K, (1.5, 0.75, 0.375)),
        (128 * K, (7.125, 3.5625, 1.78125)),
        (256 * K, (13.125, 6.5625, 3.28125)),
        (M, (49.125, 24.5625, 12.28125)),
        (10 * M, (481.125, 240.5625, 120.28125)),
    ],
)
def test_keys_and_values_are_those_of_the_spec(
    cfg: TextConfig, context: int, total_GiB: tuple[float, float, float]
) -> None:
    for name, expected in zip(FORMATS, total_GiB, strict=True):
        far, near = kv(cfg, parse_kv(name), context)
        assert far.weight_bytes + near.weight_bytes == expected * GiB
        assert near.weight_bytes == (0.28125 if name == "int4" else 0.5625 if name == "fp8" else 1.125) * GiB
        assert (far.layers, near.layers, near.tokens) == (12, 36, 8192)


def test_each_token_adds_what_the_spec_says() -> None:
    assert [kv_bytes_per_token(SCOUT, parse_kv(name)) for name in ("bf16", "fp8")] == [49_152, 24_576]
    assert kv_bytes_per_token(SCOUT, parse_kv("int4")) == 12_288 + 12 * 2 * 8 * 2  # float16 scales
    far, near = kv(SCOUT, parse_kv("bf16"), 1)
    assert far.nbytes + near.nbytes == 196_608


def test_contexts_take_what_their_format_says() -> None:
    """docs/context-format.md: of Cria, with three key/value heads of 64 in its global layer."""
    cria = tiny(num_attention_heads=9, num_key_value_heads=3, head_dim=64)
    assert [kv_bytes_per_token(cria, parse_kv(name)) for name in ("int8", "int4")] == [396, 204]


@pytest.mark.parametrize(("gpus", "share"), [(1, 8), (2, 4), (3, 3), (8, 1), (16, 1), (64, 1)])
def test_beyond_a_gpu_for_each_head_keys_and_values_are_kept_more_than_once(gpus: int, share: int) -> None:
    one, several = (kv(BEHEMOTH_ASSUMED, parse_kv("bf16"), M, n) for n in (1, gpus))
    for whole, each in zip(one, several, strict=True):
        assert each.nbytes == whole.nbytes * share // 8


def test_a_model_without_chunks_or_global_layers() -> None:
    far, near = kv(tiny(attention_chunk_size=None), parse_kv("bf16"), 100)
    assert (far.tokens, near.tokens) == (100, 100)
    far, near = kv(tiny(nope_layer_interval=None), parse_kv("bf16"), 100)
    assert (far.layers, far.nbytes, near.layers, near.tokens) == (0, 0, 4, 8)


def test_activations_of_scout_by_hand() -> None:
    T, D, F = 8192, 5120, 8192
    ffn = 3 * F + 3 * F + 2 * D  # wider than q, k, v and attended
    assert activations(SCOUT, T) == 2 * T * (3 * D + ffn) + 4 * 202_048
    dense = 3 * 16_384
    assert activations(MAVERICK, T) == 2 * T * (3 * D + max(ffn, dense)) + 4 * 202_048


def test_a_prompt_is_read_in_attention_chunks_unless_told_otherwise() -> None:
    assert step_tokens(SCOUT, M, None) == 8192
    assert step_tokens(SCOUT, M, 2048) == 2048
    assert step_tokens(SCOUT, 100, None) == 100
    assert step_tokens(tiny(attention_chunk_size=None), M, None) == 8192


def test_an_unknown_format_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="known: bf16, int8, fp8, int4"):
        parse_kv("int3")
