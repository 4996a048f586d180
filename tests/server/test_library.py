"""The library: what was acknowledged is there, whatever happens to the process; copies are whole or refused."""

import io
import json
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import herd
from herd.errors import HerdError, LibraryError
from herd.server import exports
from herd.server.database import FILE
from herd.server.library import Library, Unknown

WRITER = """
import sys
from herd.server.library import Library
library = Library(sys.argv[1], serve=True)
chat = library.new_chat("killed")
_, answer = library.add_turn(chat.id, "first")
for number in range(1_000_000):
    message = library.add_message(chat.id, "user", f"said {number}")
    print(message.id, message.content, flush=True)
    library.write(answer.id, "so far" * number)
"""


@pytest.fixture
def library(tmp_path: Path) -> Iterator[Library]:
    opened = Library(tmp_path / "data")
    yield opened
    opened.close()


def test_a_kill_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", WRITER, tmp_path], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(50)]
        with pytest.raises(LibraryError, match=f"served by process {process.pid}; stop it, or name another folder"):
            Library(tmp_path, serve=True)
        os.kill(process.pid, signal.SIGKILL)
        lines += process.stdout.readlines()
        process.wait()
        library = Library(tmp_path, serve=True)
        stored = {str(m.id): m for chat in library.chats() for m in library.messages(chat.id)}
        for line in lines:
            if line.endswith("\n"):  # the last one may have been cut
                id, _, content = line[:-1].partition(" ")
                assert stored[id].content == content
        states = {m.state for m in stored.values() if m.role == "assistant"}
        assert states == {"stopped"}, "answers that nobody writes any more are not shown as being written"
        library.close()


def test_chats_and_messages(library: Library) -> None:
    chat = library.new_chat("one")
    _, answer = library.add_turn(chat.id, "question")
    assert [(m.role, m.content, m.state) for m in library.messages(chat.id)] == [
        ("user", "question", "done"),
        ("assistant", "", "writing"),
    ]
    library.write(answer.id, "answer", "done", {"tokens": 3})
    assert library.message(answer.id).detail == {"tokens": 3}
    assert library.chats()[0].changed >= chat.changed
    assert library.change_chat(chat.id, title="two").title == "two"
    for n in range(10):
        library.add_message(chat.id, "user", str(n))
    last = library.messages(chat.id, most=3)
    assert [m.content for m in last] == ["7", "8", "9"]
    assert [m.content for m in library.messages(chat.id, before=last[0].id, most=2)] == ["5", "6"]
    library.cut(chat.id, answer.id)
    assert [m.content for m in library.messages(chat.id)] == ["question"]
    library.delete_chat(chat.id)
    assert library.chats() == []
    library.write(answer.id, "late", "done")  # an answer to a chat that is gone
    for gone in (lambda: library.chat(chat.id), lambda: library.messages(chat.id), lambda: library.message(answer.id)):
        with pytest.raises(Unknown, match="it may have been deleted"):
            gone()


def test_contexts_and_settings(library: Library) -> None:
    entry = library.new_context("docs", "some/folder")
    assert entry.watches == os.path.abspath("some/folder")
    chat = library.new_chat(context=entry.id)
    with pytest.raises(Unknown):
        library.new_chat(context="../etc")
    assert library.rename_context(entry.id, "papers").name == "papers"
    assert library.context_folder(entry.id).parent == library.folder / "contexts"
    library.delete_context(entry.id)
    assert library.chat(chat.id).context is None, "a chat outlives its context"
    library.set({"temperature": 0.5, "theme": "dark"})
    library.set({"theme": None})
    assert library.settings() == {"temperature": 0.5}


def test_files_that_are_no_library(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"no database" * 100)
    with pytest.raises(LibraryError, match=r"is damaged .* import an export"):
        Library(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(LibraryError, match="name another folder"):
        Library(tmp_path / "file")


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@settings(max_examples=10)
@given(st.lists(st.tuples(TEXT, st.lists(TEXT, max_size=4)), max_size=4), st.dictionaries(TEXT, st.integers() | TEXT))
def test_an_export_is_imported_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, chats: list[tuple[str, list[str]]], options: dict[str, Any]
) -> None:
    folder = tmp_path_factory.mktemp("library")
    first, second = Library(folder / "a"), Library(folder / "b")
    for title, contents in chats:
        chat = first.new_chat(title, first.new_context(title).id)
        for content in contents:
            first.add_message(chat.id, "user", content, detail={"note": content})
    first.set(options)
    exports.export(first, folder / "all.zip")
    exports.import_(second, folder / "all.zip")
    exports.import_(second, folder / "all.zip")  # once more, beside what is there
    assert _plain(second) == sorted(_plain(first) * 2)
    assert second.settings() == first.settings()
    first.close()
    second.close()


