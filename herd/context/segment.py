"""One segment: a file with the K/V of a run of chunks, written once, synced, never changed, memory-mapped to be read.

Layout: a header of 128 bytes, then four arrays, each aligned to 64 bytes: K [G, N, d], V [G, N, d] (int4: two numbers
in a byte), and for int8 and int4 the scales of K and of V [G, N] float16. Per head contiguous, so that a scan streams
through memory. With several global layers, the heads of one stand after those of the other.

Shape suffixes: G key/value heads of all global layers, N tokens of the segment, d head_dim.
"""

import hashlib
import math
import mmap
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from herd.errors import ContextError
from herd.kernels import dequantize_kv, quantize_kv

SUFFIX = ".kv"
_MAGIC = b"HERDKV01"
_HEADER = struct.Struct("<8sIIIIQ32s")  # magic, dtype, heads, head_dim, reserved, tokens, fingerprint digest
_HEADER_BYTES = 128
_ALIGN = 64
_DTYPES = {"float32": 2, "int8": 1, "int4": 3}  # from wide to narrow
_MAX_TOKENS = 1 << 32
SEQUENTIAL, INDEPENDENT = "sequential", "independent"


@dataclass(frozen=True)
class Spec:
    """What all K/V of one context have in common. `fingerprint` names the model that read it."""

    fingerprint: str
    kv_heads: int  # of one layer
    head_dim: int
    chunk: int  # tokens
    dtype: str = "int8"  # or int4, or float32, which keeps K/V as the model computed them
    layers: int = 1  # global layers
    reading: str = INDEPENDENT  # each chunk on its own; or SEQUENTIAL: after all chunks before it

    def __post_init__(self) -> None:
        if min(self.kv_heads, self.head_dim, self.chunk, self.layers) < 1:
            raise ContextError(
                f"K/V of {self.layers} layers of {self.kv_heads} heads of {self.head_dim} in chunks of {self.chunk} "
                "tokens are impossible"
            )
        if self.reading not in (SEQUENTIAL, INDEPENDENT):
            raise ContextError(f"chunks can be read {SEQUENTIAL} or {INDEPENDENT}, not {self.reading!r}")
        if self.sequential and self.layers == 1:
            raise ContextError(f"with one global layer chunks are read {INDEPENDENT}")
        if self.dtype not in _DTYPES:
            raise ContextError(f"K/V can be kept as int8, int4 or float32, not {self.dtype!r}")
        if self.dtype == "int4" and self.head_dim % 2:
            raise ContextError(f"int4 keeps two numbers in a byte and heads have {self.head_dim}; use int8")

    @property
    def heads(self) -> int:
        """Key/value heads of all layers."""
        return self.layers * self.kv_heads

    @property
    def sequential(self) -> bool:
        """Whether K/V of a chunk depend on the chunks before it."""
        return self.reading == SEQUENTIAL

    def narrows_to(self, dtype: str) -> bool:
        """Whether `dtype` has fewer bits than this has, so that K/V can be converted to it."""
        order = list(_DTYPES)
        return order.index(dtype) > order.index(self.dtype)

    def named(self) -> dict[str, int | str]:
        """The fields, without those that go without saying where there is one layer."""
        unsaid = ("layers", "reading") if self.layers == 1 else ()
        return {name: value for name, value in vars(self).items() if name not in unsaid}

    def to_meta(self) -> dict[str, str]:
        return {name: str(value) for name, value in self.named().items()}

    @classmethod
    def from_meta(cls, meta: dict[str, str]) -> "Spec":
        try:
            kv_heads, head_dim, chunk = (int(meta[name]) for name in ("kv_heads", "head_dim", "chunk"))
            layers, reading = int(meta.get("layers", 1)), meta.get("reading", INDEPENDENT)
            return cls(meta["fingerprint"], kv_heads, head_dim, chunk, meta["dtype"], layers, reading)
        except (KeyError, ValueError) as error:
            raise ContextError(f"the manifest does not describe a context ({error})") from error


