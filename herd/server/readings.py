"""What is being read, for the page: how far it is, and what came of it."""

import asyncio
import logging
import secrets
import shutil
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from typing import Any

from fastapi import UploadFile

from herd.api import ReadReport
from herd.errors import HerdError
from herd.server.errors import ApiError, told
from herd.server.library import ContextEntry, Unknown
from herd.server.state import Server
from herd.server.talks import Talks

MAX_FILES = 50_000  # of one upload
_LOOK_S = 0.2  # between two looks at how far reads are
_log = logging.getLogger("herd.server")
Json = dict[str, Any]


class Readings:
    """Of the contexts of a server. Belongs to its event loop."""

    def __init__(self, server: Server, said: Talks) -> None:
        self._server, self._said = server, said
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[str, int] = {}  # reads that were asked for and have not ended, by context
        self._last: dict[str, Json] = {}  # what came of the last one
        self._tasks: set[asyncio.Task[None]] = set()
        self._scratch = server.library.folder / "uploads"
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._looker = asyncio.create_task(self._look())

    async def close(self) -> None:
        """Let nobody know any more; a read that goes on keeps what it has committed."""
        for task in (self._looker, *self._tasks):
            task.cancel()
        await asyncio.wait([self._looker, *self._tasks])

    async def shown(self, entry: ContextEntry) -> Json:
        """What a list says of a context."""
        info = await asyncio.to_thread(self._server.contexts.show, entry.id)
        progress = None if info.reading is None else asdict(info.reading)
        return {
            **asdict(entry),
            "tokens": info.tokens,
            "sources": info.sources,
            "error": info.error,
            "reading": self._waiting.get(entry.id, 0) > 0 or info.reading is not None,
            "progress": progress,
            "last": self._last.get(entry.id),
        }

    async def whole(self, entry: ContextEntry) -> Json:
        """The same with all sources, what was skipped, and why it cannot be asked, if so."""
        shown = await self.shown(entry)
        if shown["error"] is not None:
            return {**shown, "files": [], "skipped": [], "warning": None}
        context = await asyncio.to_thread(self._server.contexts.now, entry.id)
        files = [{"name": its.name, "tokens": its.tokens} for its in context.sources]
        skipped = [{"name": name, "reason": reason} for name, reason in context.skipped]
        return {**shown, "files": files, "skipped": skipped, "warning": context.too_long}

    async def tell(self, id: str) -> Json:
        """Tell all who look how a context is now."""
        shown = await self.shown(self._server.library.context(id))
        self._said.tell({"type": "context", "context": shown})
        return shown

    def keep(self, id: str, files: Sequence[UploadFile], names: Sequence[str]) -> None:
        """Copy uploads to where they survive the request, and begin to read them. For a thread beside the loop."""
        if len(files) > MAX_FILES:
            raise ApiError(413, f"{len(files):,} files came at once; send at most {MAX_FILES:,}")
        scratch = self._scratch / secrets.token_hex(8)
        scratch.mkdir(parents=True)
        places = [(name, scratch / str(number)) for number, name in enumerate(names)]
        try:
            for file, (_, place) in zip(files, places, strict=True):
                with place.open("wb") as target:
                    shutil.copyfileobj(file.file, target, 1 << 20)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise

        async def add() -> ReadReport:
            try:
                return await self._server.contexts.add(id, places)
            finally:
                await asyncio.to_thread(shutil.rmtree, scratch, ignore_errors=True)

        asyncio.run_coroutine_threadsafe(self.begin(id, add), self._loop).result()

    async def remove(self, id: str, name: str) -> None:
        """Take out a source, and begin to read again what that changes."""
        await self.begin(id, lambda: self._server.contexts.remove(id, name))

    async def begin(self, id: str, work: Callable[[], Awaitable[ReadReport]]) -> None:
        """Begin to read into a context."""
        self._waiting[id] = self._waiting.get(id, 0) + 1
        await self.tell(id)
        task = asyncio.create_task(self._run(id, work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def finish(self, id: str, work: Callable[[], Awaitable[ReadReport]]) -> None:
        """Read into a context, until that is done."""
        self._waiting[id] = self._waiting.get(id, 0) + 1
        await self.tell(id)
        await self._run(id, work)

    async def _run(self, id: str, work: Callable[[], Awaitable[ReadReport]]) -> None:
        try:
            report = await work()
            self._last[id] = {
                "read_tokens": report.read_tokens,
                "reused_tokens": report.reused_tokens,
                "seconds": round(report.seconds, 2),
                "skipped": len(report.skipped),
            }
        except Exception as error:
            self._last[id] = {"error": str(told(error))}
        finally:
            self._waiting[id] -= 1
        try:
            await self.tell(id)
        except Unknown:  # it was deleted meanwhile
            self._last.pop(id, None)

    async def _look(self) -> None:
        """Tell how far reads are, whoever began them."""
        before: dict[str, Any] = {}
        while True:
            await asyncio.sleep(_LOOK_S)
            now = self._server.contexts.reading
            for id in now.keys() | before.keys():
                if now.get(id) == before.get(id):
                    continue
                try:
                    if id in now and id in before:
                        self._said.tell({"type": "progress", "context": id, "progress": asdict(now[id])})
                    else:
                        await self.tell(id)
                except Unknown:
                    pass
                except HerdError:
                    _log.exception("how far a read is could not be told")
            before = now
