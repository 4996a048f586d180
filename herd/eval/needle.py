"""Needles: invented facts at evenly spread depths of one context of held-out text, each asked for once.

Templates of evidence and question, and all words, are from the held-out split. What counts as exact: `score`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from herd.api import Answer, Model
from herd.data import facts
from herd.data.question import Question
from herd.eval import corpus, report, score
from herd.eval.asking import ask_all, cites, read_corpus

KINDS = ("word", "integer", "uuid")
MOST_TOKENS = 128  # that a needle adds to a text: its line, and now and then the header of one more chunk


@dataclass(frozen=True)
class Needle:
    """A fact that stands on line `line` (1-based) of source `source`, at `depth` (0 start, 1 end) of the text."""

    fact: facts.Fact
    depth: float
    source: str
    line: int

    @property
    def question(self) -> Question:
        return self.fact.questions[0]


def needle(
    model: Model,
    length: str | int,
    trials: int,
    workdir: Path,
    progress: corpus.Progress,
    *,
    seed: int = 0,
    kv: str = "int8",
    quote: bool = True,
    kinds: Sequence[str] = KINDS,
    packages: Sequence[str] = corpus.HELD_OUT,
) -> report.Result:
    """Ask for `trials` facts in one context of `length` tokens; the share of exact answers by depth and kind."""
    rng = Random(seed)
    tokens, chunk = corpus.tokens_of(length), corpus.chunk_size(model)
    needles_wanted = draw(trials, kinds, rng)
    ordered = corpus.with_filler(corpus.shuffled(corpus.package_files(packages), seed), seed)
    files, _ = corpus.fill(ordered, tokens, model.tokenizer, chunk)
    files, needles = hide(files, needles_wanted)
    folder = corpus.place(workdir, "needle", files, tokens, seed)
    context, reading = read_corpus(model, files, folder, progress, kv)
    start = time.perf_counter()
    answers = ask_all(context, [needle.question.question for needle in needles], progress, quote=quote)
    seconds = time.perf_counter() - start
    return {
        "eval": "needle",
        "length": tokens,
        **reading,
        "filler": [*packages, *corpus.filler_in(files)],
        "answers": "quotes" if quote else "free",
        "trials": trials,
        "answer_s": round(seconds, 1),
        **_table(needles, answers),
    }


def draw(trials: int, kinds: Sequence[str], rng: Random) -> list[facts.Fact]:
    """Held-out facts with different keys and values; the kinds of value take turns."""
    drawn: list[facts.Fact] = []
    seen: set[str] = set()
    while len(drawn) < trials:
        fact = facts.make(rng, "held_out", "fact", kinds[len(drawn) % len(kinds)], phrasings=1)
        question = fact.questions[0]
        if not {question.key, question.value} & seen:
            seen |= {question.key, question.value}
            drawn.append(fact)
    return drawn


def hide(files: Sequence[corpus.File], drawn: Sequence[facts.Fact]) -> tuple[list[corpus.File], list[Needle]]:
    """Insert fact i as a line of its own at depth (i + 0.5) / n of all characters."""
    total = sum(len(file.text) for file in files)
    todo = list(_depths(drawn, total))
    passed = 0
    changed: list[corpus.File] = []
    needles: list[Needle] = []
    for file in files:
        lines: list[str] = []
        for line in corpus.lines_of(file.text):
            while todo and passed >= todo[0][0]:
                _, depth, fact = todo.pop(0)
                lines.append(fact.sentence + "\n")
                needles.append(Needle(fact, depth, file.name, len(lines)))
            lines.append(line)
            passed += len(line)
        changed.append(corpus.File(file.name, "".join(lines)))
    for _, depth, fact in todo:  # depths inside the very last line
        text = changed[-1].text.rstrip("\n") + "\n" + fact.sentence + "\n"
        changed[-1] = corpus.File(changed[-1].name, text)
        needles.append(Needle(fact, depth, changed[-1].name, text.count("\n")))
    return changed, needles


def _depths(drawn: Sequence[facts.Fact], total: int) -> Iterator[tuple[int, float, facts.Fact]]:
    for index, fact in enumerate(drawn):
        depth = (index + 0.5) / len(drawn)
        yield int(depth * total), depth, fact


def _table(needles: Sequence[Needle], answers: Sequence[Answer]) -> report.Result:
    right = [score.exact(answer.text, needle.question) for needle, answer in zip(needles, answers, strict=True)]
    cited = [
        cites(answer, needle.source, needle.line, needle.line) for needle, answer in zip(needles, answers, strict=True)
    ]
    rows = list(zip(needles, right, strict=True))
    by_kind = {
        kind: [ok for n, ok in rows if n.question.kind == kind] for kind in sorted({k.question.kind for k in needles})
    }
    by_depth = {f"{d / 10:.1f}": [ok for n, ok in rows if int(n.depth * 10) == d] for d in range(10)}
    return {
        "exact": score.share(sum(right), len(right)),
        "value_right": score.share(
            sum(score.value_right(a.text, n.question) for n, a in zip(needles, answers, strict=True)), len(answers)
        ),
        "first_citation_right": score.share(sum(cited), len(cited)),
        "said_absent": score.share(sum(score.says_absent(answer.text) for answer in answers), len(answers)),
        "by_kind": {kind: score.share(sum(oks), len(oks)) for kind, oks in by_kind.items()},
        "by_depth": {depth: score.share(sum(oks), len(oks)) for depth, oks in by_depth.items()},
        "trial_rows": [
            {
                "depth": round(n.depth, 4),
                "kind": n.question.kind,
                "exact": ok,
                "cited": cite,
                "evidence": n.fact.sentence,
                "question": n.question.question,
                "expected": n.question.answer,
                "answer": answer.text,
            }
            for n, ok, cite, answer in zip(needles, right, cited, answers, strict=True)
        ],
    }
