"""The image encoder's configuration: as transformers reads and writes it, and what it refuses."""

from typing import Any

import pytest
from transformers import Llama4Config

from herd.config import MAVERICK, SCOUT, VISION, TextConfig, VisionConfig
from herd.errors import ConfigError
from tests.model.tiny_models import tiny
from tests.model.tiny_vision import TINY


def test_numbers_of_the_spec() -> None:
    assert (VISION.grid, VISION.shuffled, VISION.tokens_per_tile) == (24, 4, 144)
    assert VISION.num_parameters(5120) == 871_932_416
    for text, total in ((SCOUT, 108_641_793_536), (MAVERICK, 401_583_781_376)):
        assert text.num_parameters() + VISION.num_parameters(text.hidden_size) == total


@pytest.mark.parametrize(("vision", "text"), [(VISION, SCOUT), (TINY, tiny())], ids=["released", "tiny"])
def test_round_trip_through_transformers(vision: VisionConfig, text: TextConfig) -> None:
    raw = vision.to_hf(text)
    assert VisionConfig.from_hf(raw) == vision
    theirs = Llama4Config.from_dict(raw).to_dict()
    assert VisionConfig.from_hf(theirs) == vision
    assert TextConfig.from_hf(theirs).num_parameters() == text.num_parameters()


def test_a_text_model_has_none() -> None:
    assert VisionConfig.from_hf(SCOUT.to_hf()) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_channels": 1}, "num_channels is 1; images have 3"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"patch_size": 15}, "tiles of 336 pixels cannot be cut into patches of 15"),
        ({"num_attention_heads": 15}, "15 heads cannot share hidden_size 1408 in whole pairs"),
        ({"pixel_shuffle_ratio": 0.7}, "pixel_shuffle_ratio 0.7 does not divide 24 patches"),
        ({"pixel_shuffle_ratio": 2.0}, "pixel_shuffle_ratio 2.0 does not divide"),
        ({"vision_output_dim": 7680}, "vision_output_dim 7680, projector_input_dim 4096"),
        ({"hidden_act": "silu"}, "hidden_act of the vision model is 'silu'; Llama 4 has 'gelu'"),
        ({"multi_modal_projector_bias": True}, "multi_modal_projector_bias"),
        ({"model_type": "clip_vision_model"}, "the vision model is 'clip_vision_model'"),
        ({"hidden_size": None}, "vision_config lacks hidden_size"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    raw = VISION.to_hf(SCOUT)
    raw["vision_config"] |= changes
    with pytest.raises(ConfigError, match=message):
        VisionConfig.from_hf(raw)
