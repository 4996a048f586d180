"""Hugging Face Llama 4 folders (spec §6.1): config.json and safetensors, single or sharded, text-only or multimodal.

Beside the plain layout, experts may stand one by one (as llm-compressor has them), and weights may be FP8 with scales,
in compressed-tensors' or FBGEMM's layout (§7).
"""

import re
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from herd.checkpoint.files import (
    SHARD_BYTES,
    ShardWriter,
    WeightFiles,
    companions,
    copy_companions,
    new_folder,
    read_json,
    write_json,
)
from herd.checkpoint.shapes import MAX_LAYERS
from herd.checkpoint.weights import Stored, Weights
from herd.config import TextConfig, VisionConfig
from herd.errors import CheckpointError, ConfigError
from herd.model import Transformer

_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_FP8 = "F8_E4M3"
_TEXT_PREFIX = "language_model."
_EXPERT = re.compile(r"(.+\.feed_forward\.experts)\.(\d{1,6})\.(gate|up|down)_proj\.weight")
_ACTIVATION_SCALE = ".input_scale"  # of activations in other engines; weights do not need it
_QUANTIZERS = ("compressed-tensors", "fbgemm_fp8")


def open_hf(folder: Path) -> Weights:
    """The weights of a folder. CheckpointError if a file is damaged or of a layout that is not known."""
    text, vision = read_hf_config(folder)
    with ExitStack() as stack:
        files = stack.enter_context(WeightFiles(folder))
        stored = _stored(files)
        return Weights(folder, text, vision, stored, files.paths, partial(companions, folder), stack.pop_all())


def read_hf_config(folder: Path) -> tuple[TextConfig, VisionConfig | None]:
    """What config.json says. CheckpointError if it cannot be read, ConfigError if it is no Llama 4."""
    path = folder / "config.json"
    raw = read_json(path)
    try:
        if quantization := raw.get("quantization_config"):
            method = quantization.get("quant_method")
            if method not in _QUANTIZERS:
                raise ConfigError(f"{folder} is quantised by {method!r}; {' and '.join(_QUANTIZERS)} can be read")
        for part in (raw, raw.get("text_config")):
            layers = (part or {}).get("num_hidden_layers", 0)
            if isinstance(layers, int) and layers > MAX_LAYERS:
                raise ConfigError(f"{path} asks for {layers:,} layers; at most {MAX_LAYERS:,} can be read")
        return TextConfig.from_hf(raw), VisionConfig.from_hf(raw)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError, ZeroDivisionError) as error:
        raise ConfigError(f"{path} does not describe a Llama 4: {error!r}") from error


def save(
    model: Transformer,
    path: str | Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    companions_of: str | Path | None = None,
) -> None:
    """Write a folder that `load` and transformers read back bit by bit, replacing `path` as a whole.

    companions_of: a model folder whose tokenizer and generation settings are copied along.
    """
    with new_folder(Path(path), replace=True) as folder:
        writer = ShardWriter(folder, shard_bytes)
        for name, parameter in model.named_parameters():
            writer.add(name, parameter)
        writer.finish()
        dtype = str(model.model.embed_tokens.weight.dtype).removeprefix("torch.")
        write_json(folder / "config.json", {**model.config.to_hf(), "dtype": dtype})
        if companions_of is not None:
            copy_companions(Path(companions_of), folder)


def _stored(files: WeightFiles) -> dict[str, Stored]:
    """Every tensor by its name in the model: without prefix, experts together, scales applied."""
    scales = {name + "_scale" for name in files.names if files.kind(name) == _FP8}
    stored, experts = dict[str, Stored](), dict[str, dict[str, dict[int, str]]]()
    for name in files.names:
        if name in scales or name.endswith(_ACTIVATION_SCALE):
            continue
        if match := _EXPERT.fullmatch(name):
            parts = experts.setdefault(match[1], {"gate": {}, "up": {}, "down": {}})
            parts[match[3]][int(match[2])] = name
        elif _plain(name) in stored:
            raise CheckpointError(f"{files.folder} has {_plain(name)} with and without the prefix {_TEXT_PREFIX}")
        else:
            stored[_plain(name)] = _single(files, name)
    for prefix, parts in experts.items():
        gates, ups, downs = (_in_order(files, prefix, of) for of in parts.values())
        gate_up = f"{_plain(prefix)}.gate_up_proj"
        stored[gate_up] = _together(files, gate_up, list(zip(gates, ups, strict=True)))
        down = f"{_plain(prefix)}.down_proj"
        stored[down] = _together(files, down, [(name,) for name in downs])
    return stored


