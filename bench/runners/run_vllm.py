"""vLLM on CPU: its engine in this process, step by step, so that the first token can be told from the others."""

import os

# Read at import.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_TARGET_DEVICE": "cpu", "VLLM_NO_USAGE_STATS": "1"}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB

from typing import Any

from serve import Stopwatch, prompts, serve
from vllm import LLM, SamplingParams, TokensPrompt


class Vllm:
    def __init__(self, path: str, threads: int, length: int, sequences: int, **settings: Any) -> None:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{threads - 1}"
        asked = {"dtype": "bfloat16", "max_num_seqs": sequences, "max_num_batched_tokens": 2048}
        asked |= {"enable_prefix_caching": False, **settings}
        self.llm = LLM(model=path, max_model_len=length, skip_tokenizer_init=True, **asked)
        self.vocabulary = self.llm.model_config.get_vocab_size()
        self.settings = {
            **asked,
            "threads": threads,
            "preloaded": [os.path.basename(x) for x in os.environ.get("LD_PRELOAD", "").split(":")],
        }

    def run(self, sequences: int, prompt: int, new: int) -> dict[str, float]:
        engine = self.llm.llm_engine
        params = SamplingParams(temperature=0, max_tokens=new + 1, ignore_eos=True, detokenize=False)
        rows = prompts(sequences, prompt, self.vocabulary)
        watch = Stopwatch()
        for row, ids in enumerate(rows):
            engine.add_request(str(row), TokensPrompt(prompt_token_ids=ids), params)
        begun: set[str] = set()
        while engine.has_unfinished_requests():
            begun |= {out.request_id for out in engine.step() if out.outputs and out.outputs[0].token_ids}
            if len(begun) == sequences:
                watch.first()
        return watch.result(prompt, new)

    def logprobs(self, ids: list[int]) -> dict[str, Any]:
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        out = self.llm.generate([TokensPrompt(prompt_token_ids=ids)], params)[0]
        return {"logprobs": [found[id].logprob for id, found in zip(ids[1:], out.prompt_logprobs[1:], strict=True)]}


if __name__ == "__main__":
    serve(Vllm)
