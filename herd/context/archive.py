"""A context as one tar file: exported with checksums, imported only if every part of it proves sound.

Members: `context.json` (settings, sources, chunks, segments), `context.json.blake2b`, and `segments/NAME.kv`. Paths of
the exporting machine are not in it.
"""

import base64
import binascii
import hashlib
import io
import json
import os
import secrets
import shutil
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from herd.context import manifest, segment
from herd.context.manifest import ChunkRow, SegmentRow, SkippedRow
from herd.context.segment import Spec
from herd.context.sequence import broken
from herd.context.sources import display
from herd.context.store import Store, check_bounds, chunk_hash, previous_of, unpack_ids
from herd.errors import ContextError

_FORMAT = 1
_INDEX, _SUM, _SEGMENTS = "context.json", "context.json.blake2b", "segments/"
_MAX_INDEX_BYTES = 1 << 30
_MAX_TEXT = 4096  # characters of a name or a reason
_COPY_BYTES = 1 << 20


def export(folder: str | Path, archive: str | Path) -> int:
    """Write all live sources of a context to a new tar file; returns its size in bytes."""
    store, archive = Store.open(folder), Path(archive)
    if archive.exists():
        raise ContextError(f"{archive} exists; name a new file")
    partial = archive.with_name(f"{archive.name}.{secrets.token_hex(4)}.part")
    try:
        with manifest.plain_errors(archive.parent), partial.open("xb") as file:
            with tarfile.open(fileobj=file, mode="w") as tar:
                files = [(mapped.row, store.folder / mapped.row.file) for mapped in store.segments]
                index = json.dumps(_index(store, [_checksum(path) for _, path in files])).encode()
                _add(tar, _INDEX, index)
                _add(tar, _SUM, hashlib.blake2b(index).hexdigest().encode())
                for row, path in files:
                    tar.add(path, _SEGMENTS + row.file, filter=_anonymous)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(archive)
    finally:
        with suppress(OSError):  # it may not be there, on a disk that cannot be written
            partial.unlink()
    return archive.stat().st_size


