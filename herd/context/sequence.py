"""The order in which a model with several global layers reads: each chunk after all chunks before it.

The sequence is that of the sources by their rows, and of the chunks within each. What a chunk's K/V are depends on all
chunks before it, so its hash does, too (`chunk_hash`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from herd.context import manifest, segment
from herd.context.forward import read_after
from herd.context.manifest import ChunkRow
from herd.context.scan import PART_TOKENS
from herd.context.segment import KV
from herd.context.store import NewChunk, Writer, previous_of
from herd.errors import ContextError
from herd.model import Transformer


@dataclass
class _Span:
    """Neighbouring tokens of one segment."""

    segment: int
    start: int
    stop: int


class Past:
    """What was read so far in a sequence: K/V of chunks that are stored, and of those that will be next."""

    def __init__(self, writer: Writer) -> None:
        self._writer, self._spec = writer, writer.spec
        self._chunks = 0
        self._stored: list[_Span] = []
        self._unproved: list[ChunkRow] = []  # of the stored
        self._fresh: list[tuple[bytes, KV]] = []
        self._mapped: dict[int, tuple[Path, KV]] = {}

    def add_stored(self, row: ChunkRow) -> None:
        """Go on behind a chunk that is stored."""
        last = self._stored[-1] if self._stored else None
        adjacent = last is not None and (row.segment, row.start) == (last.segment, last.stop)
        if last is not None and adjacent and row.start + row.tokens - last.start <= PART_TOKENS:
            last.stop += row.tokens
        else:
            self._stored.append(_Span(row.segment, row.start, row.start + row.tokens))
        self._unproved.append(row)
        self._chunks += 1

    def read(self, transformer: Transformer, chunk: NewChunk) -> KV:
        """K/V of the chunk that comes next. ContextError if those before it are damaged: what is wrong would spread."""
        for row in self._unproved:
            if self._kv(_Span(row.segment, row.start, row.start + row.tokens)).crc() != row.crc:
                path, _ = self._mapped[row.segment]
                raise ContextError(segment.damaged(path, f"chunk {row.id}: its checksum does not match"))
        self._unproved = []
        for path, kv in self._mapped.values():
            segment.check_size(path, path.stat().st_size, segment.file_bytes(self._spec, len(kv)))
        before = [self._kv(span) for span in self._stored] + [kv for _, kv in self._fresh]
        kv = read_after(transformer, chunk.ids, self._spec, self._chunks, before)
        self._fresh.append((chunk.hash, kv))
        self._chunks += 1
        return kv

    def committed(self) -> None:
        """All that was read is stored now: its memory is given back."""
        fresh, self._fresh = self._fresh, []
        self._chunks -= len(fresh)
        for digest, _ in fresh:
            self.add_stored(manifest.chunk(self._writer.db, self._writer.known[digest]))

    def _kv(self, span: _Span) -> KV:
        if span.segment not in self._mapped:
            row = manifest.segment(self._writer.db, span.segment)
            path = self._writer.folder / row.file
            try:
                self._mapped[span.segment] = path, segment.load(path, row.tokens, self._spec)
            except FileNotFoundError as error:
                raise ContextError(segment.damaged(path, "the file is missing")) from error
        return self._mapped[span.segment][1].part(span.start, span.stop)


def broken(pairs: Sequence[tuple[int, int]], chunks: Sequence[ChunkRow]) -> str:
    """Where `manifest.source_chunks` are no sequence, for a chunk was not read after the one before it; "" if they are
    one."""
    rows, previous = {chunk.id: chunk for chunk in chunks}, b""
    for place, (_, chunk) in enumerate(pairs):
        if chunk not in rows or _previous(rows[chunk]) != previous:
            return f"chunk {chunk}, number {place + 1} of the sequence, was not read after the one before it"
        previous = rows[chunk].hash
    return ""


def _previous(chunk: ChunkRow) -> bytes | None:
    try:
        return previous_of(chunk.ids, chunk.tokens)
    except ContextError:
        return None
