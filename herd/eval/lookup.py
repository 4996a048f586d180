"""Lookup: questions about real held-out packages, each answered by one definition in the whole context.

A name counts only if it is defined exactly once in all text of the context. Four families, the same number of each.
Files are chosen for a length so that constants are not too rare: those with most of them fill up to half of it.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from herd.api import Answer, Context, Model
from herd.context.chunks import Chunk, cut
from herd.data import code, facts
from herd.data.question import Question
from herd.errors import SourceError
from herd.eval import baselines, corpus, report, score
from herd.eval.asking import ask_all, cites, read_corpus

ABSENT_QUESTIONS = 100
_CONSTANT = re.compile(r"^(?:[A-Za-z_]| {4}[A-Z_])\w{2,} *= *[-\d\"'(][^\n(]{0,50}$", re.M)


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


def lookup(
    model: Model,
    packages: Sequence[str],
    length: str | int,
    questions: int,
    workdir: Path,
    progress: corpus.Progress,
    *,
    seed: int = 0,
    absent: int = ABSENT_QUESTIONS,
    base: Model | None = None,
) -> report.Result:
    """Ask `questions` questions and `absent` unanswerable ones in one context of `length` tokens.

    base: the unchanged base model for the RAG baseline; without it only BM25 is measured.
    """
    tokens = corpus.tokens_of(length)
    exam = prepare(model, packages, tokens, questions, absent, seed)
    context, reading = read_corpus(model, exam.files, workdir / f"lookup-{tokens}-{seed}", progress)
    start = time.perf_counter()
    answers = ask_all(context, [item.question.question for item in exam.items], progress)
    refusals = ask_all(context, [question.question for question in exam.absent], progress)
    seconds = time.perf_counter() - start
    return {
        "eval": "lookup",
        "length": tokens,
        **reading,
        "packages": list(packages),
        "questions": len(exam.items),
        "answer_s": round(seconds, 1),
        **_table(exam.items, answers),
        "absent": _absent_table(exam.absent, refusals),
        "baselines": baselines.measure(exam.chunks, exam.items, base, progress),
        "rows": _rows(exam.items, answers),
    }


def prepare(model: Model, packages: Sequence[str], tokens: int, questions: int, absent: int, seed: int) -> Exam:
    """Choose files, cut them as the context does, and draw the questions. SourceError if there are too few."""
    rng = Random(seed)
    chunk_size = corpus.chunk_size(model)
    everything = corpus.package_files(packages)
    ordered = _constants_first(everything, tokens, seed)
    files, _ = corpus.fill(ordered, tokens, model.tokenizer, chunk_size)
    chunks = [(file.name, chunk) for file in files for chunk in cut(file.name, file.text, model.tokenizer, chunk_size)]
    items = _draw(files, chunks, questions, rng)
    return Exam(files, chunks, items, absent_questions(everything, files, absent, rng))


def _constants_first(files: list[corpus.File], tokens: int, seed: int) -> list[corpus.File]:
    order = corpus.shuffled(files, seed)
    # An estimate is enough; 2,000 keeps files of a few lines from coming first.
    dense = {file.name: len(_CONSTANT.findall(file.text)) / (2000 + len(file.text)) for file in order}
    budget = tokens * 3 // 2  # characters: half of the length at three characters a token
    first: list[corpus.File] = []
    for file in sorted(order, key=lambda file: -dense[file.name]):
        if dense[file.name] and len(file.text) <= budget:
            first.append(file)
            budget -= len(file.text)
    taken = {file.name for file in first}
    return first + [file for file in order if file.name not in taken]


def _draw(files: Sequence[corpus.File], chunks: Sequence[tuple[str, Chunk]], questions: int, rng: Random) -> list[Item]:
    defined: Counter[str] = Counter()
    for file in files:
        defined.update(code.definitions(file.text))
    pools: dict[str, list[Item]] = {family: [] for family in code.FAMILIES}
    for index, (source, chunk) in enumerate(chunks):
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
    text = "\n".join(file.text for file in files)
    inside = set(re.findall(r"\w+", text))
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
        for question in code.questions(f"# {file.name}:1\n{file.text}", rng, "held_out"):
            # A question that names its file would give itself away.
            if question.key not in inside and file.name.rsplit("/", 1)[-1] not in question.question:
                found[question.key] = question
    return list(found.values())


def _table(items: Sequence[Item], answers: Sequence[Answer]) -> report.Result:
    def tally(family: str | None) -> report.Result:
        rows = [(i, a) for i, a in zip(items, answers, strict=True) if family in (None, i.question.family)]
        return {
            "exact": score.share(sum(score.exact(a.text, i.question) for i, a in rows), len(rows)),
            "first_citation_right": score.share(sum(cites(a, i.source, *i.lines) for i, a in rows), len(rows)),
            "said_absent": score.share(sum(score.says_absent(a.text) for _, a in rows), len(rows)),
        }

    return {**tally(None), "by_family": {family: tally(family) for family in code.FAMILIES}}


def _absent_table(questions: Sequence[Question], answers: Sequence[Answer]) -> report.Result:
    pairs = [(q, score.says_absent(a.text)) for q, a in zip(questions, answers, strict=True)]
    families = sorted({question.family for question, _ in pairs})
    by_family = {family: [ok for q, ok in pairs if q.family == family] for family in families}
    return {
        "questions": len(pairs),
        "right": score.share(sum(ok for _, ok in pairs), len(pairs)),
        "by_family": {family: score.share(sum(oks), len(oks)) for family, oks in by_family.items()},
        "rows": [
            {"question": q.question, "answer": a.text, "right": ok} for (q, ok), a in zip(pairs, answers, strict=True)
        ],
    }


def _rows(items: Sequence[Item], answers: Sequence[Answer]) -> list[report.Result]:
    return [
        {
            "family": item.question.family,
            "source": item.source,
            "lines": list(item.lines),
            "exact": score.exact(answer.text, item.question),
            "cited": cites(answer, item.source, *item.lines),
            "question": item.question.question,
            "expected": item.question.answer,
            "answer": answer.text,
        }
        for item, answer in zip(items, answers, strict=True)
    ]


def absent(
    context: Context, files: Sequence[corpus.File], everything: Sequence[corpus.File], count: int, seed: int = 0
) -> report.Result:
    """Only the unanswerable questions, in a context that was read already."""
    questions = absent_questions(everything, files, count, Random(seed))
    return _absent_table(questions, context.ask_many([question.question for question in questions]))