def mismatch(folder: Path, found: Spec, wanted: Spec) -> str:
    """Why a context is not the one that was wanted, and the fix."""
    if found.fingerprint != wanted.fingerprint:
        return (
            f"{folder} was read by another model ({found.fingerprint[:12]}, this one is {wanted.fingerprint[:12]}); "
            f"use that model or read the sources into another folder"
        )
    if replace(found, dtype=wanted.dtype) == wanted:
        fix = "read the sources into another folder"
        if found.narrows_to(wanted.dtype):
            fix = f"run `herd context compact {folder} --kv {wanted.dtype}`"
        return f"{folder} keeps K/V as {found.dtype}, not {wanted.dtype}; leave the format out, or {fix}"
    if replace(found, reading=wanted.reading) == wanted:
        return (
            f"{folder} was read with --reading {found.reading}, not {wanted.reading}; leave it out, "
            "or read the sources into another folder"
        )
    names = [name for name, value in vars(found).items() if value != getattr(wanted, name)]
    parts = [f"{name} {getattr(found, name)} instead of {getattr(wanted, name)}" for name in names]
    return f"{folder} was made with {', '.join(parts)}; read the sources into another folder"


@dataclass(frozen=True)
class KV:
    """Keys and values [G, N, d] as `quantize_kv` makes them, with float16 scales [G, N], or float32 without."""

    k_GNd: Tensor
    v_GNd: Tensor
    k_scale_GN: Tensor | None
    v_scale_GN: Tensor | None

    def arrays(self) -> list[Tensor]:
        return [a for a in (self.k_GNd, self.v_GNd, self.k_scale_GN, self.v_scale_GN) if a is not None]

    def __len__(self) -> int:
        return self.k_GNd.shape[1]

    def part(self, start: int, stop: int) -> "KV":
        scales = (None if s is None else s[:, start:stop] for s in (self.k_scale_GN, self.v_scale_GN))
        return KV(self.k_GNd[:, start:stop], self.v_GNd[:, start:stop], *scales)

    def layer(self, index: int, layers: int) -> "KV":
        """Those of one of so many layers."""
        if layers == 1:
            return self
        heads = slice(index * len(self.k_GNd) // layers, (index + 1) * len(self.k_GNd) // layers)
        scales = (None if s is None else s[heads] for s in (self.k_scale_GN, self.v_scale_GN))
        return KV(self.k_GNd[heads], self.v_GNd[heads], *scales)

    def crc(self) -> int:
        """Checksum over the bytes of all arrays, in order."""
        value = 0
        for array in self.arrays():
            for row in array:
                value = zlib.crc32(row.contiguous().numpy(), value)
        return value


def pack(k_TGd: Tensor, v_TGd: Tensor, spec: Spec) -> KV:
    """Keys and values of one chunk as the model computed them → as the context keeps them."""
    k_GNd, v_GNd = k_TGd.transpose(0, 1), v_TGd.transpose(0, 1)
    if spec.dtype == "float32":
        return KV(k_GNd.float().contiguous(), v_GNd.float().contiguous(), None, None)
    (k, ks), (v, vs) = (quantize_kv(x_GNd, 4 if spec.dtype == "int4" else 8) for x_GNd in (k_GNd, v_GNd))
    return KV(k.contiguous(), v.contiguous(), ks.contiguous(), vs.contiguous())


def convert(kv: KV, spec: Spec) -> KV:
    """K/V in the format of this spec, from whichever they have; as they are if it is the same."""
    if kv.k_GNd.dtype == _arrays(spec, 1)[0][0]:
        return kv
    k_GNd = dequantize_kv(kv.k_GNd, kv.k_scale_GN, torch.float32)
    v_GNd = dequantize_kv(kv.v_GNd, kv.v_scale_GN, torch.float32)
    return pack(k_GNd.transpose(0, 1), v_GNd.transpose(0, 1), spec)


def join(parts: Sequence[KV]) -> KV:
    columns = zip(*(part.arrays() for part in parts), strict=True)
    arrays: list[Tensor | None] = [torch.cat(column, 1) for column in columns]
    return KV(*[*arrays, None, None][:4])  # type: ignore[arg-type]


def write(path: Path, kv: KV, spec: Spec) -> int:
    """Write a new segment file and sync it; returns its size in bytes. An OSError leaves no file behind."""
    offsets, size = _layout(spec, len(kv))
    try:
        with path.open("xb") as file:
            file.write(_header(spec, len(kv)))
            for offset, array in zip(offsets, kv.arrays(), strict=True):
                file.seek(offset)
                file.write(array.contiguous().numpy().data)
            file.truncate(size)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    return size


def sync_folder(folder: Path) -> None:
    """Make names created or removed in a folder durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def load(path: Path, tokens: int, spec: Spec) -> KV:
    """Map a segment file. Its header and size must be what the manifest says; ContextError names the fix if not.

    The mapping stays valid when the file is unlinked, so a reader keeps its snapshot.
    """
    offsets, size = _layout(spec, tokens)
    with path.open("rb") as file:
        check_size(path, os.fstat(file.fileno()).st_size, size)
        if file.read(_HEADER_BYTES) != _header(spec, tokens):
            raise ContextError(damaged(path, "its header does not match the manifest"))
        # Copy-on-write: torch wants memory it may write to, and the file must never change.
        data = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    arrays: list[Tensor | None] = [
        torch.frombuffer(data, dtype=dtype, count=math.prod(shape), offset=offset).view(shape)
        for offset, (dtype, shape) in zip(offsets, _arrays(spec, tokens), strict=True)
    ]
    return KV(*[*arrays, None, None][:4])  # type: ignore[arg-type]


def check_size(path: Path, actual: int, size: int) -> None:
    """ContextError if a segment file has not the bytes it should have."""
    if actual != size:
        raise ContextError(damaged(path, f"{actual:,} bytes instead of {size:,}"))


def damaged(path: Path, what: str) -> str:
    folder = path.parent
    return (
        f"segment {path.name} of {folder} is damaged: {what}; "
        f"run `herd context compact {folder}` to drop it, then read the sources again"
    )


def file_bytes(spec: Spec, tokens: int) -> int:
    """Size of a segment file."""
    return _layout(spec, tokens)[1]


def bytes_per_token(spec: Spec) -> int:
    return sum(_sizes(spec, 1))


def _header(spec: Spec, tokens: int) -> bytes:
    digest = hashlib.blake2b(spec.fingerprint.encode(), digest_size=32).digest()
    head = _HEADER.pack(_MAGIC, _DTYPES[spec.dtype], spec.heads, spec.head_dim, 0, tokens, digest)
    return head.ljust(_HEADER_BYTES, b"\0")


def _arrays(spec: Spec, tokens: int) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    """Type and shape of each array of a segment."""
    G, d = spec.heads, spec.head_dim
    if spec.dtype == "float32":
        return [(torch.float32, (G, tokens, d))] * 2
    codes = (torch.uint8, (G, tokens, d // 2)) if spec.dtype == "int4" else (torch.int8, (G, tokens, d))
    return [codes] * 2 + [(torch.float16, (G, tokens))] * 2


def _sizes(spec: Spec, tokens: int) -> list[int]:
    return [dtype.itemsize * math.prod(shape) for dtype, shape in _arrays(spec, tokens)]


def _layout(spec: Spec, tokens: int) -> tuple[list[int], int]:
    """Byte offset of each array, and the size of the file."""
    if not 0 < tokens < _MAX_TOKENS:
        raise ContextError(f"a segment of {tokens} tokens is impossible; the manifest is damaged")
    offsets, end = [], _HEADER_BYTES
    for size in _sizes(spec, tokens):
        offsets.append(-(-end // _ALIGN) * _ALIGN)
        end = offsets[-1] + size
    return offsets, end
