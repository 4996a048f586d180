"""What a server remembers: chats, contexts and settings in one SQLite file, `herd.sqlite` in its data folder.

Contexts are folders of their own beside the file; here stands that they are there, their names and what they watch.
Images of messages are in the file, too, and go with their messages.
"""

import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from herd.errors import LibraryError
from herd.server.database import Database

CONTEXTS = "contexts"
_DRAFT_MS = 24 * 3600 * 1000
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

    detail: what else is known of it, as JSON: its images, citations, tokens, seconds, the error.
    """

    id: int
    chat: str
    role: Role
    content: str
    state: State = "done"
    detail: dict[str, Any] = field(default_factory=dict)
    created: int = 0

    @property
    def images(self) -> list[str]:
        """Ids of the images that it shows (`Library.image`), in their order."""
        return _images(self.detail)


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
        self._db = Database(self.folder, serve=serve)
        try:
            with self._db.writing():
                (self.folder / CONTEXTS).mkdir(exist_ok=True)
                if serve:
                    self._db.execute("UPDATE message SET state = 'stopped' WHERE state = 'writing'")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """What was committed is safe without it, too."""
        self._db.close()

    # Chats

    def new_chat(self, title: str = "", context: str | None = None) -> Chat:
        """A chat without messages."""
        now = _now()
        chat = Chat(secrets.token_hex(8), title, context, now, now)
        with self._db.writing():
            if context is not None:
                self.context(context)
            self._db.insert("chat", chat)
        return chat

    def chats(self) -> list[Chat]:
        """All chats, the one that changed last first."""
        return [Chat(**row) for row in self._db.rows("SELECT * FROM chat ORDER BY changed DESC, id")]

    def chat(self, id: str) -> Chat:
        """Unknown if it is not there."""
        return Chat(**self._one("chat", id))

    def change_chat(self, id: str, *, title: str | None = None, context: str | None = None) -> Chat:
        """Give a chat another title, or another context ("" for none); None leaves what is there."""
        with self._db.writing():
            chat = self.chat(id)
            if context:
                self.context(context)
            values = (chat.title if title is None else title, chat.context if context is None else context or None, id)
            self._db.execute("UPDATE chat SET title = ?, context = ? WHERE id = ?", values)
            return self.chat(id)

    def delete_chat(self, id: str) -> None:
        """With all its messages."""
        with self._db.writing():
            self.chat(id)
            self._db.execute("DELETE FROM chat WHERE id = ?", (id,))

    # Messages

    def add_message(
        self, chat: str, role: Role, content: str, state: State = "done", detail: Mapping[str, Any] | None = None
    ) -> Message:
        """Put a message behind the others of a chat. It is on disk when this returns, and the images that its detail
        names are its own. Unknown if one of them is nowhere."""
        with self._db.writing():
            self.chat(chat)
            now = _now()
            values = (chat, role, content, state, _json(detail or {}), now)
            id = self._db.execute(_ADD, values)
            images = _images(detail or {})
            self._hold(images)
            for image in images:
                self._db.execute("UPDATE image SET message = ? WHERE id = ? AND message IS NULL", (id, image))
            self._db.execute("UPDATE chat SET changed = ? WHERE id = ?", (now, chat))
            return self.message(id)

    def add_turn(
        self, chat: str, content: str | None, cut: int | None = None, detail: Mapping[str, Any] | None = None
    ) -> tuple[Message | None, Message]:
        """A question (None: it stands there already) and the empty answer that will be written to it; cut: in place of
        a message and all after it. All of that or nothing. detail: of the question."""
        with self._db.writing():
            self._hold(_images(detail or {}))  # they may be those of a message that is cut
            if cut is not None:
                self.cut(chat, cut)
            question = None if content is None else self.add_message(chat, "user", content, detail=detail)
            return question, self.add_message(chat, "assistant", "", "writing")

    def message(self, id: int) -> Message:
        """Unknown if it is not there."""
        return _message(self._one("message", id))

    def messages(self, chat: str, *, before: int | None = None, most: int | None = None) -> list[Message]:
        """The last `most` messages of a chat (None: all) that come before another (None: the end), in order."""
        self.chat(chat)
        rows = self._db.rows(
            "SELECT * FROM message WHERE chat = ? AND id < ? ORDER BY id DESC LIMIT ?",
            (chat, 2**63 - 1 if before is None else before, -1 if most is None else most),
        )
        return [_message(row) for row in reversed(rows)]

    def write(self, id: int, content: str, state: State = "writing", detail: Mapping[str, Any] | None = None) -> None:
        """What has been written of an answer. One that is deleted meanwhile stays so."""
        with self._db.writing():
            values = (content, state, _json(detail or {}), id)
            self._db.execute("UPDATE message SET content = ?, state = ?, detail = ? WHERE id = ?", values)

    def cut(self, chat: str, first: int) -> None:
        """Delete a message and all after it."""
        with self._db.writing():
            if self.message(first).chat != chat:
                raise Unknown(f"chat {chat} has no message {first}")
            self._db.execute("DELETE FROM message WHERE chat = ? AND id >= ?", (chat, first))

    # Images

    def add_image(self, kind: str, data: bytes) -> str:
        """Keep an image for a message that will name it; its id, which says what it holds. One that no message names
        within a day is forgotten. kind: its media type."""
        id, now = image_id(data), _now()
        with self._db.writing():
            self._db.execute("DELETE FROM image WHERE message IS NULL AND created < ?", (now - _DRAFT_MS,))
            values = (id, kind, data, now)
            self._db.execute("INSERT OR IGNORE INTO image (id, kind, data, created) VALUES (?, ?, ?, ?)", values)
        return id

    def image(self, id: str) -> tuple[str, bytes]:
        """Kind and data of an image. Unknown if it is not there."""
        if not (rows := self._db.rows("SELECT kind, data FROM image WHERE id = ? LIMIT 1", (id,))):
            raise _no_image(id)
        return rows[0]["kind"], rows[0]["data"]

    def _hold(self, ids: Sequence[str]) -> None:
        """Have images that wait for their message, copied if others have them. Unknown if one is not there."""
        for id in ids:
            if not self._db.rows("SELECT 1 FROM image WHERE id = ? LIMIT 1", (id,)):
                raise _no_image(id)
            copy = "INSERT OR IGNORE INTO image (id, kind, data, created) SELECT id, kind, data, ? FROM image"
            self._db.execute(f"{copy} WHERE id = ? LIMIT 1", (_now(), id))

    # Contexts

    def new_context(self, name: str, watches: str | Path | None = None) -> ContextEntry:
        """An entry; its folder is made by what reads into it."""
        watched = None if watches is None else os.path.abspath(watches)
        entry = ContextEntry(secrets.token_hex(8), name, watched, _now())
        with self._db.writing():
            self._db.insert("context", entry)
        return entry

    def contexts(self) -> list[ContextEntry]:
        """All contexts, the newest first."""
        return [ContextEntry(**row) for row in self._db.rows("SELECT * FROM context ORDER BY created DESC, id")]

    def context(self, id: str) -> ContextEntry:
        """Unknown if it is not there."""
        return ContextEntry(**self._one("context", id))

    def context_folder(self, id: str) -> Path:
        """Where a context is kept: `kv` is the context, `files` what was uploaded into it."""
        return self.folder / CONTEXTS / self.context(id).id

    def rename_context(self, id: str, name: str) -> ContextEntry:
        """Give it another name."""
        with self._db.writing():
            self.context(id)
            self._db.execute("UPDATE context SET name = ? WHERE id = ?", (name, id))
            return self.context(id)

    def delete_context(self, id: str) -> None:
        """Forget a context. Its chats stay; the caller removes the folder."""
        with self._db.writing():
            self.context(id)
            self._db.execute("DELETE FROM context WHERE id = ?", (id,))

    # Settings

    def settings(self) -> dict[str, Any]:
        """All that were set."""
        return {row["name"]: json.loads(row["value"]) for row in self._db.rows("SELECT * FROM setting")}

    def set(self, values: Mapping[str, Any]) -> None:
        """Set some; None takes one away."""
        with self._db.writing():
            for name, value in values.items():
                if value is None:
                    self._db.execute("DELETE FROM setting WHERE name = ?", (name,))
                else:
                    self._db.execute("INSERT OR REPLACE INTO setting VALUES (?, ?)", (name, _json(value)))

    # Copies

    def rows(self) -> Rows:
        """All of it, as of one moment."""
        with self._db.writing():
            messages = [_message(row) for row in self._db.rows("SELECT * FROM message ORDER BY id")]
            return Rows(self.contexts(), self.chats(), messages, self.settings())

    def add(
        self, rows: Rows, place: Callable[[dict[str, str]], None], image: Callable[[str], tuple[str, bytes]]
    ) -> None:
        """Add the rows of another library under new ids, all or nothing; settings that are there stay.

        The rows name no chats and contexts but their own. place: told the new id of each context, puts their folders
        where they belong, before anything is committed. image: kind and data of one that a message names.
        """
        contexts = {entry.id: secrets.token_hex(8) for entry in rows.contexts}
        chats = {chat.id: secrets.token_hex(8) for chat in rows.chats}
        with self._db.writing():
            for entry in rows.contexts:
                self._db.insert("context", ContextEntry(contexts[entry.id], entry.name, None, entry.created))
            for chat in rows.chats:
                context = None if chat.context is None else contexts[chat.context]
                self._db.insert("chat", Chat(chats[chat.id], chat.title, context, chat.created, chat.changed))
            for m in rows.messages:
                state = "stopped" if m.state == "writing" else m.state
                id = self._db.execute(_ADD, (chats[m.chat], m.role, m.content, state, _json(m.detail), m.created))
                for name in set(m.images):
                    add = "INSERT INTO image (id, message, kind, data, created) VALUES (?, ?, ?, ?, ?)"
                    self._db.execute(add, (name, id, *image(name), m.created))
            self.set({name: value for name, value in rows.settings.items() if name not in self.settings()})
            place(contexts)

    @contextmanager
    def together(self) -> Iterator[None]:
        """All that is changed inside is on disk at its end, or nothing of it. Other threads wait."""
        with self._db.writing():
            yield

    @property
    def version(self) -> int:
        """A number that is another one once others have written, such as `herd chat`."""
        return self._db.version

    @contextmanager
    def frozen(self) -> Iterator["Library"]:
        """The same library as it is at one moment, for as long as the block takes."""
        its = Library(self.folder)
        try:
            its._db.freeze()
            yield its
        finally:
            its.close()

    def _one(self, table: str, id: str | int) -> dict[str, Any]:
        if not (rows := self._db.rows(f"SELECT * FROM {table} WHERE id = ?", (id,))):
            raise Unknown(f"there is no {table} {id!r}; it may have been deleted")
        return rows[0]


def _message(row: dict[str, Any]) -> Message:
    return Message(**{**row, "detail": json.loads(row["detail"])})


def image_id(data: bytes) -> str:
    """The name of an image, by what its file holds."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _no_image(id: str) -> Unknown:
    return Unknown(f"there is no image {id[:100]!r}; it may have been deleted: bring it again")


def _images(detail: Mapping[str, Any]) -> list[str]:
    return [image["id"] for image in detail.get("images", ())]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _now() -> int:
    return time.time_ns() // 1_000_000
