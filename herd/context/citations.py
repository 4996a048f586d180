"""Where an answer comes from: the chunks that its tokens attended to, narrowed to the lines that carried the mass."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from herd.context.cache import ContextRow
from herd.context.manifest import ChunkRow

MAX_CITATIONS = 5
MIN_WEIGHT = 0.1  # of all attention that the context received
_LINE_SHARE = 0.8  # of the chunk's attention that the cited lines hold


class Decoder(Protocol):
    def decode(self, ids: list[int]) -> str: ...


@dataclass(frozen=True)
class Citation:
    """Lines first..last (1-based, inclusive) of a source and their chunk's share of the attention, 0 to 1.

    context: the folder of the context that holds the source.
    """

    source: str
    lines: tuple[int, int]
    weight: float
    context: Path


def cite(row: ContextRow, tokenizer: Decoder) -> list[Citation]:
    """Citations of one sequence, heaviest first: those of at least MIN_WEIGHT, or the heaviest one."""
    total = row.mass
    if total <= 0:
        return []
    masses = row.chunk_mass(MIN_WEIGHT * total)
    heaviest = sorted(masses.items(), key=lambda item: -item[1])[:MAX_CITATIONS]
    found = []
    for rank, ((store, chunk), mass) in enumerate(heaviest):
        weight = mass / total
        if rank and weight < MIN_WEIGHT:
            break
        place = store.chunks[chunk]
        lines = _narrow(_lines(store.ids(chunk), place.first_line, tokenizer), row.token_mass(store, chunk))
        source = store.sources[store.source_of[chunk]].name
        found.append(Citation(source, lines or _span(place), round(weight, 4), store.folder))
    return found


def _span(place: ChunkRow) -> tuple[int, int]:
    return place.first_line, place.last_line


def _lines(ids: list[int], first_line: int, tokenizer: Decoder) -> list[int]:
    """The line of the source that each token stands in; 0 for the tokens of the header."""
    lines, line = [], first_line - 1
    for i in ids:
        lines.append(line if line >= first_line else 0)
        line += tokenizer.decode([i]).count("\n")
    return lines


def _narrow(lines: list[int], mass: Tensor) -> tuple[int, int] | None:
    """The lines around the heaviest one that hold _LINE_SHARE of the mass; None if the header holds most of it."""
    by_line: dict[int, float] = {}
    for line, share in zip(lines, mass.tolist(), strict=True):
        by_line[line] = by_line.get(line, 0.0) + share
    header = by_line.pop(0, 0.0)
    body = sum(by_line.values())
    if body <= header:
        return None
    # One token may hold several line ends, so line numbers have gaps: walk over the lines there are.
    numbers = sorted(by_line)
    first = last = numbers.index(max(by_line, key=by_line.__getitem__))
    held = by_line[numbers[first]]
    while held < _LINE_SHARE * body and last - first + 1 < len(numbers):
        before = by_line[numbers[first - 1]] if first else -1.0
        after = by_line[numbers[last + 1]] if last + 1 < len(numbers) else -1.0
        if before > after:
            first, held = first - 1, held + before
        else:
            last, held = last + 1, held + after
    return numbers[first], numbers[last]
