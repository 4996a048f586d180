"""The tokens that stand for an image in a prompt. Spec §4.6."""

from collections.abc import Mapping, Sequence

from herd.errors import PromptError

IMAGE = "<|image|>"  # in a prompt without patches it stands for a whole image, in an image before its last tile
_PARTS = ("<|image_start|>", "<|image_end|>", IMAGE, "<|patch|>", "<|tile_x_separator|>", "<|tile_y_separator|>")


def image_ids(special: Mapping[str, int], rows: int, columns: int, tokens_per_tile: int) -> list[int]:
    """Ids of an image that was cut into rows * columns tiles.

    special: text and id of the tokenizer's special tokens. PromptError if it lacks one that images need.
    """
    if lacking := [part for part in _PARTS if part not in special]:
        raise PromptError(f"this vocabulary has no token {lacking[0]!r}, so that prompts can hold no images")
    start, end, image, patch, next_tile, next_row = (special[part] for part in _PARTS)
    tile = [patch] * tokens_per_tile
    ids = [start]
    if rows * columns > 1:
        row = [*tile, *[next_tile, *tile] * (columns - 1), next_row]
        ids += row * rows
    return [*ids, image, *tile, end]


def expand(
    ids: Sequence[int], images: Sequence[tuple[int, int]], special: Mapping[str, int], tokens_per_tile: int
) -> list[int]:
    """A prompt in which each `<|image|>` became the ids of an image, in their order; one with patches is left as it is.

    images: rows and columns of each. PromptError if they are not as many as there are places for them.
    """
    if special.get("<|patch|>") in ids:
        return list(ids)
    place = special.get(IMAGE)
    found = sum(id == place for id in ids)
    if found != len(images):
        raise PromptError(
            f"places for images ({IMAGE}) in the prompt: {found:,}; images given: {len(images):,}; give one for each"
        )
    rest, expanded = iter(images), list[int]()
    for id in ids:
        expanded += image_ids(special, *next(rest), tokens_per_tile) if id == place else [id]
    return expanded
