"""What a server remembers: chats, contexts and settings in one SQLite file, `herd.sqlite` in its data folder.

A message that was acknowledged is on disk (WAL, synchronous FULL). Contexts are folders of their own beside the file;
here stands that they are there, their names and what they watch. Any number of processes may use a library; one of them
serves it.
"""

import fcntl
import json
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from herd.errors import LibraryError

FILE, CONTEXTS, _LOCK = "herd.sqlite", "contexts", "serving"
_FORMAT = 1
_SCHEMA = """
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
CREATE TABLE setting (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
"""
_ADD = "INSERT INTO message (chat, role, content, state, detail, created) VALUES (?, ?, ?, ?, ?, ?)"

Role = Literal["system", "user", "assistant"]
State = Literal["done", "writing", "stopped", "failed"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")
STATES: tuple[State, ...] = ("done", "writing", "stopped", "failed")


class Unknown(LibraryError):
    """There is no such chat, message or context, maybe no longer."""


@dataclass(frozen=True)
class ContextEntry:
    """A context by its id, which is also the name of its folder. watches: the folder that it is kept up to date with,
    None if its sources are uploaded. Times are milliseconds since 1970."""

    id: str
    name: str
    watches: str | None
    created: int


@dataclass(frozen=True)
class Chat:
    """A conversation; with a context, each of its questions is asked about that."""

    id: str
    title: str
    context: str | None
    created: int
    changed: int


@dataclass(frozen=True)
class Message:
    """One turn. state: an answer is "writing" until it is "done", "stopped" by somebody or "failed".

    detail: what else is known of it, as JSON: citations, tokens, seconds, the error.
    """

    id: int
    chat: str
    role: Role
    content: str
    state: State = "done"
    detail: dict[str, Any] = field(default_factory=dict)
    created: int = 0


@dataclass(frozen=True)
class Rows:
    """All that a library holds."""

    contexts: list[ContextEntry]
    chats: list[Chat]
    messages: list[Message]
    settings: dict[str, Any]


class Library:
    """One data folder. Safe to share between threads."""

    def __init__(self, folder: str | Path, *, serve: bool = False) -> None:
        """Open a library, made if the folder has none. serve: as the one process that writes answers in it; answers
        that an earlier one left unfinished are then stopped. LibraryError if the file is damaged, of another format, or
        served by another process."""
        self.folder = Path(folder)
        self._mutex = threading.RLock()
        self._serving: int | None = None
        with self._plain():
            (self.folder / CONTEXTS).mkdir(parents=True, exist_ok=True)
            if serve:
                self._serving = _lock(self.folder)
            file = self.folder / FILE
            self._db = sqlite3.connect(file, isolation_level=None, timeout=30, check_same_thread=False)
            try:
                self._prepare()
            except BaseException:
                self.close()
                raise

    def _prepare(self) -> None:
        for pragma in ("trusted_schema = OFF", "foreign_keys = ON", "journal_mode = WAL", "synchronous = FULL"):
            self._db.execute(f"PRAGMA {pragma}")
        self._db.row_factory = sqlite3.Row
        with self._writing():
            found = self._db.execute("PRAGMA user_version").fetchone()[0]
            if found == 0:
                for statement in _SCHEMA.split(";"):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version = {_FORMAT}")
            elif found != _FORMAT:
                raise LibraryError(f"{self.folder / FILE} has format {found}; this version of Herd reads {_FORMAT}")
            if self._serving is not None:
                self._db.execute("UPDATE message SET state = 'stopped' WHERE state = 'writing'")

    def close(self) -> None:
        """What was committed is safe without it, too."""
        with self._mutex, suppress(sqlite3.Error):
            self._db.close()
        if self._serving is not None:
            os.close(self._serving)
            self._serving = None

    # Chats

    def new_chat(self, title: str = "", context: str | None = None) -> Chat:
        """A chat without messages."""
        now = _now()
        chat = Chat(secrets.token_hex(8), title, context, now, now)
        with self._writing():
            if context is not None:
                self.context(context)
            self._insert("chat", chat)
        return chat

    def chats(self) -> list[Chat]:
        """All chats, the one that changed last first."""
        return [Chat(**row) for row in self._rows("SELECT * FROM chat ORDER BY changed DESC, id")]

    def chat(self, id: str) -> Chat:
        """Unknown if it is not there."""
        return Chat(**self._one("chat", id))

    def change_chat(self, id: str, *, title: str | None = None, context: str | None = None) -> Chat:
        """Give a chat another title, or another context ("" for none); None leaves what is there."""
        with self._writing():
            chat = self.chat(id)
            if context:
                self.context(context)
            values = (chat.title if title is None else title, chat.context if context is None else context or None, id)
            self._db.execute("UPDATE chat SET title = ?, context = ? WHERE id = ?", values)
            return self.chat(id)

    def delete_chat(self, id: str) -> None:
        """With all its messages."""
        with self._writing():
            self.chat(id)
            self._db.execute("DELETE FROM chat WHERE id = ?", (id,))

    # Messages

    def add_message(
        self, chat: str, role: Role, content: str, state: State = "done", detail: Mapping[str, Any] | None = None
    ) -> Message:
        """Put a message behind the others of a chat. It is on disk when this returns."""
        with self._writing():
            self.chat(chat)
            now = _now()
            values = (chat, role, content, state, _json(detail or {}), now)
            id = self._db.execute(_ADD, values).lastrowid
            self._db.execute("UPDATE chat SET changed = ? WHERE id = ?", (now, chat))
            assert id is not None
            return self.message(id)

    def add_turn(self, chat: str, content: str | None, cut: int | None = None) -> tuple[Message | None, Message]:
        """A question (None: it stands there already) and the empty answer that will be written to it; cut: in place of
        a message and all after it. All of that or nothing."""
        with self._writing():
            if cut is not None:
                self.cut(chat, cut)
            question = None if content is None else self.add_message(chat, "user", content)
            return question, self.add_message(chat, "assistant", "", "writing")

    def message(self, id: int) -> Message:
        """Unknown if it is not there."""
        return _message(self._one("message", id))

    def messages(self, chat: str, *, before: int | None = None, most: int | None = None) -> list[Message]:
        """The last `most` messages of a chat (None: all) that come before another (None: the end), in order."""
        self.chat(chat)
        rows = self._rows(
            "SELECT * FROM message WHERE chat = ? AND id < ? ORDER BY id DESC LIMIT ?",
            (chat, 2**63 - 1 if before is None else before, -1 if most is None else most),
        )
        return [_message(row) for row in reversed(rows)]

    def write(self, id: int, content: str, state: State = "writing", detail: Mapping[str, Any] | None = None) -> None:
        """What has been written of an answer. One that is deleted meanwhile stays so."""
        with self._writing():
            values = (content, state, _json(detail or {}), id)
            self._db.execute("UPDATE message SET content = ?, state = ?, detail = ? WHERE id = ?", values)

    def cut(self, chat: str, first: int) -> None:
        """Delete a message and all after it."""
        with self._writing():
            if self.message(first).chat != chat:
                raise Unknown(f"chat {chat} has no message {first}")
            self._db.execute("DELETE FROM message WHERE chat = ? AND id >= ?", (chat, first))

    # Contexts

    def new_context(self, name: str, watches: str | Path | None = None) -> ContextEntry:
        """An entry; its folder is made by what reads into it."""
        watched = None if watches is None else os.path.abspath(watches)
        entry = ContextEntry(secrets.token_hex(8), name, watched, _now())
        with self._writing():
            self._insert("context", entry)
        return entry

    def contexts(self) -> list[ContextEntry]:
        """All contexts, the newest first."""
        return [ContextEntry(**row) for row in self._rows("SELECT * FROM context ORDER BY created DESC, id")]

    def context(self, id: str) -> ContextEntry:
        """Unknown if it is not there."""
        return ContextEntry(**self._one("context", id))

    def context_folder(self, id: str) -> Path:
        """Where a context is kept: `kv` is the context, `files` what was uploaded into it."""
        return self.folder / CONTEXTS / self.context(id).id

    def rename_context(self, id: str, name: str) -> ContextEntry:
        """Give it another name."""
        with self._writing():
            self.context(id)
            self._db.execute("UPDATE context SET name = ? WHERE id = ?", (name, id))
            return self.context(id)

    def delete_context(self, id: str) -> None:
        """Forget a context. Its chats stay; the caller removes the folder."""
        with self._writing():
            self.context(id)
            self._db.execute("DELETE FROM context WHERE id = ?", (id,))

    # Settings

    def settings(self) -> dict[str, Any]:
        """All that were set."""
        return {row["name"]: json.loads(row["value"]) for row in self._rows("SELECT * FROM setting")}

    def set(self, values: Mapping[str, Any]) -> None:
        """Set some; None takes one away."""
        with self._writing():
            for name, value in values.items():
                if value is None:
                    self._db.execute("DELETE FROM setting WHERE name = ?", (name,))
                else:
                    self._db.execute("INSERT OR REPLACE INTO setting VALUES (?, ?)", (name, _json(value)))

    # Copies

    def rows(self) -> Rows:
        """All of it, as of one moment."""
        with self._writing():
            messages = [_message(row) for row in self._rows("SELECT * FROM message ORDER BY id")]
            return Rows(self.contexts(), self.chats(), messages, self.settings())

    def add(self, rows: Rows, place: Callable[[dict[str, str]], None]) -> None:
        """Add the rows of another library under new ids, all or nothing; settings that are there stay.

        The rows name no chats and contexts but their own. place: told the new id of each context, puts their folders
        where they belong, before anything is committed.
        """
        contexts = {entry.id: secrets.token_hex(8) for entry in rows.contexts}
        chats = {chat.id: secrets.token_hex(8) for chat in rows.chats}
        with self._writing():
            for entry in rows.contexts:
                self._insert("context", ContextEntry(contexts[entry.id], entry.name, None, entry.created))
            for chat in rows.chats:
                context = None if chat.context is None else contexts[chat.context]
                self._insert("chat", Chat(chats[chat.id], chat.title, context, chat.created, chat.changed))
            for m in rows.messages:
                state = "stopped" if m.state == "writing" else m.state
                self._db.execute(_ADD, (chats[m.chat], m.role, m.content, state, _json(m.detail), m.created))
            self.set({name: value for name, value in rows.settings.items() if name not in self.settings()})
            place(contexts)

    # SQL

    @contextmanager
    def together(self) -> Iterator[None]:
        """All that is changed inside is on disk at its end, or nothing of it. Other threads wait."""
        with self._writing():
            yield

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

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A transaction; within another one, a part of that."""
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

    def _rows(self, sql: str, values: tuple[Any, ...] = ()) -> list[dict[str, Any]]:
        with self._plain(), self._mutex:
            return [dict(row) for row in self._db.execute(sql, values)]

    def _one(self, table: str, id: str | int) -> dict[str, Any]:
        if not (rows := self._rows(f"SELECT * FROM {table} WHERE id = ?", (id,))):
            raise Unknown(f"there is no {table} {id!r}; it may have been deleted")
        return rows[0]

    def _insert(self, table: str, row: Any) -> None:
        values = asdict(row)
        self._db.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(values))})", tuple(values.values()))


def _message(row: dict[str, Any]) -> Message:
    return Message(**{**row, "detail": json.loads(row["detail"])})


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _now() -> int:
    return time.time_ns() // 1_000_000


def _lock(folder: Path) -> int:
    """Hold the folder as its server; the system lets go when the process dies."""
    fd = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
        os.close(fd)
        raise LibraryError(f"{folder} is served by process {owner or '?'}; stop it, or name another folder") from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd
