"""Upkeep of a context folder: verify, compact, merge. None of them needs the model."""

from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

from herd.context import manifest, segment
from herd.context.manifest import ChunkRow, SegmentRow, SkippedRow
from herd.context.segment import KV, Spec
from herd.context.sequence import broken
from herd.context.store import (
    SEGMENT_TOKENS,
    NewChunk,
    NewSource,
    Store,
    Writer,
    check_bounds,
    chunk_hash,
    lock,
    previous_of,
    remove_unnamed,
    split,
    stored_spec,
    unpack_ids,
)
from herd.errors import ContextError

_SMALL_TOKENS = SEGMENT_TOKENS // 4
_MENDED = "its K/V was damaged and dropped; read it again"
_MENDED_AFTER = "it was read after one whose K/V was damaged; read it again"


@dataclass(frozen=True)
class Verified:
    """`problems` is empty for a sound context; each problem names the segment and the fix."""

    sources: int
    chunks: int
    tokens: int
    problems: list[str]


@dataclass(frozen=True)
class Compacted:
    """Bytes on disk before and after, chunks dropped because no source uses them, and sources that lost chunks."""

    bytes_before: int
    bytes_after: int
    dropped_chunks: int
    damaged_sources: list[str]


def verify(folder: str | Path) -> Verified:
    """Check every byte of a context: the manifest, sizes, bounds, hashes and checksums."""
    folder = Path(folder)
    with manifest.connect(folder) as db, manifest.snapshot(db):
        spec = stored_spec(folder, db)
        problems = [manifest.damaged(folder, row[0]) for row in db.execute("PRAGMA integrity_check") if row[0] != "ok"]
        chunks, rows, sources = manifest.chunks(db, live=False), manifest.segments(db), manifest.sources(db)
        for row in rows:
            _, bad = _sound(folder, row, [chunk for chunk in chunks if chunk.segment == row.id], spec)
            problems += bad
        if spec.sequential and (where := broken(manifest.source_chunks(db), chunks)):
            problems.append(manifest.damaged(folder, where))
    return Verified(len(sources), len(chunks), sum(chunk.tokens for chunk in chunks), problems)


def compact(folder: str | Path, kv: str | None = None) -> Compacted:
    """Drop damaged chunks and those no source uses, and join small segments. The context answers as before.

    kv: also change the format of all K/V to this one, which must not be wider than the one they have (ContextError).
    A source that lost a chunk is dropped too and listed as skipped, so that it is read again and never half there. In a
    sequence all chunks after a damaged one are dropped with it: they may have been read from the damage.
    """
    folder = Path(folder)
    with manifest.connect(folder) as db, lock(folder), manifest.plain_errors(folder):
        spec = stored_spec(folder, db)
        writer = Writer(folder, _narrowed(folder, spec, kv), db)
        remove_unnamed(folder, db)
        before = _size(folder)
        dropped, moving, old = 0, list[tuple[ChunkRow, KV]](), list[SegmentRow]()
        chunks = manifest.chunks(db, live=False)
        checked = []
        for row in manifest.segments(db):
            own = [chunk for chunk in chunks if chunk.segment == row.id]
            checked.append((row, own, *_sound(folder, row, own, spec)))
        damaged = {chunk.id for chunk in chunks} - {chunk.id for _, _, sound, _ in checked for chunk, _ in sound}
        pairs = manifest.source_chunks(db)
        used = {chunk for _, chunk in pairs} - damaged
        if spec.sequential:
            used = _up_to_damage([chunk for _, chunk in pairs], damaged)
        for row, own, sound, problems in checked:
            kept = [(chunk, part) for chunk, part in sound if chunk.id in used]
            whole = len(kept) == len(own) and row.tokens > _SMALL_TOKENS and not problems
            if whole and writer.spec == spec:
                continue
            dropped += len(own) - len(kept)
            moving += kept
            old.append(row)
        # One small segment alone gains nothing from being written again.
        needed = len(old) > 1 or dropped or writer.spec != spec
        lost = _replace(writer, old, moving, damaged, used) if needed else []
        db.execute("VACUUM")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        remove_unnamed(folder, db)
    return Compacted(before, _size(folder), dropped, lost)


