"""A context on disk: a folder with a manifest, segments of K/V and a lock. One writer, many readers.

A Store is a reader's snapshot: it maps the segments it saw and is not disturbed by later writes; `refresh` moves it on.
Everything is written in one order (bytes, sync, rows, commit), so a crash at any moment leaves the last committed
state, and a file that no row names is removed by the next writer.
"""

import hashlib
import os
import secrets
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from herd.config import TextConfig
from herd.context import manifest, segment
from herd.context.manifest import ChunkRow, SegmentRow, SkippedRow, SourceRow
from herd.context.segment import INDEPENDENT, KV, SEQUENTIAL, Spec
from herd.errors import ContextError
from herd.lock import hold

SEGMENT_TOKENS = 1 << 16
_LOCK = "lock"
_HASH_BYTES = 32


def spec_for(cfg: TextConfig, fingerprint: str, dtype: str = "int8", reading: str = SEQUENTIAL) -> Spec:
    """How K/V of this model are kept. ContextError for models that cannot be read chunk by chunk.

    With one global layer, whichever `reading` is asked for, chunks are read on their own: that is the same there.
    """
    layers = len(cfg.global_layers)
    if not layers or cfg.attention_chunk_size is None:
        raise ContextError(
            f"a context needs a model with global layers and chunked local layers; this one has "
            f"{layers} global layers and attention_chunk_size {cfg.attention_chunk_size}"
        )
    if layers == 1 and reading == SEQUENTIAL:
        reading = INDEPENDENT
    return Spec(fingerprint, cfg.num_key_value_heads, cfg.head_dim, cfg.attention_chunk_size, dtype, layers, reading)


AnyChunk = TypeVar("AnyChunk")


@dataclass(frozen=True)
class NewChunk:
    """A chunk to be stored: its hash, token ids, the lines of the source it holds and, in a sequence, the hash of the
    chunk before it."""

    hash: bytes
    ids: list[int]
    first_line: int
    last_line: int
    previous: bytes = b""


@dataclass(frozen=True)
class NewSource:
    """A source whose chunks (by hash, in order) are all stored, or come with the same commit."""

    name: str
    path: bytes | None
    stat: str
    chunks: list[bytes]


@dataclass(frozen=True)
class SourceInfo:
    """What `show` says of a source. `path` is None if it came from another machine."""

    name: str
    path: bytes | None
    chunks: int
    tokens: int


@dataclass(frozen=True)
class Mapped:
    """A segment in memory and its live chunks: indices into Store.chunks, in the order they lie in."""

    row: SegmentRow
    kv: KV
    live: list[int]
    size: int  # of the file


def chunk_hash(fingerprint: str, ids: Sequence[int], previous: bytes = b"") -> bytes:
    """Identity of a chunk's K/V: the model, the token ids and, in a sequence, the chunk before it decide it."""
    digest = hashlib.blake2b(fingerprint.encode() + b"\0", digest_size=_HASH_BYTES, key=previous)
    digest.update(np.asarray(ids, dtype="<u4").tobytes())
    return digest.digest()


def pack_ids(ids: Sequence[int], previous: bytes = b"") -> bytes:
    """Token ids, compressed, and behind them the hash of the chunk before, if there is one."""
    return zlib.compress(np.asarray(ids, dtype="<u4" if max(ids) > 0xFFFF else "<u2").tobytes(), 6) + previous


def unpack_ids(packed: bytes, tokens: int) -> list[int]:
    """Token ids of a chunk of known length; ContextError if the bytes do not hold them."""
    raw, _ = _inflate(packed, tokens)
    if len(raw) not in (2 * tokens, 4 * tokens):
        raise ContextError(f"a chunk of {tokens} tokens holds {len(raw)} bytes of token ids")
    return [int(i) for i in np.frombuffer(raw, dtype="<u4" if len(raw) == 4 * tokens else "<u2")]


def previous_of(packed: bytes, tokens: int) -> bytes:
    """The hash of the chunk before, from what `pack_ids` made; b"" for the first of a sequence and outside of one."""
    return _inflate(packed, tokens)[1]


def _inflate(packed: bytes, tokens: int) -> tuple[bytes, bytes]:
    try:
        inflate = zlib.decompressobj()
        raw = inflate.decompress(packed, 4 * tokens + 1)
    except zlib.error as error:
        raise ContextError(f"the token ids of a chunk are damaged ({error})") from error
    if len(inflate.unused_data) not in (0, _HASH_BYTES):
        raise ContextError(f"{len(inflate.unused_data)} bytes stand behind the token ids of a chunk")
    return raw, inflate.unused_data


