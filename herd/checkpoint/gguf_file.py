"""GGUF files as metadata and tensors, dequantised when they are read."""

import re
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from herd.checkpoint.gguf_header import Header, TensorInfo
from herd.errors import CheckpointError

_PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
_PART_VALUES = 1 << 18  # that are dequantised at a time
_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


class GgufFile:
    """Metadata and tensors of a file, or of all the files that a large model was split into."""

    def __init__(self, path: Path) -> None:
        """CheckpointError if the file, or another part of it, is missing or damaged."""
        self.path = path
        self.parts = _parts(path)
        headers = [Header(part) for part in self.parts]
        self.get = headers[0].get
        self.tensors: dict[str, tuple[Header, TensorInfo]] = {}
        for header in headers:
            for name, info in header.tensors.items():
                if name in self.tensors:
                    raise CheckpointError(f"{header.path} has the tensor {name} a second time")
                self.tensors[name] = (header, info)
        if (count := self.whole("split.count", 1)) != len(self.parts):
            first = f"NAME-00001-of-{count:05}.gguf"
            raise CheckpointError(f"{path} is one of {count} parts; give the first, named like {first}")

    def whole(self, name: str, default: int | None = None) -> int:
        """A whole number of the metadata. CheckpointError if it is another thing, or missing and has no default."""
        value: Any = self.get(name, default)
        if not isinstance(value, int):
            raise CheckpointError(f"{self.path} lacks the number {name}" if value is None else f"{name} is {value!r}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """The decimal number that was stored as float32: 1e-05, not 9.999999747378752e-06."""
        value: Any = self.get(name, default)
        if not isinstance(value, int | float):
            raise CheckpointError(f"{self.path} lacks the number {name}" if value is None else f"{name} is {value!r}")
        return float(str(np.float32(value)))

    def shape(self, name: str) -> tuple[int, ...]:
        """In torch's order. CheckpointError if there is no such tensor."""
        return self._find(name)[1].shape

    def kind(self, name: str) -> str:
        """Its type as GGUF calls it: "Q4_0"."""
        return str(self._find(name)[1].kind.name)

    def dtype(self, name: str) -> torch.dtype:
        """The type its values come in: as stored, and bfloat16 for those in 8 bits or less."""
        return _PLAIN.get(self._find(name)[1].kind, torch.bfloat16)

    def nbytes(self, name: str) -> int:
        return self._find(name)[1].nbytes

    def values(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor; memory-mapped if it is stored in this type. None: as stored, float32 if quantised.

        CheckpointError if its type is not known.
        """
        header, info = self._find(name)
        plain = _PLAIN.get(info.kind)
        if plain is not None:
            stored = torch.frombuffer(header.data, dtype=plain, count=prod(info.shape), offset=info.offset)
            return stored.view(info.shape) if dtype is None else stored.view(info.shape).to(dtype)
        return self.rows(name, 0, prod(info.shape[:-1]), dtype or torch.float32).view(info.shape)

    def rows(self, name: str, first: int, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Some rows of a tensor, whose other dimensions count as one; in parts, so that little more memory is taken."""
        header, info = self._find(name)
        columns, row_bytes = info.shape[-1], info.nbytes // prod(info.shape[:-1])
        stored = np.frombuffer(header.data, np.uint8, count * row_bytes, info.offset + first * row_bytes)
        stored = stored.reshape(count, row_bytes)
        out, step = torch.empty(count, columns, dtype=dtype), max(1, _PART_VALUES // columns)
        try:
            for at in range(0, count, step):
                values = gguf.quants.dequantize(stored[at : at + step], info.kind)
                out[at : at + step] = torch.from_numpy(np.array(values, dtype=np.float32))
        except (NotImplementedError, ValueError, RuntimeError, IndexError) as error:
            raise CheckpointError(f"{self.path}: cannot dequantise {name} ({info.kind.name}): {error!r}") from error
        header.forget(info.offset + first * row_bytes, count * row_bytes)
        return out

    def forget(self, *names: str) -> None:
        """Give the pages of tensors back that were read of the file."""
        for name in names:
            header, info = self._find(name)
            header.forget(info.offset, info.nbytes)

    def _find(self, name: str) -> tuple[Header, TensorInfo]:
        if name not in self.tensors:
            raise CheckpointError(f"{self.path} lacks the tensor {name}")
        return self.tensors[name]


def _parts(path: Path) -> list[Path]:
    match = _SPLIT.fullmatch(path.name)
    if match is None or int(match[2]) != 1:
        return [path]
    count = int(match[3])
    parts = [path.with_name(f"{match[1]}-{i:05}-of-{match[3]}.gguf") for i in range(1, count + 1)]
    if lost := [part for part in parts if not part.is_file()]:
        raise CheckpointError(f"{path} is one of {count} parts, and {lost[0].name} is not beside it")
    return parts
