"""Memory that a plan says a process needs, against processes: random models, packed, read and asked on this CPU.

Usage: python -m bench.plan [--only NAME] [--out bench/results/plan.json] [--work build/plan]

Each case is a process of its own. It imports Herd and runs a model of next to no size in the same format, so that the
pages of libraries are there; then it sets the kernel's mark of its most memory (VmHWM) back, loads the case's model as
`herd.load` does, but for the tokenizer, reads a prompt of random tokens and goes on for a few, and looks at the mark.
"""

import argparse
import json
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.checkpoints import SMALL
from herd import checkpoint, kernels
from herd.engine import generate
from herd.formats import Weights, parse
from herd.model import Transformer
from herd.model.quantized import Fill, pack_halves, quantize
from herd.plan.process import Process, process

ANSWER = 8  # tokens
WARM = "warm"  # the shape of next to no size
LOW = replace(SMALL, vocab_size=16384)
SHAPES = {
    WARM: replace(LOW, vocab_size=256, hidden_size=64, num_hidden_layers=4, intermediate_size=64, num_local_experts=2),
    "experts": LOW,
    "wide": replace(
        LOW, hidden_size=1024, head_dim=128, num_hidden_layers=8, intermediate_size=2304, num_local_experts=4
    ),
    "dense": replace(LOW, hidden_size=768, num_hidden_layers=16, intermediate_size_mlp=4096, num_local_experts=0),
    "global": replace(LOW, num_hidden_layers=12, nope_layer_interval=2, num_key_value_heads=8, num_local_experts=4),
}


@dataclass(frozen=True)
class Case:
    shape: str
    weights: str
    context: int


CASES = {
    "experts-bf16": Case("experts", "bf16", 4096),
    "experts-int4": Case("experts", "int4:32", 32768),
    "wide-int8": Case("wide", "int8", 6000),
    "wide-mixed": Case("wide", "experts=int4,shared=int8", 16384),
    "dense-int8": Case("dense", "int8:32", 12288),
    "global-int4": Case("global", "int4", 20000),
}


def predicted(case: Case) -> Process:
    return process(SHAPES[case.shape], parse(case.weights), case.context)


def write(shape: str, work: Path) -> None:
    """A checkpoint of random numbers in bfloat16, in one file."""
    if not (work / shape).exists():
        torch.manual_seed(0)
        checkpoint.save(Transformer(SHAPES[shape]).to(torch.bfloat16), work / shape)


def load(folder: Path, weights: Weights) -> Transformer:
    """As `herd.load` does."""

    def change(model: Transformer, fill: Fill) -> None:
        if weights == Weights():
            pack_halves(model, fill)
        else:
            quantize(model, weights, fill)

    return checkpoint.load(folder, torch.bfloat16, change=change)


def run(shape: str, work: Path, weights: Weights, context: int) -> Transformer:
    model = load(work / shape, weights)
    ids = torch.randint(SHAPES[shape].vocab_size, (context - ANSWER,)).tolist()
    (answer,) = generate(model, [ids], max_tokens=ANSWER)
    assert len(answer) == ANSWER
    return model


def child(case: Case, work: Path) -> dict[str, int]:
    """What the process that this runs in takes, in bytes."""
    weights = parse(case.weights)
    small = run(WARM, work, weights, 64)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes what is there now
    before = status()
    large = run(case.shape, work, weights, case.context)
    after = status()
    assert small is not large  # both are there until now
    return {
        "baseline": before["VmRSS"],
        "peak": after["VmHWM"] - before["VmRSS"],
        "own_at_end": after["RssAnon"] - before["RssAnon"],
        "mapped_at_end": after["RssFile"] - before["RssFile"],
    }


def status() -> dict[str, int]:
    """Memory of this process in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    names = ("VmHWM", "VmRSS", "RssAnon", "RssFile")
    return {name: int(lines[name].split()[0]) * 1024 for name in names}


def measure(name: str, work: Path) -> dict[str, Any]:
    case = CASES[name]
    for shape in (WARM, case.shape):
        write(shape, work)
    command = [sys.executable, "-m", "bench.plan", "--child", name, "--work", str(work)]
    found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    need = predicted(case)
    plan = {**asdict(need), "own": need.own, "peak": need.peak}
    error = need.peak / found["peak"] - 1
    parameters = SHAPES[case.shape].num_parameters()
    return {**asdict(case), "parameters": parameters, "planned": plan, "measured": found, "error": round(error, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CASES)
    parser.add_argument("--child", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("bench/results/plan.json"))
    parser.add_argument("--work", type=Path, default=Path("build/plan"), help="keeps the checkpoints")
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(CASES[args.child], args.work)))
        return
    results = {}
    for name in [args.only] if args.only else CASES:
        results[name] = result = measure(name, args.work)
        planned, found = result["planned"]["peak"] / 1e6, result["measured"]["peak"] / 1e6
        print(f"{name:14}  planned {planned:8,.1f} MB  measured {found:8,.1f} MB  {result['error']:+.1%}", flush=True)
    if not args.only:
        about = {"torch": torch.__version__, "kernels": kernels.implementation(), "system": platform.platform()}
        args.out.write_text(json.dumps({"command": "python -m bench.plan", **about, "cases": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
