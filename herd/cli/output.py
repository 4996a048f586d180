"""What all verbs share: where output goes, and how errors and interruptions end a command."""

import json
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

STARTED = time.perf_counter()  # the command imports this module first

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; all else goes to stderr.")]
ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="NAME|PATH",
        help="cria, a folder of Hugging Face's or Meta's, or a GGUF file; after it, @int8, @int4 or @bf16 for weights.",
    ),
]
FreeFlag = Annotated[
    bool, typer.Option("--free", help="Answer in the model's own words, not held to quotes of what it looks at.")
]
KvOption = Annotated[
    str | None,
    typer.Option(
        "--kv",
        metavar="FORMAT",
        help="How keys and values are kept: int8, int4 or float32. Default: as they are, int8 in a new context.",
    ),
]
ReadingOption = Annotated[
    str | None,
    typer.Option(
        "--reading",
        metavar="HOW",
        help="With several global layers: sequential (exact) or independent (each chunk on its own, approximate). "
        "Default: as the context was read, sequential for a new one.",
    ),
]


class Interrupted(Exception):
    """Ctrl-C, with a sentence that says what is kept."""


@contextmanager
def interruptible(kept: str) -> Iterator[None]:
    """Turn Ctrl-C inside into one line that says what is kept."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(kept) from None


def examples(*commands: str) -> str:
    """The epilog of a verb's help."""
    return "\b\nExamples:\n" + "\n".join(f"  {command}" for command in commands)


def server_data() -> Path:
    """Where chats are kept unless another folder is named."""
    from herd.checkpoint.cria.base import home

    return home() / "server"


def note(text: str) -> None:
    """One line for people, on stderr."""
    print(text, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """The machine-readable result, on stdout."""
    print(json.dumps(value, indent=2))


def fail(error: BaseException, code: int, *, debug: bool) -> int:
    """Print one line (before it the traceback, with --debug) and return the exit code."""
    if debug:
        traceback.print_exception(error)
    text = error.format_message() if isinstance(error, TyperException) else str(error)
    text = " ".join(text.split())
    if code == 2:
        note(f"error: {text}")
    else:
        note(f"failed: {type(error).__name__}: {text} (where: the same with --debug before the verb)")
    return code
