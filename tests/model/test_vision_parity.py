"""Features and logits of prompts with images equal those of transformers and of Meta's code, which we did not write."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Llama4Config, Llama4ForConditionalGeneration

from herd.config import TextConfig, VisionConfig
from herd.model import Transformer
from herd.model.vision import Vision
from tests.model.meta_reference import Reference
from tests.model.tiny_models import CHUNK, build, memory, tiny, tokens
from tests.model.tiny_vision import PATCH, TINY, build_vision, patches, tiles, tiny_vision

SWITCHES: dict[str, dict[str, Any]] = {
    "as released": {},
    "one layer": {"num_hidden_layers": 1},
    "heads of 8": {"num_attention_heads": 4},
    "quarter": {"pixel_shuffle_ratio": 0.25, "intermediate_size": 512},
    "no shuffle": {"pixel_shuffle_ratio": 1.0, "intermediate_size": 32},
    "larger grid": {"image_size": 56},
    "theta": {"rope_theta": 10.0},
}
MAVERICK_LIKE = {"interleave_moe_layer_step": 2, "use_qk_norm": False}


def transformers_model(text: Transformer, vision: Vision) -> Llama4ForConditionalGeneration:
    config = Llama4Config.from_dict(vision.config.to_hf(text.config))
    model = Llama4ForConditionalGeneration._from_config(config, attn_implementation="eager")
    weights = {f"language_model.{name}": weight for name, weight in text.state_dict().items()}
    model.load_state_dict(weights | vision.state_dict(), strict=True)
    return model.eval()


def prompt(images: list[int], cfg: VisionConfig = TINY, rows: int = 1, seed: int = 1) -> Tensor:
    """Text between images of so many tiles each; tokens of a tile follow each other, over the ends of chunks, too."""
    parts = [tokens(rows, 3, seed) % PATCH]
    for number, count in enumerate(images):
        parts.append(torch.full((rows, count * cfg.tokens_per_tile), PATCH))
        parts.append(tokens(rows, 2 + number, seed + number + 1) % PATCH)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("switch", SWITCHES)
@torch.inference_mode()
def test_features_equal_transformers(switch: str) -> None:
    cfg = tiny_vision(**SWITCHES[switch])
    vision, pixels = build_vision(cfg), tiles(5, cfg)
    theirs = transformers_model(build(tiny()), vision)
    expected = theirs.multi_modal_projector(theirs.get_image_features(pixels, return_dict=True).last_hidden_state)
    assert expected.std() > 0.3, "large enough for a difference to show"
    assert (vision.features(pixels) - expected.flatten(0, 1)).abs().max() <= 1e-4


@pytest.mark.parametrize("text", [tiny(), tiny(**MAVERICK_LIKE)], ids=["scout-like", "maverick-like"])
@torch.inference_mode()
def test_logits_equal_transformers(text: TextConfig) -> None:
    model, vision = build(text), build_vision()
    theirs = transformers_model(model, vision)
    for images in ([1], [3], [1, 2, 3]):
        ids, pixels = prompt(images, rows=2), tiles(2 * sum(images))
        assert ids.shape[1] > CHUNK
        expected = theirs(ids, pixel_values=pixels, use_cache=False).logits
        fused = patches(ids, vision.features(pixels))
        assert expected.std() > 0.5
        for cache in (None, memory(text)):
            assert (model(ids, cache=cache, patches=fused) - expected).abs().max() <= 1e-4
        blank = fused._replace(features_ND=torch.zeros_like(fused.features_ND))
        assert (model(ids, patches=blank) - expected).abs().max() > 0.1, "the images count"


@pytest.mark.parametrize("text", [tiny(), tiny(**MAVERICK_LIKE)], ids=["scout-like", "maverick-like"])
@torch.inference_mode()
def test_features_and_logits_equal_meta(text: TextConfig) -> None:
    model, vision = build(text), build_vision()
    theirs = Reference(text, model.state_dict() | vision.state_dict(), 64, vision.config)
    for images in ([1], [3], [1, 2, 3]):
        ids, pixels = prompt(images, rows=2), tiles(2 * sum(images))
        features = vision.features(pixels)
        by_row = [list(row.split(images)) for row in pixels.chunk(2)]
        assert (features - theirs.features(ids == PATCH, by_row)).abs().max() <= 1e-4
        logits = model(ids, patches=patches(ids, features))
        assert (logits - theirs(ids, images=(ids == PATCH, by_row))).abs().max() <= 1e-4


@torch.inference_mode()
def test_a_batch_mixes_text_and_images() -> None:
    """Each row is what it is alone."""
    model, vision = build(tiny()), build_vision()
    theirs = Reference(tiny(), model.state_dict() | vision.state_dict(), 64, vision.config)
    with_images = prompt([1, 2])
    length = with_images.shape[1]
    ids = torch.cat([with_images, tokens(1, length, 7) % PATCH])
    pixels = tiles(3)
    logits = model(ids, patches=patches(ids, vision.features(pixels)))
    expected = theirs(ids, images=(ids == PATCH, [list(pixels.split([1, 2])), []]))
    assert (logits - expected).abs().max() <= 1e-4
    assert (logits[1] - model(ids[1:])[0]).abs().max() <= 1e-4


@torch.inference_mode()
def test_images_of_earlier_turns_stay() -> None:
    """Turns that are given one after the other, each with an image or two, are one forward pass over all of them."""
    model, vision = build(tiny()), build_vision()
    turns = [prompt([2]), prompt([1, 1], seed=5), tokens(1, 4, 9) % PATCH, prompt([3], seed=6)]
    ids, pixels = torch.cat(turns, 1), tiles(7)
    features = vision.features(pixels)
    expected = transformers_model(model, vision)(ids, pixel_values=pixels, use_cache=False).logits
    cache, logits, start, seen = memory(model.config, rows=1, tokens=ids.shape[1]), [], 0, 0
    for turn in turns:
        positions = torch.arange(start, start + turn.shape[1]).unsqueeze(0)
        count = int((turn == PATCH).sum())
        fused = patches(turn, features[seen : seen + count]) if count else None
        logits.append(model(turn, positions, cache, fused))
        start, seen = start + turn.shape[1], seen + count
    assert (torch.cat(logits, 1) - expected).abs().max() <= 1e-4
