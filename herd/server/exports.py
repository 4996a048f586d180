"""A library as one zip file: `library.json`, images of messages, and contexts as `herd context export` writes them."""

import json
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from herd.context import archive
from herd.context.manifest import FILE
from herd.errors import LibraryError
from herd.server import images
from herd.server.errors import ApiError
from herd.server.library import ROLES, STATES, Chat, ContextEntry, Library, Message, Rows, image_id

FORMAT = 2  # of what is written; 1, which knew no images, is read too
MAX_ROWS_BYTES = 1 << 30  # of library.json, unpacked
_ROWS, _KV = "library.json", "kv"
_REFUSED = "nothing was imported"
_KINDS = {"str": str, "int": int, "str | None": (str, type(None)), "dict": dict, "Literal": str}


def export(library: Library, file: Path) -> int:
    """Write all chats, settings and contexts into a new zip file; its size in bytes."""
    if file.exists():
        raise LibraryError(f"{file} exists; name a new file")
    try:
        with _plain(file.parent), zipfile.ZipFile(file, "x", zipfile.ZIP_DEFLATED) as packed:
            with library.frozen() as still:
                rows = still.rows()
                packed.writestr(_ROWS, json.dumps({"format": FORMAT, **asdict(rows)}, ensure_ascii=False))
                for id in sorted(_named(rows)):
                    packed.writestr(f"images/{id}", still.image(id)[1], zipfile.ZIP_STORED)
            for entry in rows.contexts:
                folder = library.context_folder(entry.id) / _KV
                if (folder / FILE).is_file():
                    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
                        archive.export(folder, tar := Path(scratch) / "context.tar")
                        packed.write(tar, f"contexts/{entry.id}.tar", zipfile.ZIP_STORED)
    except BaseException:
        file.unlink(missing_ok=True)
        raise
    return file.stat().st_size


def import_(library: Library, file: Path | BinaryIO) -> Rows:
    """Add what another library exported, all of it under new ids, or nothing; what was added.

    Contexts answer as they are; they have no files to be read again. LibraryError or ContextError if it is no export.
    """
    with _plain(library.folder), _opened(file) as packed:
        rows = _checked(_json(packed))
        members = {name for name in packed.namelist() if name.startswith("contexts/")}
        if not members <= {f"contexts/{entry.id}.tar" for entry in rows.contexts}:
            raise LibraryError(f"this export holds contexts that it does not list; {_REFUSED}")
        shown = {name.removeprefix("images/") for name in packed.namelist() if name.startswith("images/")}
        if shown != _named(rows):
            raise LibraryError(f"this export lacks images of its messages, or holds others; {_REFUSED}")
        with tempfile.TemporaryDirectory(dir=library.folder) as scratch:
            folders = {name: _unpacked(packed, name, Path(scratch)) for name in sorted(members)}

            def place(contexts: dict[str, str]) -> None:
                for old, new in contexts.items():
                    if (folder := folders.get(f"contexts/{old}.tar")) is not None:
                        (to := library.context_folder(new)).mkdir(parents=True)
                        folder.rename(to / _KV)

            library.add(rows, place, partial(_image, packed))
    return rows


def _named(rows: Rows) -> set[str]:
    """Images that messages show."""
    return {id for message in rows.messages for id in message.images}


def _image(packed: zipfile.ZipFile, id: str) -> tuple[str, bytes]:
    """One image, checked, as `Library.add` takes it."""
    if packed.getinfo(f"images/{id}").file_size > images.MAX_BYTES:
        raise LibraryError(f"an image in this export has more than {images.MAX_BYTES:,} bytes; {_REFUSED}")
    data = packed.read(f"images/{id}")
    try:
        kind = images.sized(data).kind
    except ApiError as error:
        raise LibraryError(f"{error}; {_REFUSED}") from error
    if image_id(data) != id:
        raise LibraryError(f"an image in this export is not the one that a message names; {_REFUSED}")
    return kind, data


