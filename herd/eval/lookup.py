"""Lookup: questions about real held-out packages, each answered by one definition in the whole context (see `exam`).

Asked in the same context: questions that it does not answer, and two baselines on the same questions.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from herd.api import Answer, Model
from herd.data import code
from herd.data.question import Question
from herd.eval import baselines, corpus, report, score
from herd.eval.asking import ask_all, cites, read_corpus
from herd.eval.exam import Item, prepare

ABSENT_QUESTIONS = 100


def lookup(
    model: Model,
    packages: Sequence[str],
    length: str | int,
    questions: int,
    workdir: Path,
    progress: corpus.Progress,
    *,
    seed: int = 0,
    kv: str = "int8",
    quote: bool = True,
    absent: int = ABSENT_QUESTIONS,
    base: Model | None = None,
) -> report.Result:
    """Ask `questions` questions and `absent` unanswerable ones in one context of `length` tokens.

    base: the unchanged base model for the RAG baseline; without it only BM25 is measured.
    """
    tokens = corpus.tokens_of(length)
    exam = prepare(model, packages, tokens, questions, absent, seed)
    folder = corpus.place(workdir, "lookup", exam.files, tokens, seed)
    context, reading = read_corpus(model, exam.files, folder, progress, kv)
    start = time.perf_counter()
    answers = ask_all(context, [item.question.question for item in exam.items], progress, quote=quote)
    refusals = ask_all(context, [question.question for question in exam.absent], progress, quote=quote)
    seconds = time.perf_counter() - start
    return {
        "eval": "lookup",
        "length": tokens,
        **reading,
        "packages": list(packages),
        "filler": corpus.filler_in(exam.files),
        "answers": "quotes" if quote else "free",
        "questions": len(exam.items),
        "answer_s": round(seconds, 1),
        **_table(exam.items, answers),
        "absent": _absent_table(exam.absent, refusals),
        "baselines": baselines.measure(exam.chunks, exam.items, base, progress),
        "rows": _rows(exam.items, answers),
    }


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