def _up_to_damage(sequence: list[int], damaged: set[int]) -> set[int]:
    """The chunks of a sequence before the first that is damaged."""
    return set(takewhile(lambda chunk: chunk not in damaged, sequence))


def _narrowed(folder: Path, spec: Spec, kv: str | None) -> Spec:
    """The spec with its K/V in format `kv`; ContextError if that is wider."""
    wanted = replace(spec, dtype=kv or spec.dtype)
    if wanted != spec and not spec.narrows_to(wanted.dtype):
        raise ContextError(
            f"{folder} keeps K/V as {spec.dtype}, and {kv} would not bring back what was rounded; "
            f"read the sources into another folder with --kv {kv}"
        )
    return wanted


def _replace(
    writer: Writer, old: list[SegmentRow], moving: list[tuple[ChunkRow, KV]], damaged: set[int], used: set[int]
) -> list[str]:
    """Write the moving chunks to new segments in the writer's format, point the rows at them and forget the old
    segments, all at once. Sources with a chunk that is not used any more go, and are returned."""
    db = writer.db
    written = []
    for part in split(moving):
        kvs = [segment.convert(kv, writer.spec) for _, kv in part]
        written.append(([(chunk, kv.crc()) for (chunk, _), kv in zip(part, kvs, strict=True)], writer.write(kvs)))
    pairs = manifest.source_chunks(db)
    hit, after = (
        {source for source, chunk in pairs if chunk in gone} for gone in (damaged, {c for _, c in pairs} - used)
    )
    lost = [source for source in manifest.sources(db) if source.id in hit | after]
    why = {source.id: _MENDED if source.id in hit else _MENDED_AFTER for source in lost}
    with manifest.transaction(db):
        manifest.set_meta(db, writer.spec.to_meta())
        for placed, new in written:
            row, start = manifest.insert_segment(db, new), 0
            for chunk, crc in placed:
                manifest.move_chunk(db, chunk.id, row, start, crc)
                start += chunk.tokens
        manifest.delete_sources(db, [source.id for source in lost])
        skipped = [SkippedRow(s.path or s.name.encode(), s.name, why[s.id]) for s in lost]
        manifest.replace_skipped(db, [], skipped)
        kept = {chunk.id for chunk, _ in moving}
        left = {row.id for row in old}
        gone = [chunk.id for chunk in manifest.chunks(db, live=False) if chunk.segment in left and chunk.id not in kept]
        manifest.delete_chunks(db, gone)
        manifest.delete_segments(db, left)
    return [source.name for source in lost]


def merge(folder: str | Path, other: str | Path) -> int:
    """Copy all sources of another context of the same model into this one; returns the tokens that were copied.

    A source of the same path, or of the same name and content, is replaced; one of the same name but another
    content gets a number behind its name.
    """
    target, source = Store.open(folder), Store.open(other)
    if target.folder.resolve() == source.folder.resolve():
        raise ContextError(f"{folder} cannot be merged into itself; name two folders")
    if target.spec.sequential or source.spec.sequential:
        raise ContextError(
            f"{folder if target.spec.sequential else other} was read in sequence, each chunk after all before it, "
            "so it cannot be merged; read the sources of both into one context"
        )
    copied = 0
    with target.writer() as writer:
        _check_mergeable(target.folder, writer.spec, source)
        batch: list[tuple[NewChunk, KV]] = []
        for index, row in enumerate(source.chunks):
            if row.hash in writer.known:
                continue
            kv = source.kv(index)
            if kv.crc() != row.crc:
                raise ContextError(f"{other} is damaged (chunk {row.id}); run `herd context compact {other}` first")
            batch.append((NewChunk(row.hash, source.ids(index), row.first_line, row.last_line), kv))
            copied += row.tokens
            if sum(len(kv) for _, kv in batch) >= SEGMENT_TOKENS - source.spec.chunk:
                writer.commit(batch)
                batch = []
        sources, skipped = _merged_sources(writer, source)
        writer.commit(batch, sources, skipped=skipped)
    return copied


