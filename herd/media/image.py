"""An image, from any file that Pillow opens to the tiles that the encoder sees. Spec §4.5.

Shape suffixes: N tiles, C channels, Y and X pixels.
"""

import io
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image as Pillow
from PIL import ImageCms, ImageOps
from PIL.Image import Image
from torch import Tensor

from herd.config import VisionConfig
from herd.errors import SourceError

TILES = 16  # of one image, besides that of the whole
_WHITE = (255, 255, 255)
_FOREIGN = {"EPS"}  # a program, which Pillow would have run by another one


Grey = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


class Tiles(NamedTuple):
    """Normalised pixels of an image: rows * columns tiles, row by row, and if these are several, one of the whole."""

    pixels_NCYX: Tensor
    rows: int
    columns: int


def open_image(source: str | Path | bytes) -> Image:
    """An image in RGB, upright as its EXIF data say, on white where it is transparent; of an animation the first one.

    source: a path, or what the file holds. SourceError if it is no image, damaged or cut off, or has more pixels than
    Pillow takes for one.
    """
    name = f"an image of {len(source):,} bytes" if isinstance(source, bytes) else str(source)
    Pillow.init()
    formats = [kind for kind in Pillow.ID if kind not in _FOREIGN]
    try:
        with Pillow.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats) as image:
            return _rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # readers of damaged files raise whatever they run into
        reason = str(error) or type(error).__name__
        if isinstance(error, Pillow.UnidentifiedImageError):
            reason = "it is none, or of a kind that Pillow does not read"
        raise SourceError(f"cannot read {name} as an image: {' '.join(reason.split())}") from error


def _rgb(image: Image) -> Image:
    if image.mode.startswith(("I", "F")):
        return Pillow.fromarray(_eight_bits(image)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        on_white = Pillow.new("RGB", image.size, _WHITE)
        on_white.paste(image, mask=image.getchannel("A"))
        return on_white
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert converted is not None, "it is not changed in place"
        return converted
    return image.convert("RGB")


def _eight_bits(image: Image) -> Grey:
    """Grey of 16 bits is made coarser; grey of 32, which has no range of its own, is stretched from black to white."""
    grey = np.asarray(image).astype(np.float64)
    if not np.isfinite(grey).all():
        raise ValueError("it holds values that are not finite numbers")
    if image.mode.startswith("I;16"):
        low, high = 0.0, 65535.0
    else:
        low, high = grey.min(), grey.max()
    coarse = np.rint((grey - low) * (255 / (high - low) if high > low else 0)).astype(np.uint8)
    if (transparent := image.info.get("transparency")) is not None:
        coarse[grey == transparent] = 255
    return coarse


def cut(image: Image, cfg: VisionConfig) -> Tiles:
    """The tiles of an RGB image, pixel by pixel those of Meta's code."""
    size = cfg.image_size
    columns, rows = canvas(*image.size, size)
    on_black = Pillow.new("RGB", (columns * size, rows * size))
    on_black.paste(image.resize(_fitting(*image.size, columns, rows, size), Pillow.Resampling.BILINEAR))
    tiles_NCYX = _normalised(on_black).unflatten(1, (rows, size)).unflatten(3, (columns, size))
    tiles_NCYX = tiles_NCYX.permute(1, 3, 0, 2, 4).flatten(0, 1)
    if rows * columns > 1:
        whole_CYX = _normalised(image.resize((size, size), Pillow.Resampling.BILINEAR))
        tiles_NCYX = torch.cat([tiles_NCYX, whole_CYX.unsqueeze(0)])
    return Tiles(tiles_NCYX.contiguous(), rows, columns)


def canvas(width: int, height: int, size: int) -> tuple[int, int]:
    """(columns, rows) of the tiles of `size` pixels that an image is put on: those that enlarge it least or, if all are
    too small, reduce it least; of equal ones the fewest."""
    grids = [(a, b) for a in range(1, TILES + 1) for b in range(1, TILES // a + 1)]
    columns, rows = torch.tensor(grids).T
    # In float32 as in Meta's code, for which scales are equal that otherwise differ a little.
    scales = torch.minimum(columns * size / width, rows * size / height)
    fitting = scales[scales >= 1]
    best = scales == (fitting.min() if len(fitting) else scales.max())
    return min((grid for grid, is_best in zip(grids, best.tolist(), strict=True) if is_best), key=math.prod)


def _fitting(width: int, height: int, columns: int, rows: int, size: int) -> tuple[int, int]:
    """Width and height that keep the image's proportions within its canvas; it grows no further than to one tile."""
    most_x, most_y = min(max(width, size), columns * size), min(max(height, size), rows * size)
    by_x, by_y = most_x / width, most_y / height
    if by_x < by_y:
        return most_x, max(min(math.floor(height * by_x), most_y), 1)
    return max(min(math.floor(width * by_y), most_x), 1), most_y


def _normalised(image: Image) -> Tensor:
    """Pixels [C, Y, X] from -1 to 1."""
    pixels_CYX = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return (pixels_CYX.float() / 255 - 0.5) / 0.5
