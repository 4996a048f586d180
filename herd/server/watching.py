"""Contexts that follow folders of this machine: what changes there is read again, and nothing else."""

import asyncio
import logging
from collections.abc import Iterable
from pathlib import Path

from watchfiles import Change, awatch

from herd.errors import ConfigError
from herd.server.readings import Readings
from herd.server.state import Server

_CONTROL_FOLDERS = {".git", ".hg", ".svn"}  # which are never read
_SETTLE_MS = 1000  # without changes before what changed is read, so that a checkout is one read
_RETRY_S = 5.0
_log = logging.getLogger("herd.server")


def check(folders: Iterable[Path], data: Path) -> tuple[Path, ...]:
    """The folders, absolute. ConfigError for one that is none, or that a server with this data would itself change."""
    found = tuple(folder.absolute() for folder in folders)
    for folder in found:
        if not folder.is_dir():
            raise ConfigError(f"{folder} is no folder that could be watched; name one, or make it first")
        if data.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(f"{folder} holds {data}, which changes with every answer; name another folder as --data")
    return found


class Watching:
    """Some folders, each with a context of its own. Belongs to the server's event loop."""

    def __init__(self, server: Server, readings: Readings) -> None:
        self._server, self._readings = server, readings
        self._tasks = [asyncio.create_task(self._follow(folder)) for folder in server.settings.watch]

    async def close(self) -> None:
        """Follow no more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _follow(self, folder: Path) -> None:
        id = await asyncio.to_thread(self._context, folder)
        while True:
            try:
                # Beginning to watch comes first: what changes while all is read is then seen.
                changes = awatch(folder, watch_filter=_counts, debounce=_SETTLE_MS, yield_on_timeout=False)
                following = asyncio.ensure_future(anext(changes))
                try:
                    while True:
                        await self._readings.finish(id, lambda: self._server.contexts.read(id, [folder]))
                        await following
                        following = asyncio.ensure_future(anext(changes))
                finally:
                    following.cancel()
            except (OSError, StopAsyncIteration, RuntimeError) as error:  # such as a folder that is gone
                _log.warning("%s cannot be watched now (%s); looking again in %g s", folder, error, _RETRY_S)
                await asyncio.sleep(_RETRY_S)

    def _context(self, folder: Path) -> str:
        """The context of a folder; made if there is none yet."""
        for entry in self._server.library.contexts():
            if entry.watches == str(folder):
                return entry.id
        return self._server.contexts.create(folder.name or str(folder), watches=folder)


def _counts(change: Change, path: str) -> bool:
    return _CONTROL_FOLDERS.isdisjoint(Path(path).parts)
