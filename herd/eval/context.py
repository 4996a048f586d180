"""What a context costs: reading speed, bytes on disk, memory, time to the first token, to ask after an edit, and for
each token of an answer (`decode`).

Every figure is taken in a process of its own, as a user would meet it; times count from the start of the process.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from herd.api import Model
from herd.errors import HerdError
from herd.eval import corpus, decode, report

QUESTION = "What are the parameters of add_edge?"
_EDIT = "HERD_EVALUATION_MARK = {}\n"
_EDIT_QUESTION = "What is the value of HERD_EVALUATION_MARK?"


def context(
    model: Model,
    length: str | int,
    workdir: Path,
    progress: corpus.Progress,
    *,
    seed: int = 0,
    kv: str = "int8",
    packages: Sequence[str] = corpus.HELD_OUT,
) -> report.Result:
    """Read `length` tokens into a new context, ask twice, edit a file of median size in its middle and ask again.

    Where an earlier run left the context, its figures of reading are kept, and only the rest is measured.
    """
    tokens = corpus.tokens_of(length)
    ordered = corpus.with_filler(corpus.shuffled(corpus.package_files(packages), seed), seed)
    files, _ = corpus.fill(ordered, tokens, model.tokenizer, corpus.chunk_size(model))
    folder = corpus.place(workdir, "context", files, tokens, seed)
    store = folder / f"context-{kv}"
    sources = corpus.write(files, folder / "sources")
    roots = sorted(str(path) for path in sources.iterdir())
    progress(f"reading {len(files):,} files")
    read = _read(model, store, kv, roots)
    progress("asking from a new process")
    _child("ask", model, store, question=QUESTION, max_tokens=1)
    second = _child("ask", model, store, question=QUESTION)
    progress("timing the tokens of an answer")
    going_on = _child("decode", model, store, question=QUESTION, max_tokens=decode.TOKENS)
    typical = sorted(files, key=lambda file: len(file.text))[len(files) // 2]
    # A number of each run's own: what a context has read before, it does not read again.
    (sources / typical.name).write_text(edit(typical.text, int(time.time()) % 100_000), encoding="utf-8")
    progress("asking after an edit")
    after = _child("ask", model, store, paths=roots, question=_EDIT_QUESTION)
    return {
        "eval": "context",
        "length": tokens,
        "kv": kv,
        "packages": [*packages, *corpus.filler_in(files)],
        "context_tokens": read["tokens"],
        "read_on": read["date"],
        "read_s": read["read_s"],
        "read_tokens_per_s": round(read["read_tokens"] / read["read_s"]),
        "bytes_per_token": round(read["bytes"] / read["tokens"], 1),
        "peak_memory_gb": {"read": read["peak_gb"], "ask": second["peak_gb"], "edit_and_ask": after["peak_gb"]},
        "second_ask_first_token_s": second["wall_first_s"],
        **{key: value for key, value in going_on.items() if key.startswith(("decode_", "memory_"))},
        "missed_mass": round(max(asked["missed_mass"] for asked in (second, going_on, after)), 6),
        "edit_and_ask_first_token_s": after["wall_first_s"],
        "edit_and_ask_s": after["wall_s"],
        "edited_file_characters": len(typical.text),
        "edit_read_tokens": after["read_tokens"],
        "edit_answer": after["answer"],
    }


def _read(model: Model, store: Path, kv: str, roots: Sequence[str]) -> dict[str, Any]:
    """Figures of reading all into a new context. One that is there gets the files as they were before the edit."""
    figures = store.with_suffix(".json")
    if store.exists() and not figures.exists():
        raise HerdError(f"the context of an unfinished run is in the way; remove {store} to read it anew")
    read = _child("read", model, store, kv=kv, paths=roots)
    if not figures.exists():
        size = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
        figures.write_text(json.dumps({**read, "bytes": size, "date": date.today().isoformat()}))
    return json.loads(figures.read_text())


def edit(text: str, number: int) -> str:
    """The text with a constant before the first definition at top level in its second half, else at its end."""
    found = re.compile(r"^(?:@|def |class )", re.M).search(text, len(text) // 2)
    at = found.start() if found else len(text)
    return text[:at] + _EDIT.format(number) + text[at:]


def _child(
    mode: str,
    model: Model,
    store: Path,
    *,
    kv: str | None = None,
    paths: Sequence[str] = (),
    question: str = "",
    max_tokens: int = 32,
) -> dict[str, Any]:
    """Run `herd.eval.child` and add the seconds from its start to its first token and its end."""
    job: dict[str, Any] = {"mode": mode, "model": model.name, "store": str(store), "kv": kv, "paths": list(paths)}
    job |= {"question": question, "max_tokens": max_tokens}
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "herd.eval.child"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(job))
    process.stdin.close()
    first: float | None = None
    result: dict[str, Any] = {}
    for line in process.stdout:
        if line == "first token\n":
            first = time.perf_counter() - start
        else:
            result = json.loads(line)
    wall = time.perf_counter() - start
    if process.wait() != 0 or not result:
        raise HerdError(f"the measuring process ({mode}) ended with code {process.returncode}; its message is above")
    return {**result, "wall_first_s": round(first, 2) if first is not None else None, "wall_s": round(wall, 2)}
