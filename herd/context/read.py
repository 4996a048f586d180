"""Sources → chunks → K/V in a context folder. What is already there is not computed again.

A file whose stat is as it was is not opened; a chunk whose hash is known is not run through the model; the rest is run
in batches of similar length and committed every SEGMENT_TOKENS tokens, so that an interruption costs little.
"""

import ctypes
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path

import torch

from herd.context import manifest, sources
from herd.context.chunks import Chunk, Encoder, cut
from herd.context.manifest import SkippedRow
from herd.context.segment import KV, pack
from herd.context.sources import Found, Skipped
from herd.context.store import SEGMENT_TOKENS, NewChunk, NewSource, Store, Writer, chunk_hash
from herd.model import Transformer

BATCH_TOKENS = 8192
_CUT_VERSION = 1  # of chunks.cut: raise it when the same text is cut otherwise, so that unchanged files are cut again


@dataclass(frozen=True)
class Progress:
    """How far a read is. `eta_s` is None until a speed can be told."""

    sources: int
    sources_total: int
    read_tokens: int
    tokens_per_s: float
    eta_s: float | None


@dataclass(frozen=True)
class ReadReport:
    """What a read did. `sources` and `tokens` are those of the whole context afterwards."""

    sources: int
    tokens: int
    read_tokens: int
    reused_tokens: int
    skipped: list[Skipped]
    seconds: float


def read(
    paths: Iterable[str | Path],
    store: Store,
    transformer: Transformer,
    tokenizer: Encoder,
    progress: Callable[[Progress], None] | None = None,
) -> ReadReport:
    """Bring the context up to date with these paths: new and changed sources are read, vanished ones removed.

    `store` moves on to the new state. Interrupted at any moment it keeps what was committed.
    """
    started = time.perf_counter()
    _reuse_freed_memory()
    paths = list(paths)
    entries = sources.find(paths)
    with store.writer() as writer:
        session = _Session(writer, transformer, tokenizer, progress)
        session.run(entries, [sources.absolute(path) for path in paths])
    store.refresh()
    return ReadReport(
        sources=len(store.sources),
        tokens=store.tokens,
        read_tokens=session.read_tokens,
        reused_tokens=session.reused_tokens,
        skipped=session.skipped,
        seconds=time.perf_counter() - started,
    )


