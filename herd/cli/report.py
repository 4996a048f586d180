"""How readings, answers and citations are shown, to people and to machines."""

from __future__ import annotations

import sys
from typing import Any

import herd
from herd.cli.output import note

SKIPPED_SHOWN = 5


class TextOut:
    """Prints an answer on stdout as it comes. quiet: prints nothing."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet, self.begun = quiet, False

    def __call__(self, piece: str) -> None:
        self.begun = True
        if not self.quiet:
            sys.stdout.write(piece)
            sys.stdout.flush()

    def end(self) -> None:
        """End the line of an answer that has begun."""
        if self.begun:
            self("\n")


def print_report(report: herd.ReadReport) -> None:
    """What a read did, in a few lines on stderr."""
    speed = f" at {tokens_per_s(report):,.0f} tokens/s" if report.read_tokens else ""
    note(
        f"context: {report.tokens:,} tokens of {report.sources:,} sources; read {report.read_tokens:,} "
        f"in {report.seconds:.1f} s{speed}, reused {report.reused_tokens:,}"
    )
    print_skipped([(skip.name, skip.reason) for skip in report.skipped])


def tokens_per_s(report: herd.ReadReport | None) -> float:
    """Speed of the whole read: files, tokenizer, model and disk."""
    return report.read_tokens / report.seconds if report and report.seconds else 0.0


def print_skipped(skipped: list[tuple[str, str]]) -> None:
    """The first few of what was not read, and how many more; --json lists all."""
    for name, reason in skipped[:SKIPPED_SHOWN]:
        note(f"skipped {name}: {reason}")
    if len(skipped) > SKIPPED_SHOWN:
        note(f"skipped {len(skipped) - SKIPPED_SHOWN:,} more; --json lists all")


def print_citations(answer: herd.Answer, *, with_context: bool = False) -> None:
    """One line per citation on stdout, as source:first-last and its weight; with_context: and the context's folder."""
    for citation in answer.citations:
        first, last = citation.lines
        context = f"  in {citation.context}" if with_context else ""
        print(f"  {citation.source}:{first}-{last}  {citation.weight:.2f}{context}")


def citation_json(citation: herd.Citation, *, with_context: bool = False) -> dict[str, Any]:
    place = {"source": citation.source, "lines": list(citation.lines), "weight": round(citation.weight, 4)}
    return {**place, "context": str(citation.context)} if with_context else place


def context_json(context: herd.Context, report: herd.ReadReport | None) -> dict[str, Any]:
    """The state of a context after a read; without one, everything in it counts as reused."""
    skipped = context.skipped if report is None else [(skip.name, skip.reason) for skip in report.skipped]
    return {
        "dir": str(context.folder),
        "tokens": context.tokens,
        "sources": len(context.sources),
        "read_tokens": report.read_tokens if report else 0,
        "reused_tokens": report.reused_tokens if report else context.tokens,
        "skipped": [{"source": name, "reason": reason} for name, reason in skipped],
    }