def _check_mergeable(folder: Path, spec: Spec, other: Store) -> None:
    if replace(spec, dtype=other.spec.dtype) != other.spec:
        raise ContextError(
            f"{other.folder} and {folder} were read by different models or settings "
            f"({other.spec.fingerprint[:12]} and {spec.fingerprint[:12]}); read the sources again instead"
        )
    if spec != other.spec:
        wide, kv = (folder, other.spec.dtype) if spec.narrows_to(other.spec.dtype) else (other.folder, spec.dtype)
        raise ContextError(
            f"{other.folder} keeps K/V as {other.spec.dtype} and {folder} as {spec.dtype}; "
            f"run `herd context compact {wide} --kv {kv}` first"
        )


def _merged_sources(writer: Writer, other: Store) -> tuple[list[NewSource], list[SkippedRow]]:
    """The sources of the other context under names that are free here, and what it skipped."""
    hash_of = {row.id: row.hash for row in manifest.chunks(writer.db, live=False)}
    here: dict[int, list[bytes]] = {}
    for source, chunk in manifest.source_chunks(writer.db):
        here.setdefault(source, []).append(hash_of[chunk])
    taken = {row.name: row for row in manifest.sources(writer.db)}
    with manifest.connect(other.folder) as db, manifest.snapshot(db):
        rows, hashes = manifest.sources(db), {row.id: row.hash for row in manifest.chunks(db, live=True)}
        skipped = manifest.skipped(db)
        chunks: dict[int, list[bytes]] = {}
        for source, chunk in manifest.source_chunks(db):
            chunks.setdefault(source, []).append(hashes[chunk])
    found = []
    for row in rows:
        name, number = row.name, 2
        mine = chunks.get(row.id, [])
        while name in taken and not (
            (row.path is not None and taken[name].path == row.path) or here.get(taken[name].id, []) == mine
        ):
            name, number = f"{row.name}~{number}", number + 1
        found.append(NewSource(name, row.path, row.stat, mine))
    return found, skipped


def _sound(
    folder: Path, row: SegmentRow, chunks: list[ChunkRow], spec: Spec
) -> tuple[list[tuple[ChunkRow, KV]], list[str]]:
    """The chunks of a segment whose bytes are as they were written, and what is wrong with the others."""
    path = folder / row.file
    try:
        kv = segment.load(path, row.tokens, spec)
        check_bounds(path, row, chunks, spec)
    except ContextError as error:
        return [], [str(error)]
    except FileNotFoundError:
        return [], [segment.damaged(path, "the file is missing")]
    sound, problems = [], []
    for chunk in chunks:
        part = kv.part(chunk.start, chunk.start + chunk.tokens)
        wrong = _wrong(chunk, part, spec)
        if wrong:
            problems.append(segment.damaged(path, f"chunk {chunk.id}: {wrong}"))
        else:
            sound.append((chunk, part))
    return sound, problems


def _wrong(chunk: ChunkRow, kv: KV, spec: Spec) -> str:
    """What is wrong with a chunk; "" if nothing is."""
    try:
        ids, previous = unpack_ids(chunk.ids, chunk.tokens), previous_of(chunk.ids, chunk.tokens)
        if chunk_hash(spec.fingerprint, ids, previous) != chunk.hash:
            return "its token ids do not match its hash"
    except ContextError as error:
        return str(error)
    return "" if kv.crc() == chunk.crc else "its checksum does not match"


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
