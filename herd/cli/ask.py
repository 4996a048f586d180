"""`herd ask`: the main job, a question and files in, an answer with citations out."""

import hashlib
import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer

import herd
from herd.cli.output import STARTED, FreeFlag, JsonFlag, ModelOption, examples, interruptible, note, print_json
from herd.cli.progress import reading
from herd.cli.read import KEPT
from herd.cli.report import TextOut, citation_json, context_json, print_citations, print_report, tokens_per_s
from herd.errors import ContextError, PromptError

NAME = "ask"
EXAMPLES = examples(
    'herd ask "What is the default timeout?" src docs manual.pdf',
    'herd ask "What is the default timeout?" --context ./ctx',
    'herd ask "Which class contains putheader?" src --context ./ctx --json',
    'herd ask "Who wrote the parser?" --context ./code --context ./mails',
)


def command(
    question: Annotated[str, typer.Argument(help="The question.")],
    paths: Annotated[
        list[str] | None, typer.Argument(metavar="[PATH...]", help="Files, folders, or - for stdin, to read first.")
    ] = None,
    contexts: Annotated[
        list[Path] | None,
        typer.Option(
            "--context",
            "-c",
            metavar="DIR",
            help="The context, or several to be asked together. Default: one in the cache for these paths.",
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    free: FreeFlag = False,
    model: ModelOption = "cria",
    as_json: JsonFlag = False,
) -> None:
    """Answer a question from files: read what is new into a durable context, then ask it.

    The answer is followed by its citations, source:first-last line with the share of attention they carried.
    Times in --json are seconds; first_token_s and answer_s count from the start of the command.
    """
    folders = contexts or []
    if not folders and not paths:
        raise PromptError("nothing to answer from; name files or folders, or --context DIR")
    if len(folders) > 1 and paths:
        raise PromptError(f"files are read into one context, and {len(folders)} are named; use herd read first")
    for folder in folders:
        if not paths and not folder.is_dir():
            raise ContextError(f"{folder} does not exist; name files or folders to read into it")
    loaded = herd.load(model)
    folders = folders or [cached_context(paths or [], loaded.fingerprint)]
    opened, *also = (herd.Context.open(folder, loaded) for folder in folders)
    report = None
    if paths:
        with interruptible(KEPT), reading() as progress:
            report = opened.read(paths, progress=progress)
        if not as_json:
            print_report(report)
    out = _Clocked(quiet=as_json)
    with interruptible("the context is kept; ask again any time"):
        try:
            answer = opened.ask(question, also=also, max_tokens=max_tokens, quote=not free, on_text=out)
        finally:
            out.end()
    done = time.perf_counter() - STARTED
    timing = {
        "read_s": report.seconds if report else 0.0,
        "first_token_s": out.first or done,
        "answer_s": done,
        "read_tokens_per_s": tokens_per_s(report),
    }
    if as_json:
        print_json(_result(answer, context_json(opened, report), [context_json(c, None) for c in also], timing))
        return
    print_citations(answer, with_context=bool(also))
    note(f"first token after {timing['first_token_s']:.1f} s, answer after {done:.1f} s")


def cached_context(paths: list[str], fingerprint: str) -> Path:
    """Where the context of these paths and this model lives when no folder is named."""
    from herd.checkpoint.cria.base import home

    places = sorted({path if path == "-" else os.path.abspath(path) for path in paths})
    key = hashlib.sha256(b"\0".join([fingerprint.encode(), *map(os.fsencode, places)])).hexdigest()
    return home() / "contexts" / key[:24]


def _result(
    answer: "herd.Answer", context: dict[str, Any], also: list[dict[str, Any]], timing: dict[str, float]
) -> dict[str, Any]:
    return {
        "answer": answer.text,
        "quoted": answer.quoted,
        "citations": [citation_json(citation, with_context=bool(also)) for citation in answer.citations],
        "missed_mass": answer.missed_mass,
        "context": context,
        **({"also": also} if also else {}),
        "timing": {name: round(value, 3) for name, value in timing.items()},
    }


class _Clocked(TextOut):
    """Also notes when the first piece of the answer came."""

    first: float | None = None

    def __call__(self, piece: str) -> None:
        if self.first is None:
            self.first = time.perf_counter() - STARTED
        super().__call__(piece)
