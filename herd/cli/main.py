"""Entry point: builds the command from its verbs and turns every way to end into an exit code."""

import gc
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import Annotated

import typer
from typer.exceptions import TyperException

from herd import __version__
from herd.cli import ask, chat, context, convert, evaluate, info, plan, read, serve, train, upcycle
from herd.cli.output import Interrupted, fail, note
from herd.errors import HerdError

INTERRUPTED = 130
app = typer.Typer(name="herd", add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
for verb in (ask, read, chat, serve, convert, upcycle, train, evaluate, info, plan):
    app.command(verb.NAME, epilog=verb.EXAMPLES)(verb.command)
app.add_typer(context.app, name="context")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"herd {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def herd(
    ctx: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Read files into a durable context and ask about them, with a model of the Llama 4 architecture."""
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


def run(args: Sequence[str]) -> int:
    """Run one command and return its exit code: 0 done, 1 failed, 2 user error, 130 interrupted."""
    debug = "--debug" in args[:1]
    try:
        code = app(args=list(args), prog_name="herd", standalone_mode=False) or 0
        if code == INTERRUPTED:  # typer's own answer to Ctrl-C outside of what `interruptible` guards
            note("interrupted: nothing was changed")
        return code
    except Interrupted as interrupted:
        note(f"interrupted: {interrupted}")
        return INTERRUPTED
    except (HerdError, TyperException) as error:
        return fail(error, 2, debug=debug)
    except Exception as error:
        return fail(error, 1, debug=debug)


def main() -> None:
    # Importing torch makes many objects and no garbage; collecting less often saves a fifth of the start-up time.
    gc.set_threshold(200_000, 50, 100)
    # File names may hold bytes that no encoding maps; they are shown escaped.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.exit(run(sys.argv[1:]))
