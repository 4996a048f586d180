"""The SQLite file `herd.sqlite` of a data folder: its tables, transactions, and the lock of the process that serves it.

A message that was acknowledged is on disk (WAL, synchronous FULL). Any number of processes may use a file; one of them
serves it.
"""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from herd.errors import LibraryError
from herd.lock import hold

FILE, _LOCK = "herd.sqlite", "serving"
_FIRST = """
CREATE TABLE context (
  id TEXT PRIMARY KEY, name TEXT NOT NULL, watches TEXT, created INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE chat (
  id TEXT PRIMARY KEY, title TEXT NOT NULL, context TEXT REFERENCES context(id) ON DELETE SET NULL,
  created INTEGER NOT NULL, changed INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE INDEX chat_changed ON chat(changed);
CREATE TABLE message (
  id INTEGER PRIMARY KEY AUTOINCREMENT, chat TEXT NOT NULL REFERENCES chat(id) ON DELETE CASCADE,
  role TEXT NOT NULL, content TEXT NOT NULL, state TEXT NOT NULL, detail TEXT NOT NULL, created INTEGER NOT NULL
  ) STRICT;
CREATE INDEX message_chat ON message(chat, id);
CREATE TABLE setting (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID
"""
_IMAGES = """
CREATE TABLE image (
  row INTEGER PRIMARY KEY, id TEXT NOT NULL, message INTEGER REFERENCES message(id) ON DELETE CASCADE,
  kind TEXT NOT NULL, data BLOB NOT NULL, created INTEGER NOT NULL) STRICT;
CREATE UNIQUE INDEX image_once ON image(id, coalesce(message, 0));
CREATE INDEX image_message ON image(message)
"""
_STEPS = (_FIRST, _IMAGES)  # from one format to the next


class Database:
    """One file. Safe to share between threads."""

    def __init__(self, folder: Path, *, serve: bool) -> None:
        """Open it, made if the folder has none. serve: as the one process that serves it.

        LibraryError if it is damaged, of a later format, or served by another process.
        """
        self.folder = folder
        self._mutex = threading.RLock()
        self._serving = ExitStack()
        with self._plain():
            folder.mkdir(parents=True, exist_ok=True)
            if serve:
                self._serving.enter_context(hold(folder / _LOCK, partial(_served, folder)))
            self._db = sqlite3.connect(folder / FILE, isolation_level=None, timeout=30, check_same_thread=False)
            try:
                self._prepare()
            except BaseException:
                self.close()
                raise

    def _prepare(self) -> None:
        for pragma in ("trusted_schema = OFF", "foreign_keys = ON", "journal_mode = WAL", "synchronous = FULL"):
            self._db.execute(f"PRAGMA {pragma}")
        self._db.row_factory = sqlite3.Row
        with self.writing():
            found = self._db.execute("PRAGMA user_version").fetchone()[0]
            if found > len(_STEPS):
                raise LibraryError(f"{self.folder / FILE} has format {found}; this version of Herd reads {len(_STEPS)}")
            if found < len(_STEPS):
                for statement in ";".join(_STEPS[found:]).split(";"):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version = {len(_STEPS)}")

    def close(self) -> None:
        """What was committed is safe without it, too."""
        with self._mutex, suppress(sqlite3.Error):
            self._db.close()
        self._serving.close()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A transaction; within another one, a part of that. Other threads wait."""
        with self._plain(), self._mutex:
            if self._db.in_transaction:
                yield
                return
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):  # some errors have rolled back already
                    self._db.execute("ROLLBACK")
                raise

    @property
    def version(self) -> int:
        """A number that is another one once others have written, in this process or elsewhere."""
        return int(self.rows("PRAGMA data_version")[0]["data_version"])

    def freeze(self) -> None:
        """From the next read on, see all as it is then, whatever others write; for one that is closed soon."""
        with self._plain(), self._mutex:
            self._db.execute("BEGIN")

    def execute(self, sql: str, values: tuple[Any, ...] = ()) -> int:
        """Change something; the number of the row that was added."""
        with self._plain(), self._mutex:
            return self._db.execute(sql, values).lastrowid or 0

    def rows(self, sql: str, values: tuple[Any, ...] = ()) -> list[dict[str, Any]]:
        """What is found."""
        with self._plain(), self._mutex:
            return [dict(row) for row in self._db.execute(sql, values)]

    def insert(self, table: str, row: Any) -> None:
        """Add a dataclass whose fields are the columns."""
        values = asdict(row)
        self.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(values))})", tuple(values.values()))

    @contextmanager
    def _plain(self) -> Iterator[None]:
        """Turn what SQLite or the disk reports into one sentence with the fix."""
        file = self.folder / FILE
        try:
            yield
        except sqlite3.OperationalError as error:
            fix = "check its permissions and the disk's space, then repeat"
            raise LibraryError(f"{file}: {error}; what was committed is safe: {fix}") from error
        except sqlite3.DatabaseError as error:
            raise LibraryError(f"{file} is damaged ({error}); move it away, or import an export") from error
        except OSError as error:
            raise LibraryError(f"{self.folder}: {error.strerror or error}; name another folder") from error


def _served(folder: Path, owner: str) -> LibraryError:
    return LibraryError(f"{folder} is served by process {owner}; stop it, or name another folder")