class Store:
    """A consistent view of a context folder."""

    spec: Spec

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.chunks: list[ChunkRow] = []
        self.source_of: list[int] = []  # index into sources, for each chunk; the first if several share it
        self.sources: list[SourceInfo] = []
        self.skipped: list[tuple[str, str]] = []
        self.segments: list[Mapped] = []
        self.refresh()

    @classmethod
    def open(
        cls, folder: str | Path, spec: Spec | None = None, *, any_dtype: bool = False, any_reading: bool = False
    ) -> "Store":
        """Open a context; with a spec it is created if the folder is new or empty.

        ContextError if it was made by another model, keeps K/V in another format than the spec's (any_dtype: it may),
        was read otherwise (any_reading: it may), is damaged, or (without a spec) does not exist.
        """
        folder = Path(folder)
        if spec is None:
            return cls(folder)
        if not (folder / manifest.FILE).is_file() or not _has_meta(folder):
            _create(folder, spec)
        opened = cls(folder)
        found = opened.spec
        wanted = replace(spec, dtype=found.dtype) if any_dtype else spec
        if any_reading and wanted.layers == found.layers:
            wanted = replace(wanted, reading=found.reading)
        if found != wanted:
            raise ContextError(segment.mismatch(folder, found, wanted))
        return opened

    @property
    def tokens(self) -> int:
        return sum(chunk.tokens for chunk in self.chunks)

    @property
    def end_position(self) -> int:
        """Where a question starts: every chunk, full or not, occupies one attention chunk."""
        return len(self.chunks) * self.spec.chunk

    def ids(self, chunk: int) -> list[int]:
        row = self.chunks[chunk]
        try:
            return unpack_ids(row.ids, row.tokens)
        except ContextError as error:
            fix = f"run `herd context compact {self.folder}` to drop it, then read the sources again"
            raise ContextError(f"{self.folder}: {error}; {fix}") from error

    def kv(self, chunk: int) -> KV:
        """K/V of a live chunk, as it is kept."""
        row = self.chunks[chunk]
        mapped = next(mapped for mapped in self.segments if mapped.row.id == row.segment)
        return mapped.kv.part(row.start, row.start + row.tokens)

    def check_files(self) -> None:
        """ContextError if a segment was cut after it was mapped; to read what is gone would kill the process."""
        folder = os.fspath(self.folder)
        for mapped in self.segments:  # hundreds, before every token: without Path, which takes ten times as long
            with suppress(FileNotFoundError):  # the mapping keeps a file that a compaction deleted
                if (actual := os.stat(os.path.join(folder, mapped.row.file)).st_size) != mapped.size:
                    segment.check_size(self.folder / mapped.row.file, actual, mapped.size)

    def refresh(self) -> None:
        """Move on to the newest committed state."""
        for attempt in range(5):
            with manifest.connect(self.folder) as db, manifest.snapshot(db):
                spec = stored_spec(self.folder, db)  # a compaction may have changed the format
                rows = manifest.segments(db)
                chunks = manifest.chunks(db, live=True)
                sources, pairs = manifest.sources(db), manifest.source_chunks(db)
                skipped = manifest.skipped(db)
                manifest.check_references(rows, chunks, sources, pairs)
            try:
                mapped = self._map(rows, chunks, spec)
                break
            except FileNotFoundError as error:
                # A compaction may have replaced the file after the rows were read; the new rows name another one.
                if attempt == 4:
                    raise ContextError(segment.damaged(Path(str(error.filename)), "the file is missing")) from error
        self.spec, self.chunks, self.segments = spec, chunks, mapped
        self.skipped = [(row.name, row.reason) for row in skipped]
        self._index_sources(sources, pairs)

    def _map(self, rows: list[SegmentRow], chunks: list[ChunkRow], spec: Spec) -> list[Mapped]:
        live: dict[int, list[int]] = {row.id: [] for row in rows}
        for index, chunk in enumerate(chunks):
            live[chunk.segment].append(index)
        mapped = []
        for row in rows:
            if live[row.id]:
                kv = segment.load(self.folder / row.file, row.tokens, spec)
                check_bounds(self.folder / row.file, row, [chunks[i] for i in live[row.id]], spec)
                mapped.append(Mapped(row, kv, live[row.id], segment.file_bytes(spec, row.tokens)))
        return mapped

    def _index_sources(self, sources: list[SourceRow], pairs: list[tuple[int, int]]) -> None:
        index_of_chunk = {chunk.id: i for i, chunk in enumerate(self.chunks)}
        index_of_source = {source.id: i for i, source in enumerate(sources)}
        self.source_of = [-1] * len(self.chunks)
        counts, tokens = [0] * len(sources), [0] * len(sources)
        for source_id, chunk_id in pairs:
            source, chunk = index_of_source[source_id], index_of_chunk[chunk_id]
            counts[source] += 1
            tokens[source] += self.chunks[chunk].tokens
            if self.source_of[chunk] < 0 or source < self.source_of[chunk]:
                self.source_of[chunk] = source
        self.sources = [SourceInfo(row.name, row.path, n, t) for row, n, t in zip(sources, counts, tokens, strict=True)]

    @contextmanager
    def writer(self) -> Iterator["Writer"]:
        """The one writer of the folder. ContextError at once if another process is writing."""
        with ExitStack() as stack:
            stack.enter_context(lock(self.folder))
            db = stack.enter_context(manifest.connect(self.folder))
            with manifest.plain_errors(self.folder):
                remove_unnamed(self.folder, db)
            writer = Writer(self.folder, stored_spec(self.folder, db), db)
            yield writer
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


