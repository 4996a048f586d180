"""Meta's own preprocessing of images (llama-models, a test dependency).

It takes from torchvision what torchvision itself hands to Pillow or torch: resizing of Pillow images, and scaling of
pixels to numbers. torchvision does not import beside every build of torch, so these few functions stand in for it.
"""

import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from enum import Enum
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFile
from torch import Tensor

from tests.model import meta_reference


class _InterpolationMode(Enum):
    BILINEAR = "bilinear"


def _resize(image: Image.Image, size: Sequence[int], interpolation: Any = None) -> Image.Image:
    """Of a Pillow image, to (height, width)."""
    return image.resize((size[1], size[0]), Image.Resampling.BILINEAR)


class _Resize:
    def __init__(self, size: Sequence[int]) -> None:
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        return _resize(image, self.size)


class _ToTensor:
    def __call__(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)


class _Normalize:
    def __init__(self, mean: Sequence[float], std: Sequence[float], inplace: bool = False) -> None:
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))

    def __call__(self, x: Tensor) -> Tensor:
        return x.sub(self.mean).div(self.std)


class _Compose:
    def __init__(self, steps: Sequence[Callable[[Any], Any]]) -> None:
        self.steps = steps

    def __call__(self, x: Any) -> Any:
        return functools.reduce(lambda value, step: step(value), self.steps, x)


def _stand_ins() -> dict[str, ModuleType]:
    root, transforms, functional = (ModuleType(f"torchvision{part}") for part in ("", ".transforms", ".functional"))
    transforms.__dict__.update(
        {
            "Compose": _Compose,
            "InterpolationMode": _InterpolationMode,
            "Normalize": _Normalize,
            "Resize": _Resize,
            "ToTensor": _ToTensor,
            "functional": functional,
        }
    )
    functional.resize = _resize  # type: ignore[attr-defined]
    root.transforms = transforms  # type: ignore[attr-defined]
    return {"torchvision": root, "torchvision.transforms": transforms}


_OURS = ("llama_models.llama4.preprocess", "llama_models.llama4.chat_format")


@functools.cache
def load(name: str) -> ModuleType:
    """llama_models.llama4.preprocess or .chat_format: a copy, that others may import in their own way."""
    meta_reference.load()  # which checks the version
    stand_ins, truncated = _stand_ins(), ImageFile.LOAD_TRUNCATED_IMAGES
    names = (*stand_ins, *_OURS)
    kept = {other: sys.modules.pop(other) for other in names if other in sys.modules}
    sys.modules.update(stand_ins)
    try:
        return importlib.import_module(f"llama_models.llama4.{name}")
    finally:
        for other in names:
            sys.modules.pop(other, None)
        sys.modules.update(kept)
        ImageFile.LOAD_TRUNCATED_IMAGES = truncated  # Meta's module changes it for all


def tiles(image: Image.Image, size: int = 336) -> tuple[Tensor, tuple[int, int]]:
    """What Meta's chat format makes of an RGB image: its tiles and (rows, columns)."""
    preprocess = load("preprocess")
    pixels, grid = preprocess.VariableSizeImageTransform(size)(image, max_num_chunks=16)
    if len(pixels) > 1:
        whole = preprocess.ResizeNormalizeImageTransform(size, size)(image)
        pixels = torch.cat([pixels, whole.unsqueeze(0)])
    return pixels, grid
