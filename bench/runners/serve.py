"""What all runners share: requests come in as lines of JSON, answers go out as lines of JSON.

A runner has a class that loads a model and has the method `run(sequences, prompt, new)`: read `sequences` prompts of
`prompt` tokens from nothing, then make `new` further tokens of each. Runners import nothing of Herd but the one that
runs it: each lives in its own environment.
"""

import json
import os
import random
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

FIRST_ID = 64  # below are special tokens


def serve(load: Callable[..., Any]) -> None:
    """Answer until the input ends. What libraries print goes to stderr, so that answers stay alone."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    loaded: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        do = request.pop("do")
        try:
            if do == "load":
                loaded = load(**request)
                answer = {"settings": loaded.settings}
            else:
                answer = getattr(loaded, do)(**request)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answer["peak_gb"] = peak_gb()
        print(json.dumps(answer), file=answers, flush=True)


def peak_gb() -> float:
    """Of this process. Not getrusage, where a child begins with the peak of its parent."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM"))
    return round(int(line.split()[1]) / 1e6, 3)


def prompts(sequences: int, tokens: int, vocabulary: int) -> list[list[int]]:
    """The same random ids for every runner."""
    return [random.Random(row).choices(range(FIRST_ID, vocabulary), k=tokens) for row in range(sequences)]


class Stopwatch:
    """Seconds until the first token of every sequence, and from there to the end."""

    def __init__(self) -> None:
        self._start = self._first = time.perf_counter()
        self._has_first = False

    def first(self) -> None:
        if not self._has_first:
            self._first, self._has_first = time.perf_counter(), True

    def result(self, prompt: int, new: int) -> dict[str, float]:
        """prompt and new: tokens of each sequence that were really read and made."""
        end = time.perf_counter()
        seconds = {"prefill_s": self._first - self._start, "decode_s": end - self._first}
        return {**seconds, "prompt": prompt, "new": new}
