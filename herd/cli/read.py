"""`herd read`: files into a context."""

from contextlib import nullcontext
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

import herd
from herd.cli.output import JsonFlag, KvOption, ModelOption, ReadingOption, examples, interruptible, note, print_json
from herd.cli.progress import reading
from herd.cli.report import context_json, print_report, tokens_per_s
from herd.context.limits import MAX_BYTES
from herd.errors import ConfigError

NAME = "read"
EXAMPLES = examples(
    "herd read src docs manual.pdf --context ./ctx",
    "herd read . --context ./ctx --kv int4 --json",
    "git log -p | herd read - --context ./ctx",
    "herd read src --context ./ctx --ray auto",
)
LIMIT = f"A file of more than {MAX_BYTES >> 20} MiB is not read but listed as skipped; split it."
KEPT = "what was read so far is kept; the same command goes on from there"


def command(
    paths: Annotated[list[str], typer.Argument(metavar="PATH...", help=f"Files, folders, or - for stdin. {LIMIT}")],
    context: Annotated[Path, typer.Option("--context", "-c", metavar="DIR", help="The context; made if missing.")],
    kv: KvOption = None,
    how: ReadingOption = None,
    model: ModelOption = "cria",
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="ADDRESS",
            help="Spread over a Ray cluster: auto (this machine's), HOST:PORT, or local (a new one, here).",
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Read files and folders into a durable context. What did not change is not read again."""
    if ray is not None and find_spec("ray") is None:
        raise ConfigError("herd read --ray needs ray: pip install 'herd-llm[ray]'")
    loaded = herd.load(model)
    opened = herd.Context.open(context, loaded, kv=kv, reading=how)
    # Imports Ray, which one machine needs not.
    workers = nullcontext() if ray is None else import_module("herd.scale").spread(loaded, ray)
    with interruptible(KEPT), workers as reader, reading() as progress:
        report = opened.read(paths, progress=progress, reader=reader)
    if as_json:
        timing = {"read_s": report.seconds, "read_tokens_per_s": tokens_per_s(report)}
        print_json({"context": context_json(opened, report), "timing": timing, "warning": opened.too_long})
        return
    print_report(report)
    if opened.too_long is not None:
        note(f"warning: {opened.too_long}")