def _unpacked(packed: zipfile.ZipFile, name: str, scratch: Path) -> Path:
    """One context, checked."""
    tar, folder = scratch / "context.tar", scratch / str(len(list(scratch.iterdir())))
    with packed.open(name) as source, tar.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
    archive.import_(tar, folder)
    tar.unlink()
    return folder


@contextmanager
def _plain(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LibraryError(f"{folder}: {error.strerror or error}; mend that and repeat") from error


@contextmanager
def _opened(file: Path | BinaryIO) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(file) as packed:
            # Contexts are stored as they are: nothing grows by being unpacked but library.json, which has a cap.
            if any(i.compress_type != zipfile.ZIP_STORED for i in packed.infolist() if i.filename != _ROWS):
                raise LibraryError(f"this export was packed by another program; {_REFUSED}")
            yield packed
    except (zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise LibraryError(f"this is no zip file, or a damaged one ({error}); {_REFUSED}") from error


def _json(packed: zipfile.ZipFile) -> Any:
    try:
        if packed.getinfo(_ROWS).file_size > MAX_ROWS_BYTES:
            raise LibraryError(f"{_ROWS} in this export has more than {MAX_ROWS_BYTES:,} bytes; {_REFUSED}")
        return json.loads(packed.read(_ROWS))
    except KeyError:
        raise LibraryError(f"this zip file has no {_ROWS}; {_REFUSED}") from None
    except (ValueError, RecursionError) as error:
        raise LibraryError(f"{_ROWS} in this export is no JSON; {_REFUSED}") from error


def _checked(found: Any) -> Rows:
    """What `export` wrote. LibraryError if it is anything else."""
    if not isinstance(found, dict) or found.get("format") not in range(1, FORMAT + 1):
        raise LibraryError(f"this is no export of Herd's chats in format 1 to {FORMAT}; {_REFUSED}")
    contexts = [_typed(ContextEntry, entry) for entry in _list(found, "contexts")]
    chats = [_typed(Chat, entry) for entry in _list(found, "chats")]
    messages = [_typed(Message, entry) for entry in _list(found, "messages")]
    ids, known, settings = {entry.id for entry in contexts}, {chat.id for chat in chats}, found.get("settings")
    if not (
        isinstance(settings, dict)
        and len(ids) == len(contexts)
        and len(known) == len(chats)
        and all(chat.context is None or chat.context in ids for chat in chats)
        and all(m.chat in known and m.role in ROLES and m.state in STATES and _shows(m) for m in messages)
    ):
        raise LibraryError(f"this export contradicts itself; {_REFUSED}")
    return Rows(contexts, chats, messages, settings)


def _shows(message: Message) -> bool:
    """Whether its images are named as the server names them."""
    shown = message.detail.get("images", [])
    kinds = {"id": str, "name": str, "width": int, "height": int}
    return isinstance(shown, list) and all(
        isinstance(image, dict)
        and image.keys() == kinds.keys()
        and all(_is(image[name], kind) for name, kind in kinds.items())
        and re.fullmatch("[0-9a-f]{32}", image["id"]) is not None
        for image in shown
    )


def _list(found: dict[str, Any], name: str) -> list[Any]:
    rows = found.get(name)
    if not isinstance(rows, list):
        raise LibraryError(f"this export has no list of {name}; {_REFUSED}")
    return rows


def _typed(kind: type[Any], entry: Any) -> Any:
    """A row of an export. LibraryError if a value is missing, too many, of another type or too large."""
    wanted = {f.name: _KINDS[getattr(f.type, "__name__", str(f.type))] for f in fields(kind)}
    sound = isinstance(entry, dict) and entry.keys() == wanted.keys()
    if not sound or not all(_is(entry[name], types) for name, types in wanted.items()):
        raise LibraryError(f"an entry of this export is no {kind.__name__.lower()}; {_REFUSED}")
    return kind(**entry)


def _is(value: Any, types: Any) -> bool:
    small = not isinstance(value, int) or 0 <= value < 2**62
    return isinstance(value, types) and not isinstance(value, bool) and small
