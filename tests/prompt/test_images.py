"""The tokens of an image equal those of Meta's chat format and of transformers' processor."""

from types import SimpleNamespace

import pytest
import torch
from transformers.models.llama4.processing_llama4 import Llama4Processor

from herd.config import VISION
from herd.errors import PromptError
from herd.prompt.images import expand, image_ids
from tests.media import meta_preprocess

# Spec §5.2.
SPECIAL = {
    "<|image_start|>": 200080,
    "<|image_end|>": 200081,
    "<|tile_x_separator|>": 200084,
    "<|tile_y_separator|>": 200085,
    "<|image|>": 200090,
    "<|patch|>": 200092,
}
GRIDS = [(rows, columns) for rows in range(1, 17) for columns in range(1, 16 // rows + 1)]


def test_ids_equal_meta() -> None:
    module = meta_preprocess.load("chat_format")
    assert SPECIAL.items() <= module.Tokenizer.get_instance().special_tokens.items()
    sizes = {"image_size": {"height": 336, "width": 336}, "patch_size": {"height": 14, "width": 14}}
    vision = module.VisionArgs(
        **sizes, dim=1408, n_layers=34, n_heads=16, mlp_ratio=4.0, output_dim=4096, pixel_shuffle_ratio=0.5
    )
    theirs = module.ChatFormat(SimpleNamespace(special_tokens=SPECIAL), vision)
    assert len(GRIDS) == 50
    for rows, columns in GRIDS:
        count = rows * columns + (rows * columns > 1)
        image = module.TransformedImage(torch.empty(count, 3, 336, 336), (rows, columns))
        assert image_ids(SPECIAL, rows, columns, VISION.tokens_per_tile) == theirs._encode_image(image)


@pytest.mark.parametrize("grid", GRIDS)
def test_ids_equal_transformers(grid: tuple[int, int]) -> None:
    text = Llama4Processor._prompt_split_image(None, grid, 144)
    for name, id in SPECIAL.items():
        text = text.replace(name, f"{id} ")
    assert image_ids(SPECIAL, *grid, 144) == [int(id) for id in text.split()]


@pytest.mark.parametrize(("grid", "count"), [((1, 1), 147), ((2, 3), 1017), ((1, 16), 2467)])
def test_counts_of_the_spec(grid: tuple[int, int], count: int) -> None:
    assert len(image_ids(SPECIAL, *grid, 144)) == count


def test_places_become_images_in_their_order() -> None:
    place = SPECIAL["<|image|>"]
    ids = expand([1, place, 2, place, place], [(1, 1), (1, 2), (1, 1)], SPECIAL, 2)
    one, two = image_ids(SPECIAL, 1, 1, 2), image_ids(SPECIAL, 1, 2, 2)
    assert ids == [1, *one, 2, *two, *one]
    assert expand(ids, [(1, 1), (1, 2), (1, 1)], SPECIAL, 2) == ids, "what has patches is left as it is"
    assert expand([1, 2], [], SPECIAL, 2) == [1, 2]


def test_places_and_images_must_be_as_many() -> None:
    place = SPECIAL["<|image|>"]
    with pytest.raises(PromptError, match=r"places for images \(<\|image\|>\) in the prompt: 2; images given: 1; give"):
        expand([place, 1, place], [(1, 1)], SPECIAL, 144)
    with pytest.raises(PromptError, match=r"in the prompt: 1; images given: 0"):
        expand([place], [], SPECIAL, 144)
    with pytest.raises(PromptError, match=r"in the prompt: 0; images given: 1"):
        expand([1], [(1, 1)], SPECIAL, 144)


def test_a_vocabulary_without_images() -> None:
    with pytest.raises(PromptError, match=r"no token '<\|patch\|>'"):
        image_ids({name: id for name, id in SPECIAL.items() if name != "<|patch|>"}, 1, 1, 144)
