"""What a checkpoint consists of, by its headers: no weight is read."""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import get_args

from herd.checkpoint.files import WeightFiles
from herd.checkpoint.hf import read_hf_config
from herd.checkpoint.load import open_weights
from herd.checkpoint.packed import is_packed
from herd.checkpoint.shapes import Part, part_of
from herd.config import TextConfig, VisionConfig

_ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "U8": 1}


@dataclass(frozen=True)
class Summary:
    """format: of the files. bytes_of: weights in each part of the model. types: of weights, with bytes."""

    format: str
    text: TextConfig
    vision: VisionConfig | None
    bytes_of: dict[Part, int]
    types: dict[str, int]


def summarize(path: Path) -> Summary:
    """Errors as for `open_weights`: the files are checked against the configuration."""
    if is_packed(path):
        return _packed(path)
    bytes_of, types = _nothing(), dict[str, int]()
    with open_weights(path) as weights:
        for name in sorted(weights.names):
            stored = weights.stored(name)
            bytes_of[part_of(name)] += stored.nbytes
            types[stored.kind] = types.get(stored.kind, 0) + stored.nbytes
        kinds = {file.suffix for file in weights.files}
        format = "Meta" if ".pth" in kinds else "GGUF" if ".gguf" in kinds else "Hugging Face"
        return Summary(format, weights.text, weights.vision, bytes_of, types)


def _nothing() -> dict[Part, int]:
    return dict.fromkeys(get_args(Part), 0)


def _packed(folder: Path) -> Summary:
    """Names of packed tensors are not those of a model, but name the same parts."""
    bytes_of, types = _nothing(), dict[str, int]()
    with WeightFiles(folder) as files:
        for name in sorted(files.names):
            kind = files.kind(name)
            size = prod(files.shape(name)) * _ITEM_BYTES[kind]
            bytes_of[part_of(name)] += size
            kind = "packed" if kind == "U8" else kind
            types[kind] = types.get(kind, 0) + size
    return Summary("Herd, packed", *read_hf_config(folder), bytes_of, types)
