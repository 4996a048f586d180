"""What the model has seen of chats, in one SQLite file: a chat goes on after a restart where it was, bit for bit.

The file holds blocks of keys and values (`herd.engine.Block`) as they are in memory. A block is named by a hash over
the model and all tokens up to its end, so what several chats begin with, such as a system prompt, is there once; a chat
is the name of its last block. What no chat leads to is deleted. Numbers carry a hash of their own: what is damaged is
computed again, and a damaged file made anew. All this is no more than a cache: the words of a chat are in the library.

Shape suffixes: L layers, G key/value heads, S tokens, d head_dim.
"""

import hashlib
import sqlite3
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from herd.api import Model
from herd.engine import Block, Prefixes
from herd.engine.prefixes import common

T = TypeVar("T")
LIMIT = 8 << 30  # bytes of the file; the chats that went on longest ago are then given up
_HASH_BYTES = 32
_WAIT_S = 30.0  # for another process that writes
_SCHEMA = """
PRAGMA page_size = 16384;
PRAGMA auto_vacuum = FULL;
CREATE TABLE IF NOT EXISTS block (
    key BLOB, before BLOB, names BLOB, global_kv BLOB, local_kv BLOB, PRIMARY KEY (key, before)
);
CREATE INDEX IF NOT EXISTS following ON block (before);
CREATE TABLE IF NOT EXISTS chat (id TEXT PRIMARY KEY, last BLOB, used REAL);
"""
_SWEEP = """
WITH RECURSIVE live (key) AS (
    SELECT last FROM chat UNION SELECT before FROM block JOIN live USING (key)
)
DELETE FROM block WHERE key NOT IN live
"""


