"""Renders one chat template, as the program of a process that can be stopped and is given little memory.

The first message on its socket is the template, each further one a request as JSON; it replies to each with JSON.
"""

import datetime
import json
import resource
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment


def environment() -> ImmutableSandboxedEnvironment:
    """The Jinja that chat templates are written for."""
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    env.filters["tojson"] = _to_json
    env.globals.update(raise_exception=_refuse, strftime_now=_strftime_now)
    return env


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_: Any) -> str:
    """The `tojson` that chat templates are written for: no HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _allow(size: int) -> None:
    """Let the process grow to so many bytes; what an earlier request was allowed, it may still hold."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if soft == hard or soft < size:
        resource.setrlimit(resource.RLIMIT_AS, (size if hard == resource.RLIM_INFINITY else min(size, hard), hard))


def _reply(source: str, request: Mapping[str, Any]) -> dict[str, str]:
    """`text`, or why there is none as `error`. A template may raise anything."""
    try:
        _allow(request["bytes"])
        parts, left = list[str](), request["chars"]
        for part in environment().from_string(source).generate(request["variables"]):
            parts.append(part)
            left -= len(part)
            if left < 0:
                return {"error": f"made a text of more than {request['chars']:,} characters"}
        return {"text": "".join(parts)}
    except jinja2.TemplateError as error:
        return {"error": f"refused the conversation: {error}"}
    except MemoryError:
        return {"error": f"needs more than {request['bytes'] >> 20:,} MB"}
    except Exception as error:
        return {"error": f"cannot render these messages: {error!r}"}


def main() -> None:
    """Serve until the other end of the socket is closed."""
    with Connection(int(sys.argv[1])) as socket:
        try:
            source = socket.recv_bytes().decode()
            while True:
                reply = _reply(source, json.loads(socket.recv_bytes()))
                socket.send_bytes(json.dumps(reply).encode())
        except (EOFError, BrokenPipeError):
            return


if __name__ == "__main__":
    main()
