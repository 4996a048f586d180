"""A checkpoint of any format as a Hugging Face folder, one tensor in memory at a time."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from herd.checkpoint import fp8
from herd.checkpoint.files import INDEX, SHARD_BYTES, SINGLE, write_json
from herd.checkpoint.shapes import VISION_PREFIXES
from herd.checkpoint.streaming import Job, Layout, Piece, Progress
from herd.checkpoint.weights import Weights

_KINDS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float8_e4m3fn: "F8_E4M3"}


@dataclass(frozen=True)
class _Planned:
    """A tensor of the folder: its name there, type and shape, and what gives its values."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Any

    @property
    def size(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write_hf(
    weights: Weights,
    job: Job,
    files: dict[str, bytes],
    dtype: torch.dtype,
    *,
    as_fp8: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Write all files of the folder.

    files: further ones, such as the tokenizer's. as_fp8: routed experts become FP8, by Meta's recipe (spec §7).
    """
    shards = _shards(list(_planned(weights, dtype, as_fp8)), shard_bytes)
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    job.write([_layout(name, shard) for name, shard in zip(names, shards, strict=True)], progress)
    if count > 1:
        weight_map = {one.name: name for name, shard in zip(names, shards, strict=True) for one in shard}
        total = sum(one.size for shard in shards for one in shard)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(job.result / INDEX, index)
    write_json(job.result / "config.json", _config(weights, dtype, as_fp8))
    for name, content in files.items():
        (job.result / name).write_bytes(content)


def _config(weights: Weights, dtype: torch.dtype, as_fp8: bool) -> dict[str, Any]:
    raw = weights.text.to_hf() if weights.vision is None else weights.vision.to_hf(weights.text)
    raw["dtype"] = str(dtype).removeprefix("torch.")
    if as_fp8:
        matrices = [name for name in weights.names if len(weights.shape(name)) > 1]
        kept = {name.rpartition(".")[0] for name in matrices if not fp8.is_fp8(name, weights.text)}
        raw["quantization_config"] = fp8.quantization_config(sorted(_prefixed(weights, name) for name in kept))
    return raw


def _prefixed(weights: Weights, name: str) -> str:
    """Text models that are a part of a multimodal one have a prefix."""
    return name if weights.vision is None or name.startswith(VISION_PREFIXES) else f"language_model.{name}"


def _planned(weights: Weights, dtype: torch.dtype, as_fp8: bool) -> Iterator[_Planned]:
    for name in _in_order(weights):
        shape, ours = weights.shape(name), _prefixed(weights, name)
        if as_fp8 and fp8.is_fp8(name, weights.text):
            codes = partial(_half, weights, name, dtype, 0)
            yield _Planned(ours, torch.float8_e4m3fn, shape, codes)
            factors = partial(_half, weights, name, dtype, 1)
            yield _Planned(f"{ours}_scale", torch.float32, fp8.scale_shape(name, shape), factors)
        else:
            yield _Planned(ours, dtype, shape, partial(_whole, weights, name, dtype))


def _in_order(weights: Weights) -> list[str]:
    """Names layer by layer, with those of layer 10 behind those of layer 9."""
    return sorted(
        weights.names, key=lambda name: [part.zfill(6) if part.isdigit() else part for part in name.split(".")]
    )


def _whole(weights: Weights, name: str, dtype: torch.dtype) -> Iterable[Tensor]:
    return [weights.finite(name, dtype)]


def _half(weights: Weights, name: str, dtype: torch.dtype, half: int) -> Iterable[Tensor]:
    """Codes (0) or factors (1) of experts, one expert at a time."""
    return (pair[half] for pair in fp8.quantized(weights.finite(name, dtype)))


def _shards(planned: list[_Planned], shard_bytes: int) -> list[list[_Planned]]:
    shards, size = [list[_Planned]()], 0
    for one in planned:
        if shards[-1] and size + one.size > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(one)
        size += one.size
    # Wide types first, so that every tensor begins at a multiple of its items' size.
    return [sorted(shard, key=lambda one: -one.dtype.itemsize) for shard in shards]


def _layout(name: str, shard: list[_Planned]) -> Layout:
    """A safetensors file: the length of a JSON object, the object, and the tensors without gaps."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for one in shard:
        span = [at, at + one.size]
        entries[one.name] = {"dtype": _KINDS[one.dtype], "shape": list(one.shape), "data_offsets": span}
        at += one.size
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    pieces = [Piece(one.size, one.make) for one in shard]
    return Layout(name, len(header).to_bytes(8, "little") + header, pieces)
