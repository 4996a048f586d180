"""Prompts with images as an engine takes them: token ids, and what the model sees of each image."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from herd.errors import PromptError
from herd.media import cut, open_image
from herd.model.vision import Vision
from herd.prompt.images import expand

Source = str | Path | bytes  # of an image: a path, or what the file holds


@torch.inference_mode()
def look(
    vision: Vision | None, special: Mapping[str, int], ids: Sequence[int], images: Sequence[Source]
) -> tuple[list[int], list[Tensor]]:
    """Ids in which each `<|image|>` became the tokens of an image, and the features of these images, in their order.

    special: text and id of the tokenizer's special tokens. PromptError if the model sees no images, or these are not
    as many as the prompt has places for; SourceError for one that cannot be read.
    """
    if vision is None:
        if images:
            raise PromptError(f"this model has no image encoder; ask it without images (given: {len(images):,})")
        return list(ids), []
    seen = [cut(open_image(image), vision.config) for image in images]
    grids = [(tiles.rows, tiles.columns) for tiles in seen]
    ids = expand(ids, grids, special, vision.config.tokens_per_tile)
    return ids, [vision.features(tiles.pixels_NCYX) for tiles in seen]