class Writer:
    """Adds to a context. Made by Store.writer, which holds the lock."""

    def __init__(self, folder: Path, spec: Spec, db: sqlite3.Connection) -> None:
        self.folder, self.spec, self.db = folder, spec, db
        self.known = manifest.known_hashes(db)  # hash → chunk row

    def commit(
        self,
        chunks: Sequence[tuple[NewChunk, KV]] = (),
        sources: Iterable[NewSource] = (),
        removed: Iterable[int] = (),
        skipped: Iterable[SkippedRow] = (),
        forget: Iterable[bytes] = (),
    ) -> None:
        """Make all of this durable, or none of it. `removed` are source rows, `forget` paths no longer skipped."""
        added: dict[bytes, int] = {}
        with manifest.plain_errors(self.folder):
            # Joining copies the K/V; parts keep one segment, and so the copy, bounded.
            parts = [(part, self.write([kv for _, kv in part])) for part in split(chunks)]
            with manifest.transaction(self.db):
                for part, row in parts:
                    added |= self._insert(part, manifest.insert_segment(self.db, row))
                manifest.delete_sources(self.db, removed)
                for source in sources:
                    ids = [added.get(h) or self.known[h] for h in source.chunks]
                    manifest.put_source(self.db, source.name, source.path, source.stat, ids)
                manifest.replace_skipped(self.db, forget, skipped)
        self.known |= added

    def write(self, part: Sequence[KV]) -> SegmentRow:
        """Write one segment and sync it. No row names it yet, so its id is 0."""
        kv = segment.join(part)
        # A random name: a reader that was late can never open a newer file under an old name.
        file = secrets.token_hex(8) + segment.SUFFIX
        return SegmentRow(0, file, len(kv), segment.write(self.folder / file, kv, self.spec))

    def _insert(self, part: Sequence[tuple[NewChunk, KV]], row: int) -> dict[bytes, int]:
        added, start = {}, 0
        for new, kv in part:
            lines = (new.first_line, new.last_line)
            packed = pack_ids(new.ids, new.previous)
            chunk = ChunkRow(0, new.hash, row, start, len(kv), *lines, kv.crc(), packed)
            added[new.hash] = manifest.insert_chunk(self.db, chunk)
            start += len(kv)
        return added


def split(chunks: Sequence[tuple[AnyChunk, KV]]) -> list[list[tuple[AnyChunk, KV]]]:
    """Chunks in runs of at most SEGMENT_TOKENS (one chunk at least)."""
    runs: list[list[tuple[AnyChunk, KV]]] = []
    tokens = 0
    for new, kv in chunks:
        if not runs or tokens + len(kv) > SEGMENT_TOKENS:
            runs.append([])
            tokens = 0
        runs[-1].append((new, kv))
        tokens += len(kv)
    return runs


def check_bounds(file: Path, row: SegmentRow, chunks: Iterable[ChunkRow], spec: Spec) -> None:
    """Chunks of one segment lie inside it and do not overlap; ContextError otherwise."""
    end = 0
    for chunk in chunks:
        if chunk.start < end or not 0 < chunk.tokens <= spec.chunk or chunk.start + chunk.tokens > row.tokens:
            raise ContextError(segment.damaged(file, f"chunk {chunk.id} lies outside of it or over another one"))
        end = chunk.start + chunk.tokens


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the folder's writer lock; the system drops it when the process dies."""
    with ExitStack() as stack:
        with manifest.plain_errors(folder):
            stack.enter_context(hold(folder / _LOCK, partial(_written, folder)))
        yield


def _written(folder: Path, owner: str) -> ContextError:
    return ContextError(f"{folder} is being written by process {owner}; wait for it to finish and repeat")


def remove_unnamed(folder: Path, db: sqlite3.Connection) -> None:
    """Delete segment files that no row names: what a crash or a full disk left. Only the writer may do this."""
    named = {row.file for row in manifest.segments(db)}
    for path in folder.glob(f"*{segment.SUFFIX}"):
        if path.name not in named:
            path.unlink()


def stored_spec(folder: Path, db: sqlite3.Connection) -> Spec:
    """What the manifest says that all K/V have in common."""
    meta = manifest.read_meta(db)
    if not meta:
        raise ContextError(f"{folder} holds no context yet; read something into it first")
    if meta.get("format") != manifest.FORMAT:
        raise ContextError(
            f"{folder} has format {meta.get('format')}, this version reads {manifest.FORMAT}; read the sources again"
        )
    try:
        return Spec.from_meta(meta)
    except ContextError as error:
        raise ContextError(manifest.damaged(folder, str(error))) from error


def _has_meta(folder: Path) -> bool:
    with manifest.connect(folder) as db:
        return bool(manifest.read_meta(db))


def _create(folder: Path, spec: Spec) -> None:
    with manifest.plain_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        strangers = [p.name for p in folder.iterdir() if not p.name.startswith((manifest.FILE, _LOCK))]
    if strangers:
        raise ContextError(f"{folder} is not empty and holds no context ({strangers[0]} ...); name another folder")
    with lock(folder), manifest.connect(folder, create=True) as db:
        # Another process may have been faster.
        if not manifest.read_meta(db):
            manifest.create_schema(db, spec.to_meta())
