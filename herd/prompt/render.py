"""Renders one chat template, as the program of a process that can be stopped and is given little memory.

The first message on its socket is the template. Each request is two further ones, its caps and the variables of the
template, as JSON; it replies with one.
"""

import datetime
import json
import resource
import sys
import time
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


def _allow(size: int, seconds: float) -> None:
    """Let the process grow to so many bytes and run so much longer, should nobody be left to end it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if soft == hard or soft < size:  # what an earlier request was allowed, the process may still hold
        resource.setrlimit(resource.RLIMIT_AS, (size if hard == resource.RLIM_INFINITY else min(size, hard), hard))
    used, (_, hard) = time.process_time(), resource.getrlimit(resource.RLIMIT_CPU)
    until = int(used + seconds) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (until if hard == resource.RLIM_INFINITY else min(until, hard), hard))


def _reply(source: str, caps: Mapping[str, Any], variables: Mapping[str, Any]) -> dict[str, str]:
    """`text`, or why there is none as `error`. A template may raise anything."""
    try:
        parts, left = list[str](), caps["chars"]
        for part in environment().from_string(source).generate(variables):
            parts.append(part)
            left -= len(part)
            if left < 0:
                return {"error": f"made a text of more than {caps['chars']:,} characters"}
        return {"text": "".join(parts)}
    except jinja2.TemplateError as error:
        return {"error": f"refused the conversation: {error}"}
    except MemoryError:
        return {"error": f"needs more than {caps['bytes'] >> 20:,} MB"}
    except Exception as error:
        return {"error": f"cannot render these messages: {error!r}"}


def main() -> None:
    """Serve until the other end of the socket is closed."""
    with Connection(int(sys.argv[1])) as socket:
        try:
            source = socket.recv_bytes().decode()
            while True:
                caps = json.loads(socket.recv_bytes())
                _allow(caps["bytes"], caps["seconds"])
                reply = _reply(source, caps, json.loads(socket.recv_bytes()))
                socket.send_bytes(json.dumps(reply).encode())
        except (EOFError, BrokenPipeError):
            return


if __name__ == "__main__":
    main()
