"""The encoder's parts as spec §4 states them, and what does not change its features."""

import pytest
import torch

from herd.config import SCOUT, VISION
from herd.model.vision import Vision, grid_angles, pixel_shuffle
from tests.model.tiny_vision import build_vision, tiles, tiny_vision


def test_frequencies_of_the_spec() -> None:
    angles = grid_angles(VISION)
    assert angles.shape == (577, 44) and angles.dtype == torch.float32
    # Patch 0 is in the first column and row, both counted from 1.
    expected = torch.tensor([1, 0.657933224657568, 0.43287612810830584, 1.519911082952933e-4])
    for half in (angles[0, :22], angles[0, 22:]):
        torch.testing.assert_close(half[[0, 1, 2, 21]], expected, rtol=1e-6, atol=0)
    # Patch 51 is in column 3 and row 2: width in the first half of the pairs, height in the second.
    torch.testing.assert_close(angles[51], torch.cat([4 * angles[0, :22], 3 * angles[0, 22:]]))
    assert not angles[576].any(), "the class token does not turn"


def test_pixel_shuffle_of_the_spec() -> None:
    cfg, number = tiny_vision(hidden_size=8, image_size=24 * 7), torch.arange(24 * 24)
    shuffled = pixel_shuffle(number.view(1, -1, 1).expand(1, -1, 8), cfg)
    assert shuffled.shape == (1, 144, 32)
    by_token = shuffled[0, :, ::8]
    assert by_token[0].tolist() == [0, 1, 24, 25]
    assert by_token[1, 0] == 2 and by_token[12, 0] == 2 * 24


@pytest.mark.parametrize("ratio", [1.0, 0.5, 0.25])
def test_ratio_of_pixel_shuffle(ratio: float) -> None:
    cfg = tiny_vision(pixel_shuffle_ratio=ratio)
    features = build_vision(cfg, 20).features(tiles(3))
    assert features.shape == (3 * cfg.tokens_per_tile, 20) == (3 * 16 * ratio**2, 20)


def test_parameters_of_the_released_models() -> None:
    with torch.device("meta"):
        vision = Vision(VISION, SCOUT.hidden_size)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in vision.named_children()}
    assert counts == {"vision_model": 850_960_896, "multi_modal_projector": 20_971_520}


@torch.inference_mode()
def test_tiles_do_not_see_each_other() -> None:
    """However many are given at a time; more than are encoded at a time included."""
    vision, many = build_vision(), tiles(11)
    features = vision.features(many)
    assert features.std() > 0.3, "large enough for a difference to show"
    one_by_one = torch.cat([vision.features(tile.unsqueeze(0)) for tile in many])
    torch.testing.assert_close(features, one_by_one, rtol=0, atol=1e-5)
    assert (features[:4] - features[4:8]).abs().max() > 0.1


@torch.inference_mode()
def test_features_have_the_type_of_the_weights() -> None:
    vision = build_vision()
    expected = vision.features(tiles(2))
    features = vision.bfloat16().features(tiles(2))
    assert features.dtype == torch.bfloat16
    assert (features.float() - expected).abs().max() < 0.1 * expected.std()
