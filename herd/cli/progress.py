"""Progress bars, on stderr and only for a terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from herd.cli.output import note

if TYPE_CHECKING:
    from herd.context.read import Progress as ReadProgress


@contextmanager
def reading() -> Iterator[Callable[["ReadProgress"], None] | None]:
    """A callback for Context.read that draws files, tokens, tokens/s and time left; None without a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("reading"), BarColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)

        def show(at: "ReadProgress") -> None:
            left = "" if at.eta_s is None else f", {_clock(at.eta_s)} left"
            text = (
                f"{at.sources:,}/{at.sources_total:,} files, {at.read_tokens:,} tokens, {at.tokens_per_s:,.0f}/s{left}"
            )
            spent = at.read_tokens / at.tokens_per_s if at.tokens_per_s else 0.0
            total = None if at.eta_s is None else spent + at.eta_s
            bar.update(task, description=text, completed=spent, total=total)

        yield show


@contextmanager
def converting() -> Iterator[Callable[[int, int], None] | None]:
    """A callback for herd.checkpoint.convert that draws how much is done and the time left; None without a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("converting"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def training() -> Iterator[Callable[[str, int, int, dict[str, float]], None]]:
    """A callback for herd.train.run: a bar per stage with the newest figures; without a terminal, a line per stage."""
    if not sys.stderr.isatty():
        told = set[str]()

        def tell(stage: str, done: int, total: int, figures: dict[str, float]) -> None:
            if stage not in told:
                told.add(stage)
                note(f"{stage}: {total:,} to do")

        yield tell
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.fields[stage]}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True)) as bar:
        stages: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int, figures: dict[str, float]) -> None:
            if stage not in stages:
                stages[stage] = bar.add_task("", total=total, stage=stage)
            text = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
            bar.update(stages[stage], completed=done, total=total, description=text)

        yield show


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"
