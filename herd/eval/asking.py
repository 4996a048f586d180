"""Reading an evaluation's files into a context, asking in batches, and judging the first citation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from herd.api import Answer, Context, Model
from herd.eval import corpus, report

BATCH = 50  # questions that share one pass over the context
MAX_TOKENS = 112  # the longest expected answer is a docstring with its signature


def read_corpus(
    model: Model, files: Sequence[corpus.File], folder: Path, progress: corpus.Progress, kv: str
) -> tuple[Context, report.Result]:
    """Write the files below folder/sources, read them into folder/context-`kv`; what was read and how fast."""
    sources = corpus.write(files, folder / "sources")
    progress(f"reading {len(files):,} files")
    start = time.perf_counter()
    context = Context.open(folder / f"context-{kv}", model, kv=kv)
    read = context.read(sorted(path for path in sources.iterdir()))
    seconds = time.perf_counter() - start
    progress(f"{read.tokens:,} tokens in the context, {read.read_tokens:,} of them read in {seconds:.1f} s")
    return context, {
        "kv": kv,
        "context_tokens": read.tokens,
        "sources": read.sources,
        "skipped": len(read.skipped),
        "read_tokens": read.read_tokens,
        "read_s": round(seconds, 2),
    }


def ask_all(
    context: Context, questions: Sequence[str], progress: corpus.Progress, *, quote: bool = True
) -> list[Answer]:
    """One answer for each question, asked in batches; quote as for `Context.ask`."""
    answers: list[Answer] = []
    for start in range(0, len(questions), BATCH):
        answers += context.ask_many(list(questions[start : start + BATCH]), max_tokens=MAX_TOKENS, quote=quote)
        progress(f"{len(answers)} of {len(questions)} questions answered")
    return answers


def cites(answer: Answer, source: str, first_line: int, last_line: int) -> bool:
    """Whether the first citation names this source and its lines overlap those of the evidence."""
    if not answer.citations:
        return False
    first = answer.citations[0]
    return first.source == source and first.lines[0] <= last_line and first_line <= first.lines[1]
