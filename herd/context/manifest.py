"""The manifest of a context folder: which sources were read, their chunks, and where each chunk's K/V lies.

One SQLite file in WAL mode. A row stands only for bytes that are already safe on disk: segments are written and synced
first, then the rows that name them are committed, so a crash leaves at most an unnamed file.
"""

import itertools
import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from herd.context.sources import display
from herd.errors import ContextError

FILE = "manifest.sqlite"
FORMAT = "1"
_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE segment (
  id INTEGER PRIMARY KEY, file TEXT NOT NULL UNIQUE, tokens INTEGER NOT NULL, bytes INTEGER NOT NULL) STRICT;
CREATE TABLE chunk (
  id INTEGER PRIMARY KEY, hash BLOB NOT NULL UNIQUE, segment INTEGER NOT NULL REFERENCES segment(id),
  start INTEGER NOT NULL, tokens INTEGER NOT NULL, first_line INTEGER NOT NULL, last_line INTEGER NOT NULL,
  crc INTEGER NOT NULL, ids BLOB NOT NULL) STRICT;
CREATE INDEX chunk_segment ON chunk(segment);
CREATE TABLE source (
  id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, path BLOB UNIQUE, stat TEXT NOT NULL) STRICT;
CREATE TABLE source_chunk (
  source INTEGER NOT NULL REFERENCES source(id) ON DELETE CASCADE, ordinal INTEGER NOT NULL,
  chunk INTEGER NOT NULL REFERENCES chunk(id), PRIMARY KEY (source, ordinal)) STRICT, WITHOUT ROWID;
CREATE INDEX source_chunk_chunk ON source_chunk(chunk);
CREATE TABLE skipped (
  path BLOB PRIMARY KEY, name TEXT NOT NULL, reason TEXT NOT NULL, stat TEXT NOT NULL) STRICT, WITHOUT ROWID;