class Conversations:
    """Of one model, in one folder. Safe to share between threads."""

    def __init__(self, folder: Path, model: Model, limit: int = LIMIT) -> None:
        """limit: bytes that the file may take."""
        cfg, dtype = model.config, model.transformer.memory_dtype
        packed = model.transformer.packed is not None
        self._file, self._limit, self._cfg, self._dtype = folder / "kv.sqlite", limit, cfg, dtype
        self._blocks = Prefixes(cfg, dtype, packed=packed)  # which knows where blocks end
        self._root = _hash(f"{model.fingerprint} {dtype} {packed}".encode())
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        for old in (*folder.glob("*.kv"), *folder.glob("*.part")):  # of earlier versions, which computed the same
            old.unlink(missing_ok=True)

    def load(self, names: Sequence[int], known: int) -> tuple[list[int], list[Block]]:
        """What is kept of these tokens beyond the first `known`: all tokens up to its end, and the blocks that these
        `Prefixes.add`. Nothing if there is no more."""

        def work(db: sqlite3.Connection) -> tuple[list[int], list[Block]]:
            found = self._find(db, names)
            stop = self._blocks.reach(
                [block for _, block in found], sum(common(b.names, names[b.start :]) for _, b in found)
            )
            if stop <= known:
                return [], []
            begin, whole = min(known, self._blocks.begin(stop)), list[Block]()
            for key, block in found:
                if block.start >= stop:
                    break
                if block.stop > begin and not self._read(db, key, block, local=block.start >= self._blocks.begin(stop)):
                    break
                whole.append(block)
            return [name for block in whole for name in block.names], [b for b in whole if b.global_kv.numel()]

        return self._do(work)

    def write(self, chat: str, blocks: Sequence[Block]) -> None:
        """Let a chat go on behind blocks that follow each other from the first position on. It is then on disk."""

        def work(db: sqlite3.Connection) -> None:
            key, keys = self._root, list[bytes]()
            for block in blocks:
                before, key = key, _name(key, block.names)
                keys.append(key)
                self._write(db, key, before, block)
            self._thin(db, keys, blocks)
            db.execute("INSERT OR REPLACE INTO chat VALUES (?, ?, ?)", (chat, key, time.time()))
            db.execute(_SWEEP)
            self._make_room(db, chat)

        if blocks:
            self._do(work)

    def forget(self, chat: str) -> None:
        """Delete what is kept of a chat, as far as no other one begins the same."""

        def work(db: sqlite3.Connection) -> None:
            db.execute("DELETE FROM chat WHERE id = ?", (chat,))
            db.execute(_SWEEP)

        self._do(work)

    # The file

    def _do(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Work on the file as one transaction; on an empty one in its place if it is damaged."""
        with self._lock:
            try:
                with self._open() as db:
                    return work(db)
            except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
                # Of operations, only one that the tables have no place for means damage; others such as a full disk.
                if isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode != sqlite3.SQLITE_ERROR:
                    raise
                for file in (self._file, Path(f"{self._file}-journal")):
                    file.unlink(missing_ok=True)
                with self._open() as db:
                    return work(db)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        db = sqlite3.connect(self._file, timeout=_WAIT_S, check_same_thread=False)
        try:
            db.executescript(_SCHEMA)
            db.execute("PRAGMA secure_delete = ON")
            with db:
                yield db
        finally:
            db.close()

    def _find(self, db: sqlite3.Connection, names: Sequence[int]) -> list[tuple[bytes, Block]]:
        """Keys and blocks that these tokens begin with, without their numbers."""
        found, key, at = list[tuple[bytes, Block]](), self._root, 0
        while at < len(names):
            wanted = tuple(names[at : self._blocks.end(at)])
            rows = db.execute(
                "SELECT key, names, local_kv IS NULL, rowid FROM block WHERE key = ?", (_name(key, wanted),)
            )
            row = rows.fetchone() or max(
                db.execute("SELECT key, names, local_kv IS NULL, rowid FROM block WHERE before = ?", (key,)),
                key=lambda row: common(_ids(row[1]), wanted),
                default=None,
            )
            its = () if row is None else _ids(row[1])
            if row is not None and row[0] != _name(key, its):  # damaged
                db.execute("DELETE FROM block WHERE rowid = ?", (row[3],))
                break
            if row is None or not common(its, wanted):
                break
            key, bare = row[0], torch.empty(0)
            found.append((key, Block(its, at, bare, None if row[2] else bare)))
            at += len(its)
            if its != wanted:
                break
        return found

    def _read(self, db: sqlite3.Connection, key: bytes, block: Block, *, local: bool) -> bool:
        """Read the numbers of a block; False if they are damaged: it is then deleted."""
        columns = "global_kv, local_kv" if local else "global_kv, NULL"
        global_kv, local_kv = db.execute(f"SELECT {columns} FROM block WHERE key = ?", (key,)).fetchone()
        cfg, tokens = self._cfg, len(block.names)
        shape = (-1, 2, cfg.num_key_value_heads, tokens, cfg.head_dim)
        opened = [_opened(key, data) for data in (global_kv, local_kv) if data is not None]
        try:
            parts = [
                torch.frombuffer(data, dtype=self._dtype).view(shape) if data else torch.empty(0) for data in opened
            ]
        except (TypeError, RuntimeError, ValueError):
            parts = []
        if not parts or None in opened or [len(part) for part in parts] != self._blocks.layers[: len(parts)]:
            db.execute("DELETE FROM block WHERE key = ?", (key,))
            return False
        block.global_kv, block.local_kv = parts[0], parts[1] if local and len(parts) > 1 else None
        return True

    def _write(self, db: sqlite3.Connection, key: bytes, before: bytes, block: Block) -> None:
        row = db.execute("SELECT local_kv IS NULL FROM block WHERE key = ?", (key,)).fetchone()
        local_kv = None if block.local_kv is None else _sealed(key, block.local_kv)
        if row is None:
            values = (key, before, array("q", block.names).tobytes(), _sealed(key, block.global_kv), local_kv)
            db.execute("INSERT INTO block VALUES (?, ?, ?, ?, ?)", values)
        elif row[0] and local_kv is not None:
            db.execute("UPDATE block SET local_kv = ? WHERE key = ?", (local_kv, key))

    def _thin(self, db: sqlite3.Connection, keys: Sequence[bytes], blocks: Sequence[Block]) -> None:
        """See `Prefixes`: what local layers looked at in chunks that a chat has left behind."""
        begin, chunk = self._blocks.begin(blocks[-1].start), self._cfg.attention_chunk_size or 0
        for key, block in reversed([*zip(keys, blocks, strict=True)][:-1]):
            others = db.execute("SELECT count(*) FROM block WHERE before = ?", (key,)).fetchone()[0]
            if others > 1 or block.start < chunk:
                break
            if block.start < begin:
                db.execute("UPDATE block SET local_kv = NULL WHERE key = ? AND local_kv IS NOT NULL", (key,))

    def _make_room(self, db: sqlite3.Connection, newest: str) -> None:
        """Forget the chats that went on longest ago where all is more than it may be."""
        size = db.execute("PRAGMA page_size").fetchone()[0]
        oldest = db.execute("SELECT id FROM chat WHERE id != ? ORDER BY used", (newest,)).fetchall()
        for (chat,) in oldest:
            pages, free = (db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count"))
            if (pages - free) * size <= self._limit:
                return
            db.execute("DELETE FROM chat WHERE id = ?", (chat,))
            db.execute(_SWEEP)


def _hash(*parts: bytes | bytearray) -> bytes:
    found = hashlib.blake2b(digest_size=_HASH_BYTES)
    for part in parts:
        found.update(part)
    return found.digest()


def _name(before: bytes, names: Sequence[int]) -> bytes:
    """Key of the block of these tokens behind another one."""
    return _hash(before, array("q", names).tobytes())


def _ids(names: bytes) -> tuple[int, ...]:
    return tuple(array("q", names)) if len(names) % 8 == 0 else ()


def _sealed(key: bytes, kv_L2GSd: Tensor) -> bytes:
    data = kv_L2GSd.contiguous().view(torch.uint8).numpy().tobytes()
    return _hash(key, data) + data


def _opened(key: bytes, sealed: bytes) -> bytearray | None:
    """What was sealed; None if it is not that any more."""
    data = bytearray(memoryview(sealed)[_HASH_BYTES:])
    return data if _hash(key, data) == sealed[:_HASH_BYTES] else None
