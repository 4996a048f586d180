"""The contexts of a server: what the model has read, and the files that it was read from.

The folder of each (`Library.context_folder`) holds `files/`, what was uploaded, and `kv/`, the context.
"""

import os
import secrets
import shutil
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from herd.api import Context, ReadReport
from herd.context.read import Progress, Stopped
from herd.errors import HerdError, SourceError
from herd.server.asks import Busy
from herd.server.library import Library, Unknown
from herd.server.service import Service

_LONGEST, _DEEPEST = 1000, 32  # bytes and parts of the name of a file


@dataclass(frozen=True)
class Info:
    """What is said of a context. reading: how far a read is that goes on. error: why it cannot be opened.

    created: seconds since 1970.
    """

    id: str
    name: str
    created: int
    tokens: int = 0
    sources: int = 0
    reading: Progress | None = None
    error: str | None = None


class Contexts:
    """Made and read into here. All methods raise `Unknown` for a context that is not there. Those that are not awaited
    may be called from any thread."""

    def __init__(self, library: Library, service: Service) -> None:
        self._library, self._service = library, service
        self._open: dict[str, Context] = {}
        self._reading: dict[str, Progress] = {}
        self._lock = threading.Lock()

    def create(
        self, name: str, *, kv: str | None = None, reading: str | None = None, watches: Path | None = None
    ) -> str:
        """Make an empty one; its id. kv, reading: see `herd.Context.open`. watches: the folder that it follows."""
        entry = self._library.new_context(name, watches)
        try:
            folder = self._library.context_folder(entry.id)
            (folder / "files").mkdir(parents=True)
            Context.open(folder / "kv", self._service.model, kv=kv, reading=reading)
        except BaseException:
            self._forget(entry.id)
            raise
        return entry.id

    def all(self) -> list[Info]:
        """The newest first."""
        return [self.show(entry.id) for entry in self._library.contexts()]

    def show(self, id: str) -> Info:
        """What there is to say of one."""
        entry = self._library.context(id)
        created, reading = entry.created // 1000, self._reading.get(id)
        try:
            context = self.now(id)
        except Unknown:
            raise
        except HerdError as error:
            return Info(id, entry.name, created, reading=reading, error=str(error))
        return Info(id, entry.name, created, context.tokens, len(context.sources), reading)

    @property
    def reading(self) -> dict[str, Progress]:
        """How far reads are that go on, by context."""
        return dict(self._reading)

    def now(self, id: str) -> Context:
        """What it holds now; what is read later changes nothing of that."""
        folder = self._library.context_folder(id)
        with self._lock:
            if id not in self._open:
                self._open[id] = Context.open(folder / "kv", self._service.model)
            return self._open[id]

    def text(self, id: str, name: str) -> str:
        """The text of a source as it was read, whatever became of the file."""
        context = self.now(id)
        if all(source.name != name for source in context.sources):
            raise Unknown(f"context {id} has no source {name[:100]!r}")
        return context.text(name)

    async def add(self, id: str, files: Sequence[tuple[str, Path]]) -> ReadReport:
        """Copy files into it under their names, such as src/main.py, and read what is new. Files of the same names are
        replaced. SourceError for a name that cannot be one; then nothing is changed."""
        folder = self._library.context_folder(id)
        places = [(_place(folder, name), path) for name, path in files]
        return await self._service.read(partial(self._add, id, places))

    async def read(self, id: str, paths: Sequence[str | Path]) -> ReadReport:
        """Read files and folders of this machine where they are."""
        return await self._service.read(partial(self._read, id, list(paths)))

    async def remove(self, id: str, name: str) -> ReadReport:
        """Take out an uploaded source, or a folder of them."""
        return await self._service.read(partial(self._remove, id, name))

    async def delete(self, id: str) -> None:
        """Delete it with its files. Answers that are being given from it go on."""
        self._library.context(id)
        await self._service.read(partial(self._forget, id))

    def _add(self, id: str, places: list[tuple[Path, Path]]) -> ReadReport:
        self._library.context(id)
        for place, path in places:
            new = place.parent / f".new-{secrets.token_hex(8)}"
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, new)
                new.rename(place)
            except OSError as error:
                new.unlink(missing_ok=True)
                reason = error.strerror or str(error)
                raise SourceError(f"{place.name} cannot be kept: {reason[0].lower()}{reason[1:]}") from error
        return self._again(id)

    def _again(self, id: str) -> ReadReport:
        """Read all files. Each is named from the folder of files on; the folder itself says which are gone."""
        files = self._library.context_folder(id) / "files"
        return self._read(id, [*sorted(files.iterdir()), files])

    def _read(self, id: str, paths: list[str | Path]) -> ReadReport:
        context = Context.open(self._library.context_folder(id) / "kv", self._service.model)
        try:
            return context.read(paths, progress=partial(self._note, id))
        except Stopped:
            raise Busy("the server is being stopped; read again when it is back", stopping=True) from None
        finally:
            self._reading.pop(id, None)
            with self._lock:
                self._open.pop(id, None)

    def _note(self, id: str, progress: Progress) -> None:
        """Also ends a read where the server is being stopped."""
        if not self._service.open:
            raise Stopped
        self._reading[id] = progress

    def _remove(self, id: str, name: str) -> ReadReport:
        place = _place(self._library.context_folder(id), name)
        if place.is_dir():
            shutil.rmtree(place)
        elif place.is_file():
            place.unlink()
        else:
            raise Unknown(f"context {id} has no file {name[:100]!r}")
        return self._again(id)

    def _forget(self, id: str) -> None:
        folder = self._library.context_folder(id)
        self._library.delete_context(id)
        with self._lock:
            self._open.pop(id, None)
        shutil.rmtree(folder, ignore_errors=True)


def _place(folder: Path, name: str) -> Path:
    """Where a file of this name lies, always inside of the folder's files. SourceError if it cannot be a name."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    fits = 0 < len(parts) <= _DEEPEST and len(os.fsencode(name)) <= _LONGEST and not name.startswith("/")
    if not fits or not all(part != ".." and len(os.fsencode(part)) < 256 and part.isprintable() for part in parts):
        raise SourceError(f"{name[:100]!r} cannot be a source's name; name a file, or its path from a folder on")
    return folder / "files" / Path(*parts)