def import_(archive: str | Path, folder: str | Path) -> Store:
    """Unpack an archive into a new or empty folder. ContextError, and no folder, if anything in it is not sound."""
    archive, folder = Path(archive), Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ContextError(f"{folder} exists and is not empty; name a new folder")
    with manifest.plain_errors(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.part")
    try:
        with manifest.plain_errors(archive), archive.open("rb") as file, _unpacking(file, archive) as tar:
            _unpack(tar, archive, partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Store.open(folder)


def _index(store: Store, checksums: list[str]) -> dict[str, Any]:
    place = {mapped.row.id: i for i, mapped in enumerate(store.segments)}
    with manifest.connect(store.folder) as db, manifest.snapshot(db):
        number = {row.id: i for i, row in enumerate(store.chunks)}
        rows = sorted(manifest.sources(db), key=lambda row: row.id if store.spec.sequential else 0)
        sources = {row.id: {"name": row.name, "chunks": list[int]()} for row in rows}
        for source, chunk in manifest.source_chunks(db):
            if chunk not in number:
                raise ContextError(f"{store.folder} changed during the export; repeat it")
            sources[source]["chunks"].append(number[chunk])  # type: ignore[attr-defined]
    return {
        "format": _FORMAT,
        "spec": store.spec.named(),
        "segments": [
            {"file": mapped.row.file, "tokens": mapped.row.tokens, "blake2b": checksum}
            for mapped, checksum in zip(store.segments, checksums, strict=True)
        ],
        "chunks": [
            [place[c.segment], c.start, c.tokens, c.first_line, c.last_line, c.crc, c.hash.hex(),
             base64.b64encode(c.ids).decode()]
            for c in store.chunks
        ],
        "sources": list(sources.values()),
        "skipped": [[name, reason] for name, reason in store.skipped],
    }  # fmt: skip


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    return info


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, hashlib.blake2b).hexdigest()


class _unpacking:
    """An uncompressed tar for reading, whose failures are ContextErrors: archives come from strangers."""

    def __init__(self, file: BinaryIO, archive: Path) -> None:
        self.file, self.archive = file, archive

    def __enter__(self) -> tarfile.TarFile:
        try:
            return tarfile.open(fileobj=self.file, mode="r:")
        except tarfile.TarError as error:
            raise _refused(self.archive, str(error)) from error

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        broken = (tarfile.TarError, KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError)
        if isinstance(error, (*broken, RecursionError)):
            raise _refused(self.archive, repr(error)) from error


def _refused(archive: Path, what: str) -> ContextError:
    return ContextError(f"{archive} is not a sound context archive: {what}; nothing was imported")


def _unpack(tar: tarfile.TarFile, archive: Path, folder: Path) -> None:
    index = json.loads(_member(tar, archive, _INDEX))
    if index["format"] != _FORMAT:
        raise _refused(archive, f"format {index['format']!r}, expected {_FORMAT}")
    raw = index["spec"]
    kinds = Spec.__annotations__
    spec = Spec(**{name: _typed(value, kinds[name]) for name, value in raw.items()})
    store = Store.open(folder, spec)
    with store.writer() as writer, manifest.transaction(writer.db):
        rows = [_unpack_segment(tar, archive, folder, entry, spec) for entry in index["segments"]]
        numbers = [manifest.insert_segment(writer.db, row) for row in rows]
        chunks = [_chunk(archive, entry, rows, numbers, spec) for entry in index["chunks"]]
        _check_chunks(archive, folder, rows, numbers, chunks, spec)
        ids = [manifest.insert_chunk(writer.db, chunk) for chunk in chunks]
        for source in index["sources"]:
            mine = [ids[_number(i, len(ids))] for i in source["chunks"]]
            manifest.put_source(writer.db, _text(source["name"]), None, "", mine)
        skipped = [SkippedRow(_text(name).encode(), _text(name), _text(reason)) for name, reason in index["skipped"]]
        manifest.replace_skipped(writer.db, [], skipped)
        pairs, live = manifest.source_chunks(writer.db), manifest.chunks(writer.db, live=True)
        if spec.sequential and (where := broken(pairs, live)):
            raise _refused(archive, where)


def _member(tar: tarfile.TarFile, archive: Path, name: str) -> bytes:
    """The index, checked against its checksum."""
    contents = []
    for wanted in (name, _SUM):
        info = tar.next()
        if info is None or info.name != wanted or not _plain(info) or info.size > _MAX_INDEX_BYTES:
            raise _refused(archive, f"{wanted} is missing, misplaced or too large")
        file = tar.extractfile(info)
        assert file is not None, "a regular file can be read"
        contents.append(file.read())
    if hashlib.blake2b(contents[0]).hexdigest().encode() != contents[1]:
        raise _refused(archive, f"{name} does not match its checksum")
    return contents[0]


def _plain(info: tarfile.TarInfo) -> bool:
    """A file that holds as many bytes as it says: no link, device or sparse file."""
    return info.isreg() and not info.issparse()


def _unpack_segment(tar: tarfile.TarFile, archive: Path, folder: Path, entry: Any, spec: Spec) -> SegmentRow:
    """Copy the next segment under a new name of our own; its name in the archive is only compared."""
    info, tokens = tar.next(), _number(entry["tokens"], 1 << 32)
    size = segment.file_bytes(spec, tokens)
    if info is None or info.name != _SEGMENTS + _text(entry["file"]) or not _plain(info) or info.size != size:
        raise _refused(archive, f"segment {display(str(entry['file']))} is missing or not {size:,} bytes long")
    source = tar.extractfile(info)
    assert source is not None, "a regular file can be read"
    path = folder / (secrets.token_hex(8) + segment.SUFFIX)
    digest = hashlib.blake2b()
    with path.open("xb") as file:
        while piece := source.read(_COPY_BYTES):
            digest.update(piece)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    if digest.hexdigest() != entry["blake2b"]:
        raise _refused(archive, f"segment {info.name} does not match its checksum")
    return SegmentRow(0, path.name, tokens, size)


def _chunk(archive: Path, entry: Any, rows: list[SegmentRow], numbers: list[int], spec: Spec) -> ChunkRow:
    place, start, tokens, first, last, crc, digest, packed = entry
    row = ChunkRow(
        id=0,
        hash=binascii.unhexlify(digest),
        segment=numbers[_number(place, len(rows))],
        start=_number(start, 1 << 32),
        tokens=_number(tokens, spec.chunk + 1),
        first_line=_number(first, 1 << 48),
        last_line=_number(last, 1 << 48),
        crc=_number(crc, 1 << 32),
        ids=base64.b64decode(packed, validate=True),
    )
    previous = previous_of(row.ids, row.tokens)
    if chunk_hash(spec.fingerprint, unpack_ids(row.ids, row.tokens), previous) != row.hash:
        raise _refused(archive, "the token ids of a chunk do not match its hash")
    return row


def _check_chunks(
    archive: Path, folder: Path, rows: list[SegmentRow], numbers: list[int], chunks: list[ChunkRow], spec: Spec
) -> None:
    """Every chunk lies inside its segment and has its checksum."""
    for row, number in zip(rows, numbers, strict=True):
        own = sorted((chunk for chunk in chunks if chunk.segment == number), key=lambda chunk: chunk.start)
        try:
            kv = segment.load(folder / row.file, row.tokens, spec)
            check_bounds(folder / row.file, row, own, spec)
        except ContextError as error:
            raise _refused(archive, str(error).partition(";")[0]) from error
        for chunk in own:
            if kv.part(chunk.start, chunk.start + chunk.tokens).crc() != chunk.crc:
                raise _refused(archive, "the K/V of a chunk does not match its checksum")


def _number(value: Any, limit: int) -> int:
    """A whole number from 0 to limit - 1."""
    if type(value) is not int or not 0 <= value < limit:
        raise ValueError(f"{value!r} is not a number from 0 to {limit - 1}")
    return value


def _text(value: Any) -> str:
    """One printable line of bounded length."""
    if type(value) is not str or not 0 < len(value) <= _MAX_TEXT or display(value) != value:
        raise ValueError(f"{str(value)[:80]!r} is not a printable name")
    return value


def _typed(value: Any, kind: type) -> Any:
    if kind is int:
        return _number(value, 1 << 24)
    return _text(value)