def _plain(library: Library) -> list[Any]:
    """Chats without their ids."""
    chats = [(c, library.messages(c.id), library.context(c.context)) for c in library.chats() if c.context]
    return sorted((c.title, c.created, e.name, [(m.content, m.detail) for m in messages]) for c, messages, e in chats)


def test_contexts_come_with_an_export(tmp_path: Path, library: Library, tiny_model: Path) -> None:
    entry = library.new_context("docs")
    notes = tmp_path / "notes.txt"
    notes.write_text("The code of the gate is 4711.\n")
    model = herd.load(tiny_model)
    context = herd.Context.open(library.context_folder(entry.id) / "kv", model)
    context.read([notes])
    exports.export(library, tmp_path / "all.zip")
    other = Library(tmp_path / "other")
    exports.import_(other, tmp_path / "all.zip")
    (copied,) = other.contexts()
    opened = herd.Context.open(other.context_folder(copied.id) / "kv", model)
    assert opened.ask("What is the code?").text == context.ask("What is the code?").text
    with pytest.raises(LibraryError, match="exists; name a new file"):
        exports.export(library, tmp_path / "all.zip")


def packed(rows: Any, **members: bytes) -> io.BytesIO:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as zipped:
        zipped.writestr("library.json", rows if isinstance(rows, str) else json.dumps(rows))
        for name, data in members.items():
            zipped.writestr(name, data)
    return file


EMPTY: dict[str, Any] = {"format": 1, "contexts": [], "chats": [], "messages": [], "settings": {}}
CHAT = {"id": "a", "title": "t", "context": None, "created": 1, "changed": 1}
MESSAGE = {"id": 1, "chat": "a", "role": "user", "content": "c", "state": "done", "detail": {}, "created": 1}


@pytest.mark.parametrize(
    "file",
    [
        io.BytesIO(b"no zip"),
        packed("[" * 100_000),
        packed({**EMPTY, "format": 3}),
        packed({**EMPTY, "chats": {}}),
        packed({**EMPTY, "chats": [CHAT, CHAT]}),
        packed({**EMPTY, "chats": [{**CHAT, "context": "../.."}]}),
        packed({**EMPTY, "chats": [{**CHAT, "title": 1}]}),
        packed({**EMPTY, "chats": [{**CHAT, "more": 1}]}),
        packed({**EMPTY, "messages": [MESSAGE]}),
        packed({**EMPTY, "chats": [CHAT], "messages": [{**MESSAGE, "role": "root"}]}),
        packed({**EMPTY, "chats": [CHAT], "messages": [{**MESSAGE, "created": 2**80}]}),
        packed({**EMPTY, "chats": [CHAT], "messages": [{**MESSAGE, "created": True}]}),
        packed(EMPTY, **{"contexts/../../x.tar": b""}),
    ],
)
def test_what_is_no_export_is_refused_and_changes_nothing(library: Library, file: io.BytesIO) -> None:
    before = library.rows()
    with pytest.raises(HerdError, match="nothing was imported"):
        exports.import_(library, file)
    assert library.rows() == replace(before) and not list(library.folder.glob("tmp*"))


def test_a_damaged_context_in_an_export_is_refused(tmp_path: Path, library: Library, tiny_model: Path) -> None:
    entry = library.new_context("docs")
    (notes := tmp_path / "notes.txt").write_text("The code of the gate is 4711.\n")
    herd.Context.open(library.context_folder(entry.id) / "kv", herd.load(tiny_model)).read([notes])
    exports.export(library, tmp_path / "all.zip")
    data = bytearray((tmp_path / "all.zip").read_bytes())
    with zipfile.ZipFile(tmp_path / "all.zip") as zipped:
        member = next(info for info in zipped.infolist() if info.filename.endswith(".tar"))
    data[member.header_offset + member.file_size // 2] ^= 1
    other = Library(tmp_path / "other")
    with pytest.raises(HerdError):
        exports.import_(other, io.BytesIO(bytes(data)))
    assert other.chats() == other.contexts() == [] and not any((other.folder / "contexts").iterdir())
