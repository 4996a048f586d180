"""Bytes of weights: the tables of spec §1.4 and §7, Meta's shards, and what the kernels make."""

import pytest
import torch

from herd.config import BEHEMOTH_ASSUMED, MAVERICK, PRESETS, SCOUT, VISION, TextConfig
from herd.errors import ConfigError
from herd.model import Transformer
from herd.plan.weights import PARTS, Part, parse_weights, parts
from tests.model.tiny_models import tiny


def by_name(cfg: TextConfig, weights: str, gpus: int = 1) -> dict[str, Part]:
    return {part.name: part for part in parts(cfg, VISION, parse_weights(weights), gpus)}


def total(cfg: TextConfig, weights: str, *, scales: bool = True) -> int:
    found = by_name(cfg, weights).values()
    return sum(part.nbytes if scales else part.weight_bytes for part in found)


@pytest.mark.parametrize(
    ("cfg", "count"), [(SCOUT, 108_641_793_536), (MAVERICK, 401_583_781_376)], ids=["scout", "maverick"]
)
def test_parameters_and_bf16_bytes_are_those_of_the_spec(cfg: TextConfig, count: int) -> None:
    found = by_name(cfg, "bf16")
    assert sum(part.parameters for part in found.values()) == count
    assert total(cfg, "bf16") == 2 * count
    assert all(part.scale_bytes == 0 for part in found.values())
    assert found["vision"].parameters == 871_932_416
    assert found["embedding"].parameters == 1_034_485_760


@pytest.mark.parametrize(
    ("cfg", "weights", "gigabytes"),
    [
        (SCOUT, "bf16", 217.3),
        (SCOUT, "int4_mixed", 66.5),
        (SCOUT, "experts=int4:128", 75.3),
        (MAVERICK, "bf16", 803.2),
        (MAVERICK, "int4_mixed", 231.0),
        (MAVERICK, "experts=int4:128", 235.4),
    ],
)
def test_bytes_are_those_of_the_spec(cfg: TextConfig, weights: str, gigabytes: float) -> None:
    assert round(total(cfg, weights) / 1e9, 1) == gigabytes


@pytest.mark.parametrize(("cfg", "gigabytes", "layers"), [(SCOUT, 124.7, 46), (MAVERICK, 432.7, 23)])
def test_fp8_as_released_leaves_the_ends_and_counts_scales_apart(
    cfg: TextConfig, gigabytes: float, layers: int
) -> None:
    """The spec's figures are without scales, of which each output of a matrix has one."""
    assert round(total(cfg, "fp8_mixed", scales=False) / 1e9, 1) == gigabytes
    outputs = layers * cfg.num_local_experts * (2 * cfg.intermediate_size + cfg.hidden_size)
    assert total(cfg, "fp8_mixed") - total(cfg, "fp8_mixed", scales=False) == 4 * outputs


def test_int4_mixed_quantises_what_the_spec_says() -> None:
    found = by_name(SCOUT, "int4_mixed")
    four = [part for part in found.values() if part.format == "int4:128"]
    assert sum(part.parameters for part in four) == 102_676_561_920
    assert sum(part.scale_bytes for part in four) == 102_676_561_920 // 128 * 4
    assert by_name(MAVERICK, "int4_mixed")["dense"].format == "bf16"


SMALL = (tiny(), tiny(interleave_moe_layer_step=2), tiny(num_local_experts=0), tiny(tie_word_embeddings=True))


@pytest.mark.parametrize("cfg", [*PRESETS.values(), *SMALL])
def test_parts_are_all_that_the_model_has(cfg: TextConfig) -> None:
    with torch.device("meta"):
        expected = sum(p.numel() for p in Transformer(cfg).parameters())
    found = parts(cfg, None, parse_weights("bf16"))
    assert sum(part.parameters for part in found) == expected == cfg.num_parameters()
    assert [part.name for part in found] == [name for name in PARTS if name in {part.name for part in found}]


def test_eight_gpus_hold_what_metas_eight_files_hold() -> None:
    """Spec §6.2: [896, 5120] of q, k and v, [25256, 5120] of the embedding, 1,024 of each expert's width."""
    found = by_name(SCOUT, "bf16", 8)
    assert found["attention"].parameters == 48 * (896 * 5120 + 5120 * 640)
    assert found["embedding"].parameters == 25_256 * 5120
    assert found["routed_experts"].parameters == 48 * 16 * 3 * 5120 * 1024
    assert found["router"].parameters == 48 * 16 * 5120  # everywhere
    assert found["norms"].parameters == 97 * 5120


@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_gpus_hold_the_whole_model_together(gpus: int) -> None:
    whole, each = by_name(BEHEMOTH_ASSUMED, "int4"), by_name(BEHEMOTH_ASSUMED, "int4", gpus)
    for name in ("attention", "routed_experts", "shared_experts", "embedding", "head"):
        assert gpus * each[name].parameters == whole[name].parameters


def test_beyond_eight_gpus_key_value_heads_are_kept_more_than_once() -> None:
    D, d = BEHEMOTH_ASSUMED.hidden_size, 128
    each = by_name(BEHEMOTH_ASSUMED, "bf16", 16)["attention"].parameters
    assert each == 96 * (2 * 8 * d * D + 2 * 1 * d * D)  # 8 of 128 query heads, and one of 8 key/value heads


@pytest.mark.parametrize("weights", ["int8", "int4", "int4:32", "int4:128", "experts=int4,attention=int8"])
def test_scales_are_those_of_the_spec(weights: str) -> None:
    found, choice = by_name(SCOUT, weights), parse_weights(weights)
    for name in ("attention", "routed_experts", "shared_experts", "head"):
        form = choice.of(name, SCOUT, 1)
        expected = found[name].parameters // form.group * 4 if form.whole else 0
        assert found[name].scale_bytes == expected
        assert found[name].weight_bytes == found[name].parameters * form.bits // 8


def test_global_layers_may_have_a_format_of_their_own() -> None:
    found, plain = by_name(SCOUT, "int4,global_attention=int8"), by_name(SCOUT, "int4")
    assert found["attention"].format == "int4:64+int8:64"
    every_fourth = plain["attention"].parameters // 4
    assert found["attention"].weight_bytes - plain["attention"].weight_bytes == every_fourth // 2
    assert found["routed_experts"] == plain["routed_experts"]


@pytest.mark.parametrize("text", ["", "int5", "int4:7", "int4:", "fp8:64", "nose=int4", "experts=", "int4_mixed=int4"])
def test_unknown_formats_are_refused_with_the_known_ones(text: str) -> None:
    with pytest.raises(ConfigError, match="int4_mixed or fp8_mixed"):
        parse_weights(text)
