"""What `lookup` asks: files of held-out packages that fill a length, and questions that they answer, or do not.

A name counts only if it is defined exactly once in all text of the context. Four families, the same number of each.
Constants are rare in these packages, so files with many of them come first and fill up to a fifth of the length. If
the packages are too short, `corpus.FILLER` goes on: its names count, but nothing in it is asked about.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random

from herd.api import Model
from herd.context.chunks import Chunk, cut
from herd.data import code, facts
from herd.data.question import Question
from herd.errors import SourceError
from herd.eval import corpus

_PIECE = 1600  # characters; the generators of questions are made for chunks, not for whole files
_CHARACTERS = 3  # of a token of code
_OUTSIDE = 100  # files that no context holds, however long it is, to ask about what it does not answer


@dataclass(frozen=True)
class Item:
    """A question, and the chunk and lines (1-based, inclusive) of its evidence."""

    question: Question
    source: str
    chunk: int  # index into all chunks of the context
    lines: tuple[int, int]


@dataclass(frozen=True)
class Exam:
    """The files of a context, its chunks as (source, chunk), and what is asked."""

    files: list[corpus.File]
    chunks: list[tuple[str, Chunk]]
    items: list[Item]
    absent: list[Question]


def prepare(model: Model, packages: Sequence[str], tokens: int, questions: int, absent: int, seed: int) -> Exam:
    """Choose files, cut them as the context does, and draw the questions. SourceError if there are too few.

    Chunks come without their token ids, of which there may be ten million.
    """
    rng = Random(seed)
    chunk_size = corpus.chunk_size(model)
    everything = corpus.package_files(packages)
    ordered = _constants_first(everything, tokens, seed)
    inside = ordered[: len(ordered) - min(_OUTSIDE, len(ordered) // 10)]
    files, _ = corpus.fill(corpus.with_filler(inside, seed), tokens, model.tokenizer, chunk_size)
    chunks = [
        (file.name, replace(chunk, ids=[]))
        for file in files
        for chunk in cut(file.name, file.text, model.tokenizer, chunk_size)
    ]
    items = _draw(files, chunks, questions, {file.name for file in everything}, rng)
    return Exam(files, chunks, items, absent_questions(everything, files, absent, rng))


def _constants_first(files: list[corpus.File], tokens: int, seed: int) -> list[corpus.File]:
    order = corpus.shuffled(files, seed)
    rng = Random(seed)
    constants = {
        file.name: {asked.key for asked in _asked(file, rng, "train") if asked.family == "constant"} for file in order
    }
    budget = tokens * _CHARACTERS // 5
    first: list[corpus.File] = []
    defined: Counter[str] = Counter()
    # 2,000 keeps files of a few lines from coming first.
    for file in sorted(order, key=lambda file: -len(constants[file.name]) / (2000 + len(file.text))):
        here = code.definitions(file.text)
        new = sum(not defined[name] and here[name] == 1 for name in constants[file.name])
        if len(file.text) <= budget and new * 5000 > len(file.text):
            first.append(file)
            defined.update(here)
            budget -= len(file.text)
    taken = {file.name for file in first}
    return first + [file for file in order if file.name not in taken]


def _asked(file: corpus.File, rng: Random, split: str) -> Iterator[Question]:
    """Questions about the pieces of a file."""
    for start in range(0, len(file.text), _PIECE):
        yield from code.questions(f"# {file.name}:1\n{file.text[start : start + _PIECE]}", rng, split)


def _draw(
    files: Sequence[corpus.File], chunks: Sequence[tuple[str, Chunk]], questions: int, asked: set[str], rng: Random
) -> list[Item]:
    """Questions about the sources in `asked`, on names that no other file defines either."""
    defined: Counter[str] = Counter()
    for file in files:
        defined.update(code.definitions(file.text))
    pools: dict[str, list[Item]] = {family: [] for family in code.FAMILIES}
    for index, (source, chunk) in enumerate(chunks):
        if source not in asked:
            continue
        for question in code.questions(chunk.text, rng, "held_out"):
            if defined[question.key] == 1 and question.value not in ("()", "(self)", "(cls)"):
                pools[question.family].append(Item(question, source, index, evidence_lines(chunk, question)))
    each = questions // len(pools)
    if short := [f"{len(pool)} of {family}" for family, pool in pools.items() if len(pool) < each]:
        raise SourceError(
            f"the context answers only {', '.join(short)}; ask {each * len(pools)} questions of more text"
        )
    items = [item for pool in pools.values() for item in rng.sample(pool, each)]
    rng.shuffle(items)
    return items


def evidence_lines(chunk: Chunk, question: Question) -> tuple[int, int]:
    """The first and last line of the evidence in its source; of a class question, the method's def line."""
    header_end = chunk.text.index("\n") + 1
    start = chunk.text.index(question.evidence) + question.evidence.index(question.copied)
    stop = start + len(question.copied)
    if start < header_end:
        found = re.search(rf"^[ \t]*(?:async\s+)?def {question.key}\b", chunk.text, re.M)
        start, stop = found.span() if found else (header_end, header_end)
    first, last = (chunk.first_line + chunk.text.count("\n", header_end, at) for at in (start, stop))
    return min(first, chunk.last_line), min(last, chunk.last_line)


def absent_questions(
    everything: Sequence[corpus.File], files: Sequence[corpus.File], count: int, rng: Random
) -> list[Question]:
    """Questions that the context does not answer: 2/5 on real names of other files, 2/5 on invented names, 1/5 facts.

    None of the names occurs anywhere in the context.
    """
    inside = {found.group() for file in files for found in re.finditer(r"\w+", file.text)}
    outside = _questions_elsewhere(everything, {file.name for file in files}, inside, rng)
    real = rng.sample(outside, min(count * 2 // 5, len(outside)))
    unknown: Callable[[str], bool] = inside.__contains__
    invented = [code.absent(rng.choice(code.FAMILIES), rng, unknown, "held_out") for _ in range(count * 2 // 5)]
    rest = [facts.absent(rng, "held_out") for _ in range(count - len(real) - len(invented))]
    return [*(question.as_absent() for question in real), *invented, *rest]


def _questions_elsewhere(
    everything: Sequence[corpus.File], chosen: set[str], inside: set[str], rng: Random
) -> list[Question]:
    others = [file for file in everything if file.name not in chosen]
    rng.shuffle(others)
    found: dict[str, Question] = {}
    for file in others[:100]:
        for question in _asked(file, rng, "held_out"):
            # A question that names its file would give itself away.
            if question.key not in inside and file.name.rsplit("/", 1)[-1] not in question.question:
                found[question.key] = question
    return list(found.values())
