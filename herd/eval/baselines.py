"""Two baselines on the questions of `lookup`: BM25 over the same chunks, and BM25 with the unchanged base model.

BM25 is right if the chunk that holds the evidence comes first. RAG puts the five best chunks into the prompt of the
base model and scores leniently: the value must stand anywhere in the answer.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from herd.api import Model, load
from herd.checkpoint.cria import upcycle_base
from herd.checkpoint.cria.base import fetch_wheel, home
from herd.context.chunks import Chunk
from herd.data.code import FAMILIES
from herd.errors import ConfigError
from herd.eval import corpus, report, score
from herd.eval.exam import Item

TOP = 5
RAG_TOKENS = 96
# The base model's own context length as local chunk; the smallest layer that adds nothing.
_BASE = {"global_layer": 1, "chunk": 8192, "experts": 1, "expert_width": 16, "extra_local": False}


def words(text: str) -> list[str]:
    """Lower-case words for BM25; an identifier counts as a whole and by its parts."""
    whole = re.findall(r"\w+", text.lower())
    return whole + [part for word in whole if "_" in word for part in word.split("_") if part]


def measure(
    chunks: Sequence[tuple[str, Chunk]], items: Sequence[Item], base: Model | None, progress: corpus.Progress
) -> report.Result:
    """Shares of right answers of BM25 and, with a base model, of RAG."""
    ranked = rank([chunk.text for _, chunk in chunks], [item.question.question for item in items], TOP)
    result: report.Result = {
        "bm25": {
            "first_chunk_right": _tally(items, [item.chunk == top[0] for item, top in zip(items, ranked, strict=True)]),
            f"in_top_{TOP}": _tally(items, [item.chunk in top for item, top in zip(items, ranked, strict=True)]),
        }
    }
    if base is not None:
        result["rag"] = _rag(base, chunks, items, ranked, progress)
    return result


def rank(texts: Sequence[str], questions: Sequence[str], top: int) -> list[list[int]]:
    """For each question, the indices of the best chunks by BM25, best first."""
    index = _bm25()([words(text) for text in texts])
    ranked = []
    for question in questions:
        scores = np.asarray(index.get_scores(words(question)))
        ranked.append([int(i) for i in np.argsort(-scores, kind="stable")[:top]])
    return ranked


def _bm25() -> Any:
    try:
        return import_module("rank_bm25").BM25Okapi
    except ImportError as error:
        raise ConfigError("the BM25 baseline needs rank-bm25; run: pip install rank-bm25") from error


def _rag(
    base: Model,
    chunks: Sequence[tuple[str, Chunk]],
    items: Sequence[Item],
    ranked: Sequence[list[int]],
    progress: corpus.Progress,
) -> report.Result:
    right, rows = [], []
    start = time.perf_counter()
    for number, (item, top) in enumerate(zip(items, ranked, strict=True), 1):
        # The best chunk stands last, next to the question, where a small model sees it best.
        passages = "\n\n".join(chunks[i][1].text.rstrip() for i in reversed(top))
        content = f"{passages}\n\nAnswer from the text above, in a few words. {item.question.question}"
        ids = base.tokenizer.chat([{"role": "user", "content": content}])
        text = base.generate(ids, max_tokens=RAG_TOKENS).text
        right.append(score.lenient(text, item.question))
        rows.append({"question": item.question.question, "expected": item.question.value, "answer": text})
        if number % 20 == 0:
            progress(f"RAG baseline: {number} of {len(items)} questions")
    return {
        "value_in_answer": _tally(items, right),
        "top": TOP,
        "seconds_per_question": round((time.perf_counter() - start) / max(len(items), 1), 2),
        "rows": rows,
    }


def _tally(items: Sequence[Item], right: Sequence[bool]) -> report.Result:
    by_family = {
        family: [ok for item, ok in zip(items, right, strict=True) if item.question.family == family]
        for family in FAMILIES
    }
    return {
        "all": score.share(sum(right), len(right)),
        **{family: score.share(sum(oks), len(oks)) for family, oks in by_family.items()},
    }


def base_model(workdir: Path, progress: corpus.Progress) -> Model:
    """The unchanged base of Cria, in the Llama 4 layout with layers inserted that add zero (built once in workdir).

    Its local chunk is its full context length, so it computes exactly what the base computes.
    """
    folder = workdir / "base"
    if not (folder / "config.json").is_file():
        progress("building the unchanged base model for comparison")
        workdir.mkdir(parents=True, exist_ok=True)
        upcycle_base(fetch_wheel(home() / "downloads"), folder, _BASE)
    return load(str(folder))