def _plain(name: str) -> str:
    return name.removeprefix(_TEXT_PREFIX)


def _in_order(files: WeightFiles, prefix: str, names: dict[int, str]) -> list[str]:
    if sorted(names) != list(range(len(names))) or not names:
        raise CheckpointError(f"{files.folder}: the experts of {prefix} are not numbered from 0 without gaps")
    return [names[i] for i in range(len(names))]


def _single(files: WeightFiles, name: str) -> Stored:
    shape, kind = files.shape(name), files.kind(name)
    size = prod(shape) * (1 if kind == _FP8 else 4 if kind == "F32" else 2)
    return Stored(shape, _value_type(files, name), kind, size, _reader(files, name), partial(files.forget, name))


def _together(files: WeightFiles, name: str, experts: list[tuple[str, ...]]) -> Stored:
    """Matrices [out, in] of each expert as one tensor [E, in, out], with gate and up side by side."""
    shapes = {files.shape(part) for parts in experts for part in parts}
    types = {_value_type(files, part) for parts in experts for part in parts}
    kinds = {files.kind(part) for parts in experts for part in parts}
    if len(shapes) != 1 or len(types) != 1 or any(len(shape) != 2 for shape in shapes):
        raise CheckpointError(f"{files.folder}: the experts of {name} differ in shape or type")
    rows, columns = shapes.pop()
    shape = (len(experts), columns, rows * len(experts[0]))

    def read(dtype: torch.dtype) -> Tensor:
        out = torch.empty(shape, dtype=dtype)
        for expert, parts in zip(out, experts, strict=True):
            for place, part in zip(expert.split(rows, 1), parts, strict=True):
                place.copy_(_reader(files, part)(dtype).T)
        return out

    def forget() -> None:
        for parts in experts:
            for part in parts:
                files.forget(part)

    size = sum(_single(files, part).nbytes for parts in experts for part in parts)
    return Stored(shape, types.pop(), " and ".join(sorted(kinds)), size, read, forget)


def _value_type(files: WeightFiles, name: str) -> torch.dtype:
    kind = files.kind(name)
    if kind == _FP8:
        _scale_shape(files, name)
        return torch.bfloat16
    if kind not in _TYPES:
        raise CheckpointError(
            f"{name} in {files.folder} has type {kind}; F32, BF16, F16 and, with scales, {_FP8} can be read"
        )
    return _TYPES[kind]


def _reader(files: WeightFiles, name: str) -> Callable[[torch.dtype], Tensor]:
    if files.kind(name) != _FP8:
        return lambda dtype: files.tensor(name).to(dtype)

    def read(dtype: torch.dtype) -> Tensor:
        codes = files.tensor(name)
        scale = files.tensor(name + "_scale").float().view(_scale_shape(files, name))
        out = torch.empty(codes.shape, dtype=dtype)
        # By expert, so that little more memory than the result is needed.
        parts = (
            zip(out, codes, scale.expand(len(codes), -1, -1), strict=True) if codes.ndim == 3 else [(out, codes, scale)]
        )
        for place, part, factor in parts:
            place.copy_(part.float() * factor)
        return out

    return read


def _scale_shape(files: WeightFiles, name: str) -> tuple[int, ...]:
    """The shape in which an FP8 tensor's scale multiplies it: one factor per output, or one for all.

    Outputs are the rows of a matrix and the columns of experts, whose down_proj has its scales [E, out, 1] in a file.
    """
    if name + "_scale" not in files.names:
        raise CheckpointError(f"{name} in {files.folder} has type {_FP8}, but there is no {name}_scale")
    shape, scale = files.shape(name), files.shape(name + "_scale")
    if files.kind(name + "_scale") in _TYPES:
        if prod(scale) == 1:
            return (1,) * len(shape)
        if len(shape) == 2 and scale in ((shape[0],), (shape[0], 1)):
            return (shape[0], 1)
        if len(shape) == 3 and scale in ((shape[0], 1, shape[2]), (shape[0], shape[2], 1)):
            return (shape[0], 1, shape[2])
    raise CheckpointError(f"{name}_scale in {files.folder} has shape {list(scale)}; one factor per output can be read")
