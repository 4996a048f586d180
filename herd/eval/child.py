"""One measured step in a process of its own: reads a JSON job from stdin, prints `first token` when it comes, a result.

Job: mode (read | ask | decode), model (folder), store (context folder), kv (its format), paths (read first if any),
question, max_tokens.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

from herd.api import Context, load
from herd.eval.decode import decode


def main() -> None:
    """Do the job that stdin describes."""
    job: dict[str, Any] = json.load(sys.stdin)
    model = load(job["model"])
    if job["mode"] == "decode":
        _tell(decode(model, Path(job["store"]), job["question"], job["max_tokens"]))
        return
    context = Context.open(job["store"], model, kv=job["kv"])
    result: dict[str, Any] = {"read_tokens": 0}
    if job["paths"]:
        start = time.perf_counter()
        read = context.read(job["paths"])
        result = {"read_s": time.perf_counter() - start, "tokens": read.tokens, "read_tokens": read.read_tokens}
    if job["mode"] == "ask":
        told: list[str] = []

        def on_text(piece: str) -> None:
            if not told:
                print("first token", flush=True)
            told.append(piece)

        answer = context.ask(job["question"], max_tokens=job["max_tokens"], on_text=on_text)
        result |= {"answer": answer.text, "missed_mass": answer.missed_mass}
    # Linux gives kilobytes, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    result["peak_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)
    _tell(result)


def _tell(result: dict[str, Any]) -> None:
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
