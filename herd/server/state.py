"""What all routes of a server share."""

import threading
from dataclasses import dataclass, field
from pathlib import Path

from fastapi import Request

from herd.api import Context, Model
from herd.server.contexts import Contexts
from herd.server.errors import ApiError
from herd.server.library import Library
from herd.server.service import Service
from herd.server.structured import Grammars


@dataclass(frozen=True)
class Settings:
    """name: of the model, as clients say it. api_keys: with none, everybody may ask. hosts: that a Host header may
    name besides addresses of this machine; "*": any. max_body, max_upload: bytes of a request's body.
    watch: folders that contexts follow. drain: seconds that answers of the page may take when the server is stopped."""

    name: str
    api_keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    max_body: int = 64 << 20
    max_upload: int = 4 << 30
    watch: tuple[Path, ...] = ()
    drain: float = 60


@dataclass(frozen=True)
class Server:
    """The parts of a server."""

    settings: Settings
    service: Service
    library: Library
    contexts: Contexts
    grammars: Grammars
    looking: threading.Lock = field(default_factory=threading.Lock)  # at images, one request at a time

    @property
    def model(self) -> Model:
        """The one that it runs."""
        return self.service.model

    def check_model(self, name: str | None) -> None:
        """ApiError if a client names another model."""
        if name not in (None, "", self.settings.name):
            raise ApiError(
                404,
                f"The model `{name[:200]}` does not exist; this server runs `{self.settings.name}`",
                param="model",
                code="model_not_found",
            )

    def now(self, ids: str | list[str] | None) -> tuple[Context, ...]:
        """The contexts that a request names, as they are now."""
        names = [ids] if isinstance(ids, str) else ids or []
        return tuple(self.contexts.now(id) for id in names)


def server(request: Request) -> Server:
    """The server that a request came to."""
    found = request.app.state.server
    assert isinstance(found, Server)
    return found


@dataclass(frozen=True)
class Client:
    """Who asks. scope: what was seen for one is never used for another. turn: those of one take turns with others."""

    scope: str
    turn: str


def client(request: Request) -> Client:
    """Who a request came from, as `herd.server.security` found."""
    found = request.scope["herd.client"]
    assert isinstance(found, Client)
    return found
