"""llama.cpp, through the C interface that llama-cpp-python wraps."""

import ctypes
from typing import Any

import llama_cpp as c
import numpy as np
from serve import Stopwatch, prompts, serve

BATCH = 2048


class LlamaCpp:
    def __init__(self, path: str, threads: int, length: int, sequences: int, **settings: Any) -> None:
        asked = {"ubatch": 512, "flash_attn": -1, "kv": "F16", "mapped": False, **settings}
        kv = getattr(c, f"GGML_TYPE_{asked['kv']}")
        c.llama_backend_init()
        loading = c.llama_model_default_params()
        if asked["mapped"]:
            loading.use_extra_bufts = False  # weights stay in the file's order: nothing is copied out of it
        self.model = c.llama_model_load_from_file(path.encode(), loading)
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        params = c.llama_context_default_params()
        params.n_ctx, params.n_seq_max = length * sequences, sequences
        params.n_batch, params.n_ubatch = BATCH, asked["ubatch"]
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type, params.type_k, params.type_v = asked["flash_attn"], kv, kv
        params.swa_full = False  # local layers keep what they need only
        params.no_perf = True
        self.context = c.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError("llama.cpp makes no context")
        self.vocabulary = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self.model))
        self.batch = c.llama_batch_init(BATCH, 0, 1)
        system = c.llama_print_system_info().decode().strip()
        self.settings = {**asked, "batch": BATCH, "threads": threads, "swa_full": False, "system": system}

    def run(self, sequences: int, prompt: int, new: int) -> dict[str, float]:
        rows = prompts(sequences, prompt, self.vocabulary)
        c.llama_memory_clear(c.llama_get_memory(self.context), True)
        watch = Stopwatch()
        chosen = [self._prefill(ids, row) for row, ids in enumerate(rows)]
        watch.first()
        for step in range(new):
            tokens = [(chosen[row], prompt + step, row, True) for row in range(sequences)]
            chosen = [int(x.argmax()) for x in self._decode(tokens)]
        return watch.result(prompt, new)

    def logprobs(self, ids: list[int]) -> dict[str, Any]:
        c.llama_memory_clear(c.llama_get_memory(self.context), True)
        found: list[float] = []
        for first in range(0, len(ids) - 1, BATCH):
            places = range(first, min(first + BATCH, len(ids) - 1))
            for i, x in zip(places, self._decode([(ids[i], i, 0, True) for i in places]), strict=True):
                found.append(float(x[ids[i + 1]] - np.logaddexp.reduce(x.astype(np.float64))))
        return {"logprobs": found}

    def greedy(self, ids: list[int], new: int) -> dict[str, Any]:
        c.llama_memory_clear(c.llama_get_memory(self.context), True)
        made = [self._prefill(ids, 0)]
        while len(made) < new:
            made.append(int(self._decode([(made[-1], len(ids) + len(made) - 1, 0, True)])[0].argmax()))
        return {"ids": made}

    def _prefill(self, ids: list[int], row: int) -> int:
        out: list[np.ndarray] = []
        for first in range(0, len(ids), BATCH):
            places = range(first, min(first + BATCH, len(ids)))
            out = self._decode([(ids[i], i, row, i == len(ids) - 1) for i in places])
        return int(out[0].argmax())

    def _decode(self, tokens: list[tuple[int, int, int, bool]]) -> list[np.ndarray]:
        """One call with (id, position, sequence, whether logits are wanted) each; views of the wanted logits."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, (token, position, row, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
        if code := c.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode returned {code}")
        places = [i for i, token in enumerate(tokens) if token[3]]
        return [self._logits(i) for i in places]

    def _logits(self, place: int) -> np.ndarray:
        pointer = ctypes.cast(c.llama_get_logits_ith(self.context, place), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(pointer, (self.vocabulary,))


if __name__ == "__main__":
    serve(LlamaCpp)
