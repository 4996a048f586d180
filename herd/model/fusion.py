"""Early fusion: features of images take the places of the embeddings of their patches. Spec §4.6.

Shape suffixes: B batch, T tokens, N patches, D hidden.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from herd.errors import PromptError


class Patches(NamedTuple):
    """Features of images, and the numbers of their places in a batch that is flattened."""

    at_N: Tensor
    features_ND: Tensor


def places(ids: Sequence[int], patch: int, features: Sequence[Tensor]) -> list[int]:
    """Where the id that stands for one patch is in a prompt.

    features: of each of its images, [tokens, D]. PromptError if these are not as many tokens as there are places.
    """
    at, wanted = [place for place, id in enumerate(ids) if id == patch], sum(len(image) for image in features)
    if len(at) != wanted:
        raise PromptError(
            f"image patches in the prompt: {len(at):,}; of the images given: {wanted:,} (images: {len(features):,}); "
            "give all images of the prompt, in their order"
        )
    return at


def find(ids: Sequence[int], patch: int, features: Sequence[Tensor]) -> Patches | None:
    """The features in their places in a prompt, None if it has no images. See `places`."""
    at = places(ids, patch, features)
    return Patches(torch.tensor(at, device=features[0].device), torch.cat(list(features))) if at else None


def fuse(x_BTD: Tensor, patches: Patches) -> Tensor:
    """The embeddings with the features in their places."""
    flat = x_BTD.flatten(0, 1).index_copy(0, patches.at_N, patches.features_ND.to(x_BTD))
    return flat.view_as(x_BTD)
