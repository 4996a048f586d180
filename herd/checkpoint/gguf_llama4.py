"""GGUF files of architecture llama4, with or without the `mmproj` file of the image encoder, as weights.

Shape letters: D hidden, E experts, F expert width.
"""

from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from herd.checkpoint.gguf_config import ROPE_FACTORS, VISION_ARCHITECTURE, read_text_config, read_vision_config
from herd.checkpoint.gguf_file import GgufFile
from herd.checkpoint.gguf_names import EXPERTS, from_gguf, layer_of_experts
from herd.checkpoint.gguf_tokenizer import tokenizer_files
from herd.checkpoint.weights import Stored, Weights
from herd.errors import CheckpointError


def open_gguf(path: Path) -> Weights:
    """The weights of a file, which are text only, or of a folder with one model and at most one mmproj file.

    CheckpointError if they are damaged or of another architecture.
    """
    text, vision = (path, None) if path.is_file() else _in_folder(path)
    file = GgufFile(text)
    if file.get("general.architecture") == VISION_ARCHITECTURE:
        raise CheckpointError(f"{text} is the image encoder only; give the folder that holds it and the text model")
    config, stored = read_text_config(file), _text(file)
    files, vision_config = list(file.parts), None
    if vision is not None:
        images = GgufFile(vision)
        vision_config, files = read_vision_config(images), [*files, *images.parts]
        stored |= {_ours(images, name): _plain(images, name) for name in images.tensors}
    return Weights(path, config, vision_config, stored, files, partial(tokenizer_files, file), ExitStack())


def _in_folder(folder: Path) -> tuple[Path, Path | None]:
    found = sorted(folder.glob("*.gguf"))
    images = [path for path in found if "mmproj" in path.name]
    text = [path for path in found if path not in images and ("-of-" not in path.name or "-00001-of-" in path.name)]
    if len(text) != 1 or len(images) > 1:
        raise CheckpointError(
            f"{folder} has {len(text)} GGUF models and {len(images)} mmproj files; give the file, or a folder with one "
            "model and at most one mmproj file"
        )
    return text[0], images[0] if images else None


def _text(file: GgufFile) -> dict[str, Stored]:
    stored, layers = dict[str, Stored](), dict[str, set[str]]()
    for name in file.tensors:
        if found := layer_of_experts(name):
            layers.setdefault(found[0], set()).add(found[1])
        elif name != ROPE_FACTORS:  # part of the configuration
            stored[_ours(file, name)] = _plain(file, name)
    for layer, kinds in layers.items():
        if lost := sorted(set(EXPERTS) - kinds):
            raise CheckpointError(f"{file.path} lacks the tensor blk.{layer}.{lost[0]}.weight")
        gate, up, down = (f"blk.{layer}.{kind}.weight" for kind in EXPERTS)
        prefix = f"model.layers.{layer}.feed_forward.experts"
        stored[f"{prefix}.gate_up_proj"] = _experts(file, gate, up)
        stored[f"{prefix}.down_proj"] = _experts(file, down)
    return stored


def _ours(file: GgufFile, name: str) -> str:
    ours = from_gguf(name)
    if ours is None:
        raise CheckpointError(f"{file.path} has a tensor that Llama 4 does not have: {name}")
    return ours


def _plain(file: GgufFile, name: str) -> Stored:
    about = (file.shape(name), file.dtype(name), file.kind(name), file.nbytes(name))
    return Stored(*about, partial(file.values, name), partial(file.forget, name))


def _experts(file: GgufFile, *names: str) -> Stored:
    """Tensors [E, out, in] as one [E, in, out], with gate and up side by side."""
    shapes = {file.shape(name) for name in names}
    if len(shapes) != 1 or len(shape := shapes.pop()) != 3:
        raise CheckpointError(f"{file.path}: {' and '.join(names)} must be of one shape, with three dimensions")
    E, out, inputs = shape

    def read(dtype: torch.dtype) -> Tensor:
        experts = torch.empty(E, inputs, len(names) * out, dtype=dtype)
        for e, expert in enumerate(experts):
            for place, name in zip(expert.split(out, 1), names, strict=True):
                place.copy_(file.rows(name, e * out, out, dtype).T)
        return experts

    types, kinds = {file.dtype(name) for name in names}, {file.kind(name) for name in names}
    dtype = types.pop() if len(types) == 1 else torch.float32
    size = sum(map(file.nbytes, names))
    return Stored(
        (E, inputs, len(names) * out), dtype, " and ".join(sorted(kinds)), size, read, partial(file.forget, *names)
    )
