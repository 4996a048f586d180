"""A check of a GGUF header before the `gguf` library reads it.

The library trusts every count and length in the file; a damaged one makes it loop for hours or fill the memory.
"""

import mmap
import struct
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from herd.errors import CheckpointError

_SCALAR_BYTES = {
    GGUFValueType.UINT8: 1,
    GGUFValueType.INT8: 1,
    GGUFValueType.BOOL: 1,
    GGUFValueType.UINT16: 2,
    GGUFValueType.INT16: 2,
    GGUFValueType.UINT32: 4,
    GGUFValueType.INT32: 4,
    GGUFValueType.FLOAT32: 4,
    GGUFValueType.UINT64: 8,
    GGUFValueType.INT64: 8,
    GGUFValueType.FLOAT64: 8,
}
_MAX_DIMS = 4
_MAX_ITEMS = 1 << 24  # of an array, or of the header; a vocabulary has some 2^18


def check_header(path: Path) -> None:
    """CheckpointError if a count, length or offset of the header points outside the file."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Walk(data).check()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    except (ValueError, struct.error) as error:
        raise CheckpointError(f"{path} is not a readable GGUF file: {error}") from error


class _Walk:
    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def check(self) -> None:
        if self.data[:4] != b"GGUF":
            raise ValueError("it does not start with 'GGUF'")
        self.at = 4
        version = self.number("<I", 4)
        if version not in (2, 3):
            raise ValueError(f"version {version} (or big-endian); versions 2 and 3 can be read")
        tensors, pairs = self.number("<Q", 8), self.number("<Q", 8)
        if max(tensors, pairs) > _MAX_ITEMS:
            raise ValueError(f"{tensors:,} tensors and {pairs:,} settings are more than any model has")
        alignment = 32
        for _ in range(pairs):
            key = self.string()
            kind = self.value()
            if key == b"general.alignment" and kind == GGUFValueType.UINT32:
                alignment = struct.unpack_from("<I", self.data, self.at - 4)[0]
        if alignment < 1:
            raise ValueError("alignment 0")
        spans = [self.tensor() for _ in range(tensors)]
        start = -(-self.at // alignment) * alignment
        for name, offset, size in spans:
            if start + offset + size > len(self.data):
                raise ValueError(f"{name!r} ends at byte {start + offset + size}, the file at {len(self.data)}")

    def skip(self, size: int) -> None:
        self.at += size
        if self.at > len(self.data):
            raise ValueError(f"the header ends beyond the {len(self.data)} bytes of the file (truncated?)")

    def number(self, form: str, size: int) -> int:
        self.skip(size)
        return int(struct.unpack_from(form, self.data, self.at - size)[0])

    def string(self) -> bytes:
        size = self.number("<Q", 8)
        self.skip(size)
        return self.data[self.at - size : self.at]

    def value(self) -> GGUFValueType:
        kind = GGUFValueType(self.number("<I", 4))
        if kind != GGUFValueType.ARRAY:
            self.one(kind)
            return kind
        item, count = GGUFValueType(self.number("<I", 4)), self.number("<Q", 8)
        if item == GGUFValueType.ARRAY:
            raise ValueError("an array of arrays")
        if count > _MAX_ITEMS:
            raise ValueError(f"an array of {count:,} items is longer than any vocabulary")
        if item == GGUFValueType.STRING:
            for _ in range(count):
                self.one(item)
        else:
            self.skip(count * _SCALAR_BYTES[item])
        return kind

    def one(self, kind: GGUFValueType) -> None:
        if kind == GGUFValueType.STRING:
            self.skip(self.number("<Q", 8))
        else:
            self.skip(_SCALAR_BYTES[kind])

    def tensor(self) -> tuple[str, int, int]:
        """Name, offset and size in bytes of the tensor described here."""
        name = self.string().decode("utf-8")
        dims = self.number("<I", 4)
        if not 1 <= dims <= _MAX_DIMS:
            raise ValueError(f"{name!r} has {dims} dimensions")
        elements = 1
        for _ in range(dims):
            elements *= self.number("<Q", 8)
        if not elements:
            raise ValueError(f"{name!r} is empty")
        kind = GGMLQuantizationType(self.number("<I", 4))
        block, block_bytes = GGML_QUANT_SIZES[kind]
        return name, self.number("<Q", 8), elements // block * block_bytes
