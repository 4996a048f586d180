"""GGUF files as metadata and tensors, dequantised when they are read."""

import re
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from herd.checkpoint.gguf_header import check_header
from herd.errors import CheckpointError

_PLAIN = {
    gguf.GGMLQuantizationType.F32: torch.float32,
    gguf.GGMLQuantizationType.F16: torch.float16,
    gguf.GGMLQuantizationType.BF16: torch.bfloat16,
}
_PART_VALUES = 1 << 22  # values that are dequantised at a time
_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


class GgufFile:
    """Metadata and tensors of a file, or of all the files that a large model was split into."""

    def __init__(self, path: Path) -> None:
        """CheckpointError if the file, or another part of it, is missing or damaged."""
        self.path = path
        self.parts = _parts(path)
        readers = [_reader(part) for part in self.parts]
        self._fields = readers[0].fields
        self.tensors: dict[str, gguf.ReaderTensor] = {}
        for part, reader in zip(self.parts, readers, strict=True):
            for tensor in reader.tensors:
                if tensor.name in self.tensors:
                    raise CheckpointError(f"{part} has the tensor {tensor.name} a second time")
                self.tensors[tensor.name] = tensor
        count = self.get("split.count", 1)
        if count != len(self.parts):
            raise CheckpointError(
                f"{path} is one of {count} parts; give the first, named like NAME-00001-of-{count:05}.gguf"
            )

    def get(self, name: str, default: Any = None) -> Any:
        """A value of the metadata."""
        field = self._fields.get(name)
        try:
            return default if field is None else field.contents()
        except (ValueError, IndexError) as error:
            raise CheckpointError(f"{self.path}: cannot read {name}: {error}") from error

    def whole(self, name: str, default: int | None = None) -> int:
        """A whole number of the metadata. CheckpointError if it is another thing, or missing and has no default."""
        value = self.get(name, default)
        if not isinstance(value, int):
            raise CheckpointError(f"{self.path} lacks the number {name}" if value is None else f"{name} is {value!r}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """The decimal number that was stored as float32: 1e-05, not 9.999999747378752e-06."""
        value = self.get(name, default)
        if not isinstance(value, int | float):
            raise CheckpointError(f"{self.path} lacks the number {name}" if value is None else f"{name} is {value!r}")
        return float(str(np.float32(value)))

    def shape(self, name: str) -> tuple[int, ...]:
        """In torch's order. CheckpointError if there is no such tensor."""
        return tuple(int(n) for n in reversed(self._tensor(name).shape))

    def kind(self, name: str) -> str:
        """Its type as GGUF calls it: "Q4_0"."""
        return str(self._tensor(name).tensor_type.name)

    def dtype(self, name: str) -> torch.dtype:
        """The type its values come in: as stored, and bfloat16 for those in 8 bits or less."""
        return _PLAIN.get(self._tensor(name).tensor_type, torch.bfloat16)

    def nbytes(self, name: str) -> int:
        return int(self._tensor(name).n_bytes)

    def values(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor; memory-mapped if it is stored in this type. None: as stored, float32 if quantised.

        CheckpointError if its type is not known.
        """
        tensor, shape = self._tensor(name), self.shape(name)
        plain = _PLAIN.get(tensor.tensor_type)
        if plain is not None:
            stored = torch.frombuffer(_bytes(tensor).data, dtype=plain).view(shape)
            return stored if dtype is None else stored.to(dtype)
        return self.rows(name, 0, prod(shape[:-1]), dtype or torch.float32).view(shape)

    def rows(self, name: str, first: int, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Some rows of a tensor of two or more dimensions. In parts, so that little more memory is needed."""
        tensor, columns = self._tensor(name), self.shape(name)[-1]
        stored = tensor.data.reshape(-1, tensor.data.shape[-1])[first : first + count]
        out, step = torch.empty(count, columns, dtype=dtype), max(1, _PART_VALUES // columns)
        try:
            for at in range(0, count, step):
                values = gguf.quants.dequantize(stored[at : at + step], tensor.tensor_type)
                out[at : at + step] = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
        except (NotImplementedError, ValueError, RuntimeError, IndexError) as error:
            kind = tensor.tensor_type.name
            raise CheckpointError(f"{self.path}: cannot dequantise {name} ({kind}): {error!r}") from error
        return out

    def _tensor(self, name: str) -> gguf.ReaderTensor:
        if name not in self.tensors:
            raise CheckpointError(f"{self.path} lacks the tensor {name}")
        return self.tensors[name]


def _bytes(tensor: gguf.ReaderTensor) -> np.ndarray[Any, Any]:
    return np.asarray(tensor.data).reshape(-1).view(np.uint8)


def _parts(path: Path) -> list[Path]:
    match = _SPLIT.fullmatch(path.name)
    if match is None or int(match[2]) != 1:
        return [path]
    count = int(match[3])
    parts = [path.with_name(f"{match[1]}-{i:05}-of-{match[3]}.gguf") for i in range(1, count + 1)]
    if lost := [part for part in parts if not part.is_file()]:
        raise CheckpointError(f"{path} is one of {count} parts, and {lost[0].name} is not beside it")
    return parts


def _reader(path: Path) -> gguf.GGUFReader:
    check_header(path)
    try:
        return gguf.GGUFReader(path, "c")  # tensors over a read-only mapping would make torch warn
    except (ValueError, IndexError, KeyError, OverflowError, TypeError, MemoryError) as error:
        raise CheckpointError(f"{path} is not a readable GGUF file: {error!r}") from error