-- Nothing looks these up. SQLite compares tables with their indexes, and so sees a flipped bit that nothing else would.
CREATE INDEX chunk_lines ON chunk(first_line, last_line);
CREATE INDEX skipped_whole ON skipped(name, reason, stat);
"""


class ChunkRow(NamedTuple):
    """One chunk. `start` and `tokens` are its place in the segment; `ids` its compressed token ids."""

    id: int
    hash: bytes
    segment: int
    start: int
    tokens: int
    first_line: int
    last_line: int
    crc: int
    ids: bytes


class SegmentRow(NamedTuple):
    id: int
    file: str
    tokens: int
    bytes: int


class SourceRow(NamedTuple):
    """One source. `path` is None where the context came from another machine; `stat` decides if it must be read."""

    id: int
    name: str
    path: bytes | None
    stat: str


class SkippedRow(NamedTuple):
    """What was found and not read. `stat` says for which state of the file the reason holds, "" for none."""

    path: bytes
    name: str
    reason: str
    stat: str = ""


@contextmanager
def connect(folder: Path, *, create: bool = False) -> Iterator[sqlite3.Connection]:
    """A connection whose SQLite failures become ContextErrors that name the fix."""
    with sqlite_errors(folder):
        file = folder / FILE
        if not create and not file.is_file():
            raise ContextError(f"{folder} holds no context (no {FILE}); read something into it first")
        db = sqlite3.connect(_uri(folder, create), uri=True, isolation_level=None, timeout=30, check_same_thread=False)
        try:
            db.execute("PRAGMA trusted_schema = OFF")
            db.execute("PRAGMA foreign_keys = ON")
            if create:
                db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            yield db
        finally:
            db.close()


def _uri(folder: Path, create: bool) -> str:
    file = (folder / FILE).absolute().as_uri()
    if create:
        return f"{file}?mode=rwc"
    if os.access(folder, os.W_OK):
        return f"{file}?mode=rw"
    wal = folder / f"{FILE}-wal"
    if wal.exists() and wal.stat().st_size:
        raise ContextError(f"{folder} cannot be written and its last writer did not finish; make it writable once")
    return f"{file}?mode=ro&immutable=1"


@contextmanager
def plain_errors(folder: Path) -> Iterator[None]:
    """Turn what the disk or SQLite reports into one sentence with the fix. Put it around nothing but work on disk."""
    try:
        with sqlite_errors(folder):
            yield
    except OSError as error:
        raise ContextError(
            f"{folder}: {error.strerror or error}; what was committed is safe: repeat once that is mended"
        ) from error


@contextmanager
def sqlite_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # SQLite quotes damaged names in its messages
        raise ContextError(_plain(folder, error)) from error


def _plain(folder: Path, error: Exception) -> str:
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    if code == sqlite3.SQLITE_FULL:
        return f"{folder}: {error}; what was committed is safe: free some space and repeat"
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return f"{folder} is in use by another process; wait for it to finish"
    # SQLITE_ERROR: the tables are not those that this version makes.
    if isinstance(error, sqlite3.OperationalError) and code != sqlite3.SQLITE_ERROR:
        return f"{folder}: {error}; what was committed is safe: check its permissions and the disk's space, then repeat"
    return damaged(folder, str(error))


def damaged(folder: Path, what: str) -> str:
    """One printable line that says what is wrong with the manifest, and the fix."""
    what = display(" ".join(what.split()))
    return f"{folder}/{FILE} is damaged ({what}); delete the folder and read the sources again, or import an export"


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


@contextmanager
def snapshot(db: sqlite3.Connection) -> Iterator[None]:
    """Everything read inside sees one committed state."""
    db.execute("BEGIN")
    try:
        yield
    finally:
        db.execute("ROLLBACK")


def create_schema(db: sqlite3.Connection, meta: dict[str, str]) -> None:
    with transaction(db):
        for statement in _SCHEMA.split(";"):
            if statement.strip():
                db.execute(statement)
        rows = {"format": FORMAT, **meta}
        db.executemany("INSERT INTO meta VALUES (?, ?)", rows.items())


def read_meta(db: sqlite3.Connection) -> dict[str, str]:
    """The meta table; {} for a file without schema (a crash while it was made)."""
    if not db.execute("SELECT count(*) FROM sqlite_schema WHERE name = 'meta'").fetchone()[0]:
        return {}
    return dict(db.execute("SELECT key, value FROM meta"))


def set_meta(db: sqlite3.Connection, meta: dict[str, str]) -> None:
    db.executemany("UPDATE meta SET value = ? WHERE key = ?", ((value, key) for key, value in meta.items()))


AnyRow = TypeVar("AnyRow")


def _rows(kind: type[AnyRow], cursor: Iterable[tuple[Any, ...]]) -> list[AnyRow]:
    """Rows of a query, whose values must be of the types that `kind` declares: a flipped bit may change them."""
    rows = list(cursor)
    # Column by column, one value of each type: there are many rows, and one by one they take half of opening.
    for column, type_ in zip(zip(*rows, strict=True), kind.__annotations__.values(), strict=False):
        if not all(isinstance(value, type_) for value in dict(zip(map(type, column), column, strict=True)).values()):
            raise sqlite3.DatabaseError(f"a value of a {kind.__name__} is of another type")
    return list(itertools.starmap(kind, rows))


def segments(db: sqlite3.Connection) -> list[SegmentRow]:
    return _rows(SegmentRow, db.execute("SELECT id, file, tokens, bytes FROM segment ORDER BY id"))


def segment(db: sqlite3.Connection, id: int) -> SegmentRow:
    """One segment, which must be there."""
    return _rows(SegmentRow, db.execute("SELECT id, file, tokens, bytes FROM segment WHERE id = ?", (id,)))[0]


_CHUNK = "chunk.id, hash, segment, start, tokens, first_line, last_line, crc, ids"


def chunks(db: sqlite3.Connection, *, live: bool) -> list[ChunkRow]:
    """All chunks, or those that belong to a source, in the order in which they lie on disk."""
    where = "WHERE id IN (SELECT chunk FROM source_chunk)" if live else ""
    return _rows(ChunkRow, db.execute(f"SELECT {_CHUNK} FROM chunk {where} ORDER BY segment, start"))


def chunk(db: sqlite3.Connection, id: int) -> ChunkRow:
    """One chunk, which must be there."""
    return _rows(ChunkRow, db.execute(f"SELECT {_CHUNK} FROM chunk WHERE id = ?", (id,)))[0]


def chunks_of(db: sqlite3.Connection, name: str) -> list[ChunkRow]:
    """The chunks of a source in order; none if there is no such source."""
    joined = "chunk JOIN source_chunk ON chunk.id = chunk JOIN source ON source.id = source"
    return _rows(ChunkRow, db.execute(f"SELECT {_CHUNK} FROM {joined} WHERE name = ? ORDER BY ordinal", (name,)))


def sources(db: sqlite3.Connection) -> list[SourceRow]:
    return _rows(SourceRow, db.execute("SELECT id, name, path, stat FROM source ORDER BY name"))


def source_chunks(db: sqlite3.Connection) -> list[tuple[int, int]]:
    """(source, chunk) pairs in order of source and place."""
    return list(db.execute("SELECT source, chunk FROM source_chunk ORDER BY source, ordinal"))


def source_tokens(db: sqlite3.Connection) -> dict[int, int]:
    """Tokens of each source that has any."""
    query = "SELECT source, sum(tokens) FROM source_chunk JOIN chunk ON chunk.id = chunk GROUP BY source"
    return dict(db.execute(query))


def skipped(db: sqlite3.Connection) -> list[SkippedRow]:
    return _rows(SkippedRow, db.execute("SELECT path, name, reason, stat FROM skipped ORDER BY name"))


def check_references(
    segments: Iterable[SegmentRow],
    chunks: Iterable[ChunkRow],
    sources: Iterable[SourceRow],
    pairs: Iterable[tuple[int, int]],
) -> None:
    """What one row says of another must be there; sqlite3.DatabaseError if not."""
    missing = [
        *({chunk.segment for chunk in chunks} - {row.id for row in segments}),
        *({source for source, _ in pairs} - {row.id for row in sources}),
        *({chunk for _, chunk in pairs} - {row.id for row in chunks}),
    ]
    if missing:
        raise sqlite3.DatabaseError(f"{len(missing)} rows name rows that are not there")


def known_hashes(db: sqlite3.Connection) -> dict[bytes, int]:
    return dict(db.execute("SELECT hash, id FROM chunk"))


def insert_segment(db: sqlite3.Connection, row: SegmentRow) -> int:
    """Insert a segment; its `id` is ignored, the new one is returned."""
    query = "INSERT INTO segment (file, tokens, bytes) VALUES (?, ?, ?) RETURNING id"
    return int(db.execute(query, (row.file, row.tokens, row.bytes)).fetchone()[0])


def insert_chunk(db: sqlite3.Connection, row: ChunkRow) -> int:
    """Insert a chunk; its `id` is ignored, the new one is returned."""
    query = (
        "INSERT INTO chunk (hash, segment, start, tokens, first_line, last_line, crc, ids) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?) RETURNING id"
    )
    values = (row.hash, row.segment, row.start, row.tokens, row.first_line, row.last_line, row.crc, row.ids)
    return int(db.execute(query, values).fetchone()[0])


def move_chunk(db: sqlite3.Connection, chunk: int, segment: int, start: int, crc: int) -> None:
    db.execute("UPDATE chunk SET segment = ?, start = ?, crc = ? WHERE id = ?", (segment, start, crc, chunk))


def put_source(db: sqlite3.Connection, name: str, path: bytes | None, stat: str, chunk_ids: Iterable[int]) -> None:
    """Make `name` stand for exactly these chunks, in order; it replaces what had this name or path."""
    db.execute("DELETE FROM source WHERE name = ? OR path = ?", (name, path))
    query = "INSERT INTO source (name, path, stat) VALUES (?, ?, ?) RETURNING id"
    source = db.execute(query, (name, path, stat)).fetchone()[0]
    rows = ((source, ordinal, chunk) for ordinal, chunk in enumerate(chunk_ids))
    db.executemany("INSERT INTO source_chunk VALUES (?, ?, ?)", rows)


def delete_sources(db: sqlite3.Connection, ids: Iterable[int]) -> None:
    db.executemany("DELETE FROM source WHERE id = ?", ((i,) for i in ids))


def delete_chunks(db: sqlite3.Connection, ids: Iterable[int]) -> None:
    db.executemany("DELETE FROM chunk WHERE id = ?", ((i,) for i in ids))


def delete_segments(db: sqlite3.Connection, ids: Iterable[int]) -> None:
    db.executemany("DELETE FROM segment WHERE id = ?", ((i,) for i in ids))


def replace_skipped(db: sqlite3.Connection, forget: Iterable[bytes], rows: Iterable[SkippedRow]) -> None:
    db.executemany("DELETE FROM skipped WHERE path = ?", ((path,) for path in forget))
    db.executemany("INSERT OR REPLACE INTO skipped VALUES (?, ?, ?, ?)", rows)
