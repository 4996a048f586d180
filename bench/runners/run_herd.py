"""Herd, as a peer among others: its engine, or (`context`) a context folder that is read and asked."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from serve import Stopwatch, prompts, serve

import herd
from herd import engine, kernels


class Engine:
    def __init__(
        self,
        path: str,
        threads: int,
        length: int,
        sequences: int,
        dtype: str | None = None,
        memory: str | None = None,
    ) -> None:
        torch.set_num_threads(threads)
        self.model = herd.load(path, dtype=None if dtype is None else getattr(torch, dtype), memory=memory)
        self.settings = {"kernels": kernels.implementation(), "threads": threads}

    def run(self, sequences: int, prompt: int, new: int) -> dict[str, float]:
        ids = prompts(sequences, prompt, self.model.config.vocab_size)
        begun, watch = set[int](), Stopwatch()
        running = engine.Engine(self.model.transformer, rows=sequences)
        for one in ids:
            running.submit(engine.Request(one, new + 1))
        for token in engine.stream(running):
            begun.add(token.request)
            if len(begun) == sequences:
                watch.first()
        return watch.result(prompt, new)

    def experts(self) -> dict[str, Any]:
        """How many experts were wanted, in memory or guessed, and bytes read, if they are not all in memory."""
        packed = self.model.transformer.packed
        return {} if packed is None or packed.source is None else packed.source.counts._asdict()

    def logprobs(self, ids: list[int]) -> dict[str, Any]:
        logits = self.model.logits(ids)[:-1].log_softmax(-1)
        return {"logprobs": logits.gather(1, torch.tensor(ids[1:]).unsqueeze(1)).flatten().tolist()}


class Context(Engine):
    """The prompt is a file of text of as many tokens; its reading and that of the question count as prefill."""

    def run(self, sequences: int, prompt: int, new: int) -> dict[str, float]:
        assert sequences == 1
        with tempfile.TemporaryDirectory() as name:
            path = Path(name, "text.txt")
            path.write_text(self._text(prompt))
            watch = Stopwatch()
            context = herd.Context.open(Path(name, "context"), self.model)
            report = context.read([path])
            answer = context.ask("What is n1?", max_tokens=new + 1, quote=False, on_text=lambda _: watch.first())
            return watch.result(report.tokens, len(answer.ids) - 1)

    def _text(self, tokens: int) -> str:
        line = "n{0} = {0}\n"
        probe = "".join(line.format(i) for i in range(1000, 2000))
        lines = tokens * 1000 // len(self.model.tokenizer.encode(probe))
        return "".join(line.format(1000 + i % 9000) for i in range(lines))


def load(context: bool = False, **settings: Any) -> Engine:
    return (Context if context else Engine)(**settings)


if __name__ == "__main__":
    serve(load)
