"""The header of a GGUF file: settings, and where each tensor is.

The gguf library has a reader, but it trusts every count and length in the file (a damaged one makes it loop for hours
or fill the memory), and takes ten seconds for the vocabulary of Llama 4.
"""

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from herd.errors import CheckpointError

_FORMS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
_MAX_DIMS = 4
_MAX_ITEMS = 1 << 24  # of an array, or of the header; a vocabulary has some 2^18
_ALIGNMENT = "general.alignment"


@dataclass(frozen=True)
class TensorInfo:
    """Shape in torch's order, type, and place in the file."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    nbytes: int


class Header:
    """CheckpointError if a count, length or offset points outside the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # torch wants writable memory
            self._at = 0
            self._settings, self.tensors = dict[str, int](), dict[str, TensorInfo]()
            self._read()
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error}") from error
        except (ValueError, struct.error) as error:
            raise CheckpointError(f"{path} is not a readable GGUF file: {error}") from error

    def get(self, name: str, default: Any = None) -> Any:
        """A setting: a number, a text, or a list of such."""
        if name not in self._settings:
            return default
        self._at = self._settings[name]
        try:
            return self._value()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: {name} is not UTF-8: {error}") from error

    def forget(self, offset: int, nbytes: int) -> None:
        """Bytes that were read are not needed soon: leave them to the file, where the system can be told so."""
        first, last = -(-offset // mmap.PAGESIZE), (offset + nbytes) // mmap.PAGESIZE  # whole pages: others have more
        if last > first and hasattr(mmap, "MADV_DONTNEED"):
            self.data.madvise(mmap.MADV_DONTNEED, first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE)

    def _read(self) -> None:
        if self.data[:4] != b"GGUF":
            raise ValueError("it does not start with 'GGUF'")
        self._skip(4)
        version = self._number("I")
        if version not in (2, 3):
            raise ValueError(f"version {version} (or big-endian); versions 2 and 3 can be read")
        tensors, pairs = self._number("Q"), self._number("Q")
        if max(tensors, pairs) > _MAX_ITEMS:
            raise ValueError(f"{tensors:,} tensors and {pairs:,} settings are more than any model has")
        for _ in range(pairs):
            key = self._text()
            self._settings[key] = self._at
            self._pass_value()
        infos = [self._tensor() for _ in range(tensors)]
        end = self._at
        alignment = self.get(_ALIGNMENT, 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"alignment {alignment!r}, which is no power of two")
        start = -(-end // alignment) * alignment
        for name, info in infos:
            if name in self.tensors:
                raise ValueError(f"{name!r} is there twice")
            if (last := start + info.offset + info.nbytes) > len(self.data):
                raise ValueError(f"{name!r} ends at byte {last}, the file at {len(self.data)}")
            self.tensors[name] = TensorInfo(info.shape, info.kind, start + info.offset, info.nbytes)

    def _tensor(self) -> tuple[str, TensorInfo]:
        """Name of a tensor, and what the header says: its place is counted from the first one."""
        name, dims = self._text(), self._number("I")
        if not 1 <= dims <= _MAX_DIMS:
            raise ValueError(f"{name!r} has {dims} dimensions")
        shape = tuple(reversed([int(self._number("Q")) for _ in range(dims)]))
        kind = GGMLQuantizationType(self._number("I"))
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if not all(shape) or shape[-1] % block:
            raise ValueError(
                f"{name!r} of shape {list(shape)} is empty, or its rows are no whole blocks of {kind.name}"
            )
        return name, TensorInfo(shape, kind, int(self._number("Q")), prod(shape) // block * block_bytes)

    def _skip(self, size: int) -> None:
        self._at += size
        if self._at > len(self.data):
            raise ValueError(f"the header ends beyond the {len(self.data)} bytes of the file (truncated?)")

    def _number(self, form: str) -> Any:
        size = struct.calcsize(f"<{form}")
        self._skip(size)
        return struct.unpack_from(f"<{form}", self.data, self._at - size)[0]

    def _text(self) -> str:
        size = self._number("Q")
        self._skip(size)
        return self.data[self._at - size : self._at].decode("utf-8")

    def _array(self) -> tuple[GGUFValueType, int]:
        item, count = GGUFValueType(self._number("I")), self._number("Q")
        if item == GGUFValueType.ARRAY:
            raise ValueError("an array of arrays")
        if count > _MAX_ITEMS:
            raise ValueError(f"an array of {count:,} items is longer than any vocabulary")
        return item, count

    def _pass_value(self) -> None:
        """Go on behind a value."""
        kind, count = GGUFValueType(self._number("I")), 1
        if kind == GGUFValueType.ARRAY:
            kind, count = self._array()
        if kind == GGUFValueType.STRING:
            for _ in range(count):
                self._skip(self._number("Q"))
        else:
            self._skip(count * struct.calcsize(f"<{_FORMS[kind]}"))

    def _value(self) -> Any:
        kind = GGUFValueType(self._number("I"))
        if kind != GGUFValueType.ARRAY:
            return self._text() if kind == GGUFValueType.STRING else self._number(_FORMS[kind])
        kind, count = self._array()
        if kind == GGUFValueType.STRING:
            return [self._text() for _ in range(count)]
        form = f"<{count}{_FORMS[kind]}"
        self._skip(struct.calcsize(form))
        return list(struct.unpack_from(form, self.data, self._at - struct.calcsize(form)))
