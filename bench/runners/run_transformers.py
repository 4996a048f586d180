"""transformers: its Llama 4 in bfloat16, with a cache and a prompt fed in pieces."""

from typing import Any

import torch
from serve import Stopwatch, prompts, serve
from transformers import AutoModelForCausalLM, DynamicCache

PIECE = 2048  # all at once, its masks alone would fill the memory at 128K


class Transformers:
    def __init__(self, path: str, threads: int, length: int, sequences: int, dtype: str = "bfloat16") -> None:
        torch.set_num_threads(threads)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), attn_implementation="sdpa")
        self.model.eval()
        self.settings = {"dtype": dtype, "attention": "sdpa", "piece": PIECE, "threads": threads}

    @torch.inference_mode()
    def run(self, sequences: int, prompt: int, new: int) -> dict[str, float]:
        ids = torch.tensor(prompts(sequences, prompt, self.model.config.vocab_size))
        watch = Stopwatch()
        cache = DynamicCache(config=self.model.config)
        for piece in ids.split(PIECE, 1):
            logits = self.model(input_ids=piece, past_key_values=cache, logits_to_keep=1).logits
        chosen = logits[:, -1:].argmax(-1)
        watch.first()
        for _ in range(new):
            logits = self.model(input_ids=chosen, past_key_values=cache, logits_to_keep=1).logits
            chosen = logits[:, -1:].argmax(-1)
        return watch.result(prompt, new)

    @torch.inference_mode()
    def logprobs(self, ids: list[int]) -> dict[str, Any]:
        logits = self.model(input_ids=torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
        return {"logprobs": logits.gather(1, torch.tensor(ids[1:]).unsqueeze(1)).flatten().tolist()}


if __name__ == "__main__":
    serve(Transformers)