def _reuse_freed_memory() -> None:
    """Make glibc keep the memory of freed tensors instead of handing it back after every operator.

    Measured on Cria: page faults per read fell from 1.7M to 0.1M, and reading became 22 % faster at the same peak.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        mmap_max, trim_threshold = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 1 << 30)


class _Session:
    """One read: a queue of chunks to compute, and the sources that wait for them."""

    def __init__(
        self,
        writer: Writer,
        transformer: Transformer,
        tokenizer: Encoder,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self.writer, self.transformer, self.tokenizer, self.progress = writer, transformer, tokenizer, progress
        self.skipped: list[Skipped] = []
        self.read_tokens = self.reused_tokens = 0
        self._queue: dict[bytes, NewChunk] = {}
        self._queued_tokens = 0
        self._waiting: list[NewSource] = []
        self._sources = self._sources_total = 0
        self._bytes, self._bytes_total = 0.0, 0
        self._seen_tokens = 0
        self._compute_s = 0.0
        rows = manifest.sources(writer.db)
        self._by_path = {row.path: row for row in rows if row.path is not None}
        self._names = {row.name: row for row in rows}
        self._skipped_before = {row.path: row for row in manifest.skipped(writer.db)}
        self._tokens_of = manifest.source_tokens(writer.db)

    def run(self, entries: list[Found | Skipped], roots: list[bytes]) -> None:
        changed: list[Found] = []
        for entry in entries:
            if isinstance(entry, Skipped):
                self.skipped.append(entry)
                continue
            row, before = self._by_path.get(entry.path), self._skipped_before.get(entry.path)
            if row is not None and row.stat == _stat(entry.stat) != "":
                self.reused_tokens += self._tokens_of.get(row.id, 0)
            elif before is not None and before.stat == _stat(entry.stat) != "":
                self.skipped.append(Skipped(entry.path, before.name, before.reason, entry.stat))
            else:
                changed.append(entry)
        self._sources_total, self._bytes_total = len(changed), sum(found.size for found in changed)
        try:
            for found in changed:
                self._read_source(found)
            self._flush()
        except KeyboardInterrupt:
            self._report()
            raise
        self._finish(entries, roots)

    def _read_source(self, found: Found) -> None:
        loaded = sources.load(found)
        self._sources += 1
        before = self._bytes
        if isinstance(loaded, Skipped):
            self.skipped.append(loaded)
        else:
            name, hashes, done = self._name(found), list[bytes](), 0
            for chunk in cut(name, loaded.text, self.tokenizer, self.writer.spec.chunk):
                hashes.append(chunk_hash(self.writer.spec.fingerprint, chunk.ids))
                done += len(chunk.text) - chunk.text.index("\n") - 1  # without its header
                self._bytes = before + found.size * done / len(loaded.text)
                self._take(chunk, hashes[-1])
            self._waiting.append(NewSource(name, found.path, _stat(loaded.stat), hashes))
        self._bytes = before + found.size
        self._report()

    def _take(self, chunk: Chunk, digest: bytes) -> None:
        """Count a chunk, and queue it if it is new."""
        self._seen_tokens += len(chunk.ids)
        if digest in self.writer.known or digest in self._queue:
            self.reused_tokens += len(chunk.ids)
            return
        self._queue[digest] = NewChunk(digest, chunk.ids, chunk.first_line, chunk.last_line)
        self._queued_tokens += len(chunk.ids)
        if self._queued_tokens >= SEGMENT_TOKENS - self.writer.spec.chunk:
            self._flush()

    def _flush(self) -> None:
        """Compute what is queued and commit it, with the sources that are complete by that."""
        done: list[tuple[NewChunk, KV]] = []
        try:
            for batch in batches(list(self._queue.values()), BATCH_TOKENS):
                began = time.perf_counter()
                done += zip(batch, self._compute(batch), strict=True)
                self._compute_s += time.perf_counter() - began
                tokens = sum(len(chunk.ids) for chunk in batch)
                self.read_tokens += tokens
                self._queued_tokens -= tokens
                self._report()
        except KeyboardInterrupt:
            self.writer.commit(done)  # its sources come with the next read, which finds these chunks
            raise
        self.writer.commit(done, self._waiting)
        self._queue, self._queued_tokens, self._waiting = {}, 0, []

    @torch.inference_mode()
    def _compute(self, batch: list[NewChunk]) -> list[KV]:
        ids_BT = torch.zeros(len(batch), max(len(chunk.ids) for chunk in batch), dtype=torch.long)
        for row, chunk in enumerate(batch):
            ids_BT[row, : len(chunk.ids)] = torch.tensor(chunk.ids)
        device = next(self.transformer.parameters()).device
        k_BTGd, v_BTGd = self.transformer.read(ids_BT.to(device))
        spec = self.writer.spec
        return [
            pack(k_BTGd[row, : len(chunk.ids)].cpu(), v_BTGd[row, : len(chunk.ids)].cpu(), spec)
            for row, chunk in enumerate(batch)
        ]

    def _finish(self, entries: list[Found | Skipped], roots: list[bytes]) -> None:
        """Remove what is gone or can no longer be read, and remember what was skipped."""
        skipped = {entry.path for entry in self.skipped}
        alive = {entry.path for entry in entries} - skipped
        gone = [
            row.id
            for path, row in self._by_path.items()
            if path not in alive and (path in skipped or any(_inside(path, root) for root in roots))
        ]
        forget = [path for path in self._skipped_before if any(path == r or _inside(path, r) for r in roots)]
        rows = [SkippedRow(s.path, s.name, s.reason, _stat(s.stat)) for s in self.skipped]
        self.writer.commit(removed=gone, skipped=rows, forget=forget)

    def _name(self, found: Found) -> str:
        """The name of a source: the one it has, else the shortest that is free."""
        row = self._by_path.get(found.path)
        if row is not None:
            return row.name
        candidates = [found.name(parents) for parents in range(1, found.root.count(b"/") + 1)] or [found.name()]
        numbered = (f"{candidates[-1]}~{n}" for n in count(2))
        for name in chain(candidates, numbered):
            taken = self._names.get(name)
            # A name whose file is gone (moved, or imported from elsewhere) passes to the new file.
            if taken is None or taken.path is None or not os.path.lexists(taken.path):
                self._names[name] = manifest.SourceRow(0, name, found.path, "")
                return name
        raise AssertionError("names never run out")

    def _report(self) -> None:
        if self.progress is None:
            return
        speed = self.read_tokens / self._compute_s if self._compute_s else 0.0
        density = self._seen_tokens / self._bytes if self._bytes else 0.0
        left = self._queued_tokens + (self._bytes_total - self._bytes) * density
        eta = left / speed if speed else None
        self.progress(Progress(self._sources, self._sources_total, self.read_tokens, speed, eta))


def batches(chunks: list[NewChunk], tokens: int) -> list[list[NewChunk]]:
    """Chunks sorted by length, in batches whose padded size is at most `tokens` (one chunk at least)."""
    result: list[list[NewChunk]] = []
    for chunk in sorted(chunks, key=lambda chunk: -len(chunk.ids)):
        if not result or (len(result[-1]) + 1) * len(result[-1][0].ids) > tokens:
            result.append([])
        result[-1].append(chunk)
    return result


def _stat(identity: str) -> str:
    """What the manifest remembers; "" never equals what a file that is found has."""
    return f"{_CUT_VERSION}:{identity}" if identity else ""


def _inside(path: bytes, root: bytes) -> bool:
    return path.startswith(root.rstrip(b"/") + b"/")
