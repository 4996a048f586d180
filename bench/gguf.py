"""GGUF files that Herd writes, run by llama.cpp: does it make the same greedy tokens as Herd does?

    python -m bench.gguf [--build build/bench] [--new 64] [--out bench/results/gguf.json]

Random weights in three shapes: with Scout's and with Maverick's number of experts, and a small one with RoPE scaling.
Each is converted to every type, loaded by llama.cpp, and read back by Herd in float32. In float32 both must agree, in
the last shape also after a prompt that is longer than an attention chunk. In other types llama.cpp rounds activations,
too, and Herd does not, so it is counted how many tokens are the same until the first that is not. llama.cpp attends
without flash attention, which rounds keys and values to float16.
"""

import argparse
import json
import random
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.checkpoints import TINY, write_folder
from bench.peers import Refused, Runner, python_of, versions
from herd import checkpoint
from herd.config import RopeScaling
from herd.engine import Engine, Request, stream
from herd.model import Transformer

THREADS, LIMIT = 1, 1200.0
SHORT, LONG = 96, 8260  # tokens of prompts
TYPES = ("fp32", "bf16", "fp16", "int8", "int4")
SHAPES = {
    "scout": replace(TINY, num_local_experts=16, interleave_moe_layer_step=1),
    "maverick": replace(TINY, num_local_experts=128, use_qk_norm=False),
    "scaled": replace(TINY, num_local_experts=4, rope_scaling=RopeScaling(16.0, 1.0, 1.0, 8192)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=Path("build/bench"))
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    try:
        python = python_of("llama.cpp", args.build / "venvs")
    except Refused as reason:
        sys.exit(f"llama.cpp cannot be installed: {reason}")
    lengths = [SHORT] * 4
    torch.set_num_threads(THREADS)
    found: dict[str, Any] = {}
    for shape, cfg in SHAPES.items():
        root = args.build / "models" / f"gguf-{shape}"
        shutil.rmtree(root, ignore_errors=True)
        folder = write_folder(cfg, root / "hf", dtype=torch.bfloat16)
        for kind in TYPES:
            path, long = root / f"{kind}.gguf", kind == "fp32" and cfg.rope_scaling is not None
            prompts = [_prompt(n, row) for row, n in enumerate([*lengths, *([LONG] if long else [])])]
            checkpoint.convert(folder, path, format="gguf", dtype=kind)
            theirs = _by_llama_cpp(python, path, args.build, prompts, args.new)
            ours = _by_herd(checkpoint.load(path, torch.float32), prompts, args.new)
            found[f"{shape} {kind}"] = _compared(ours, theirs)
            print(f"{shape} {kind}: {found[f'{shape} {kind}']}", flush=True)
    result = {"versions": versions("llama.cpp", python), "new": args.new, "prompts": lengths, "long": LONG, **found}
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    wrong = [name for name, one in found.items() if name.endswith("fp32") and one["same"] < one["tokens"]]
    sys.exit(f"llama.cpp makes other tokens than Herd: {', '.join(wrong)}" if wrong else 0)


def _prompt(tokens: int, row: int) -> list[int]:
    return random.Random(row).choices(range(64, TINY.vocab_size), k=tokens)


def _by_llama_cpp(python: Path, path: Path, build: Path, prompts: Sequence[list[int]], new: int) -> list[list[int]]:
    runner = Runner("llama.cpp", python, build / "logs" / "gguf.log", THREADS)
    try:
        length = max(map(len, prompts)) + new
        runner.ask(LIMIT, "load", path=str(path), threads=THREADS, length=length, sequences=1, kv="F32", flash_attn=0)
        return [runner.ask(LIMIT, "greedy", ids=ids, new=new)["ids"] for ids in prompts]
    finally:
        runner.stop()


@torch.inference_mode()
def _by_herd(transformer: Transformer, prompts: Sequence[list[int]], new: int) -> list[list[int]]:
    rows = []
    for ids in prompts:
        engine = Engine(transformer)
        engine.submit(Request(ids, new))
        rows.append([token.id for token in stream(engine)])
    return rows


def _compared(ours: list[list[int]], theirs: list[list[int]]) -> dict[str, int]:
    """Tokens in all, and how many of them are the same before the first of each prompt that is not."""
    same = 0
    for a, b in zip(ours, theirs, strict=True):
        assert len(a) == len(b)
        same += next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
    return {"tokens": sum(map(len, ours)), "same": same}


if __name__ == "__main__":
    main()
