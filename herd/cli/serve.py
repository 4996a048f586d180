"""`herd serve`: an HTTP server for one model."""

import ipaddress
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

import herd
from herd.cli.output import examples, note, server_data
from herd.errors import ConfigError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from herd.server.service import Service

NAME = "serve"
EXAMPLES = examples(
    "herd serve",
    "herd serve ./scout@int4 --data /srv/herd --memory 8G",
    "herd serve --watch ~/notes",
    "herd serve --host 0.0.0.0 --api-key-file key.txt",
    "herd serve ./scout@int4 --replicas 4 --ray auto",
)
_NEEDED = ("fastapi", "uvicorn", "pydantic", "python_multipart", "prometheus_client", "llguidance", "watchfiles")
_KeyOption = Annotated[
    list[str] | None, typer.Option(envvar="HERD_API_KEY", help="A key that clients must have; may be repeated.")
]
_ReplicasOption = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Have N processes of a Ray cluster answer, each with the model.")
]
_RayOption = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="The cluster of replicas: auto (this machine's), HOST:PORT, or local (a new one, here; the default).",
    ),
]


def command(
    model: Annotated[
        str, typer.Argument(metavar="[NAME|DIR]", help="cria, or a folder; see --model of the other verbs.")
    ] = "cria",
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    api_key: _KeyOption = None,
    api_key_file: Annotated[Path | None, typer.Option(metavar="FILE", help="A file with a key on each line.")] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Chats, contexts and settings. Default: in the cache folder.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What clients call the model. Default: as it is named here.")] = None,
    memory: Annotated[
        str | None,
        typer.Option(metavar="BYTES", help="For keys and values, such as 4G. Default: half of what is free."),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, max=1024, help="Answers that are given at a time.")] = 32,
    queue: Annotated[int, typer.Option(min=0, help="Answers that wait; more are refused with 429.")] = 256,
    max_upload: Annotated[str, typer.Option(metavar="BYTES", help="Of the files of one request.")] = "4G",
    allow_host: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A name of this server, where it is not its address.")
    ] = None,
    watch: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="Keep a context up to date with this folder; may be repeated."),
    ] = None,
    replicas: _ReplicasOption = None,
    ray: _RayOption = None,
    force: Annotated[bool, typer.Option("--force", help="Listen beyond this machine without a key.")] = False,
    drain: Annotated[int, typer.Option(min=0, help="Seconds that answers may still take when it is stopped.")] = 60,
) -> None:
    """Serve a model: OpenAI's API, contexts, and the page, until Ctrl-C or SIGTERM.

    By default only programs of this machine reach it. Answers that are being given when it is stopped are finished.
    """
    if lacking := [module for module in _NEEDED if find_spec(module) is None]:
        raise ConfigError(f"herd serve needs {lacking[0]}: pip install 'herd-llm[serve]'")
    keys = _keys(api_key or [], api_key_file)
    local = _is_local(host)
    if not local and not keys and not force:
        raise ConfigError(f"anyone who reaches {host} could use this server; give it an --api-key, or --force it")
    if ray is not None and replicas is None:
        raise ConfigError("--ray says where replicas are; say with --replicas how many there are to be")
    from herd.checkpoint.room import parse_bytes
    from herd.server.app import create_app
    from herd.server.library import Library
    from herd.server.state import Settings
    from herd.server.watching import check

    folder, room = data or server_data(), None if memory is None else parse_bytes(memory)
    hosts = (*(allow_host or []), *([] if local else [host if host not in _ANY else "*"]))
    watched, most = check(watch or [], folder), parse_bytes(max_upload)
    settings = Settings(name or _name(model), keys, hosts, max_upload=most, watch=watched, drain=drain)
    # A data folder in use is refused before the model is loaded.
    with (
        closing(Library(folder, serve=True)) as library,
        _service(model, replicas, ray or "local", folder, rows=rows, memory=room, queue=queue) as service,
    ):
        _run(create_app(service, library, settings), host, port, drain)


_ANY = ("0.0.0.0", "::", "")


@contextmanager
def _service(name: str, count: int | None, address: str, data: Path, **limits: Any) -> Iterator["Service"]:
    """What answers; count: of replicas, if there are to be any."""
    from herd.server.service import Service

    if count is None:
        with closing(Service(herd.load(name), **limits)) as service:
            yield service
        return
    try:
        spread = import_module("herd.server.replicas").spread  # imports Ray, which one machine needs not
    except ImportError as error:
        raise ConfigError(f"herd serve --replicas needs Ray Serve ({error}): pip install 'herd-llm[ray]'") from error
    with spread(herd.load(name), count, address, data, **limits) as service:
        yield service


def _run(app: "FastAPI", host: str, port: int, drain: int) -> None:
    """Serve until a signal."""
    import uvicorn

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # or asyncio leaves Nagle on: 40 ms each
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise ConfigError(f"cannot listen at {host} port {port}: {error.strerror or error}") from error
    config = uvicorn.Config(
        app,
        log_level="warning",
        loop="asyncio",  # whatever else is installed
        http="h11",  # strict about what a request is
        ws="none",
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=drain,
    )
    shown = f"[{host}]" if ":" in host else host
    note(f"serving at http://{shown}:{listening.getsockname()[1]} (Ctrl-C stops it)")
    # uvicorn sends itself the signal again that it ended by, and this end is a good one.
    for its in (signal.SIGTERM, signal.SIGINT):
        signal.signal(its, signal.SIG_IGN)
    with listening:
        server = uvicorn.Server(config)
        app.state.stopping = lambda: server.should_exit  # streams of the page end then; by themselves they never do
        stop = server.handle_exit

        def stopping(number: int, frame: FrameType | None) -> None:
            """Answers of the page may take from here on as long as those of programs."""
            app.state.ends = time.monotonic() + drain
            stop(number, frame)

        server.handle_exit = stopping  # type: ignore[assignment, method-assign]
        server.run(sockets=[listening])


def _keys(given: list[str], file: Path | None) -> tuple[str, ...]:
    try:
        lines = [] if file is None else file.read_text("utf-8").split()
    except (OSError, ValueError) as error:
        raise ConfigError(f"the keys in {file} cannot be read: {error}") from error
    keys = (*given, *lines)
    if (file is not None and not lines) or not all(key.strip() and key.isascii() and key.isprintable() for key in keys):
        raise ConfigError("a key is at least one printable ASCII character; a file of keys has one")
    return keys


def _is_local(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _name(model: str) -> str:
    """What clients call it: the last part of a folder's path."""
    return Path(model).name or model
