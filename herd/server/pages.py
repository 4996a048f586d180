"""The page: a few files of this package, and what belongs to a server's event loop."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import APIRouter, FastAPI
from fastapi.responses import FileResponse, Response

from herd.server.errors import ApiError
from herd.server.readings import Readings
from herd.server.talks import Talks
from herd.server.watching import Watching

_FOLDER = Path(__file__).parent / "page"
_KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
_FILES = {path.name: path for path in _FOLDER.iterdir() if path.suffix in _KINDS}
# Nothing from elsewhere, nothing that a text could bring along.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
    "trusted-types 'none'"
)

router = APIRouter(include_in_schema=False)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Chats and reads go on as long as the application runs."""
    talks = app.state.talks = Talks(app.state.server)
    readings = app.state.readings = Readings(app.state.server, talks)
    watching = Watching(app.state.server, readings)
    try:
        yield
    finally:
        await watching.close()
        await readings.close()
        ends = getattr(app.state, "ends", None)  # when it was to end, if a signal said so
        await talks.close(app.state.server.settings.drain if ends is None else max(0.0, ends - time.monotonic()))


@router.get("/")
def index() -> Response:
    """The page itself."""
    return _file("index.html")


@router.get("/page/{name}")
def part(name: str) -> Response:
    """What the page is made of."""
    return _file(name)


def _file(name: str) -> Response:
    if name not in _FILES:
        raise ApiError(404, f"there is no page {name[:100]!r}; the page is at /")
    # It is asked again each time whether a file is as it was, so a new version is seen at once.
    headers = {"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache"}
    path = _FILES[name]
    return FileResponse(path, media_type=f"{_KINDS[path.suffix]}; charset=utf-8", headers=headers)
