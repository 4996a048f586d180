"""The result files of `bench.side_by_side` as tables to read.

python -m bench.table [bench/results/side-by-side*.json]

`ratios` says how many times as fast as its peers Herd is, beside what is asked for.
"""

import json
import statistics
import sys
from collections.abc import Iterable
from glob import glob
from pathlib import Path
from typing import Any

from bench.checkpoints import MODELS
from bench.limits import decode_bytes, prefill_operations
from bench.peers import SUBJECTS

RESULTS = "bench/results/side-by-side*.json"
EIGHT, FOUR = ("herd int8", ("llama.cpp Q8_0",)), ("herd int4", ("llama.cpp Q4_0",))
LLAMA = ("llama.cpp Q8_0", "llama.cpp Q4_0")
ANY = (*LLAMA, "vllm bf16", "vllm bf16 eager", "transformers bf16")
# Case, figure, Herd's subject, the peers of which the best counts, times as fast at least.
GOALS = (
    ("mid-512", "decode", *EIGHT, 1.5),
    ("mid-512", "decode", *FOUR, 1.5),
    ("mid-4K", "decode", *EIGHT, 2.0),
    ("mid-4K", "decode", *FOUR, 2.0),
    ("mid-512", "prefill", "herd int8", LLAMA, 2.5),
    ("mid-4K", "prefill", "herd int8", LLAMA, 3.5),
    ("mid-16K", "prefill", "herd int8", LLAMA, 5.0),
    ("small-16x", "total", "herd int8", ANY, 1.5),
    ("mid-16x", "total", "herd int8", ANY, 1.5),
    ("small-128K", "total", "herd context int8", ANY, 4.0),
)
SHARES = (("decode", "share of memory read", 0.75), ("prefill", "share of GEMM peak", 0.60))
WHAT = {"decode": "making tokens", "prefill": "reading the prompt", "total": "both"}


def load(files: Iterable[Path]) -> dict[str, Any]:
    """The cases of all files."""
    return {title: case for file in files for title, case in json.loads(file.read_text())["cases"].items()}


def figures(case: dict[str, Any], name: str) -> dict[str, float]:
    """Medians over the rounds: tokens/s, seconds to the first token, shares of what the machine can do."""
    runs, subject, cfg = case["subjects"][name]["runs"], SUBJECTS[name], MODELS[case["model"]]
    sequences = case["sequences"]
    out = {
        "prefill": statistics.median(sequences * run["prompt"] / run["prefill_s"] for run in runs),
        "decode": statistics.median(sequences * run["new"] / run["decode_s"] for run in runs),
        "total": statistics.median(sequences * (run["new"] + 1) / (run["prefill_s"] + run["decode_s"]) for run in runs),
    }
    if sequences == 1:
        limits = case["limits"]
        moved = decode_bytes(cfg, subject.weight_bits, subject.kv_bits, case["prompt"] + case["new"] // 2)
        done = prefill_operations(cfg, case["prompt"]) / case["prompt"]
        peak = limits["bf16_ops_per_s" if subject.weight_bits == 16 else "int8_ops_per_s"]
        out["share of memory read"] = out["decode"] * moved / limits["read_bytes_per_s"]
        out["share of GEMM peak"] = out["prefill"] * done / peak
    return out


def ratios(cases: dict[str, Any]) -> str:
    """Markdown: a row for each goal that was measured, and the shares of what the machine can do."""
    lines = ["| what | measured | goal |", "|---|---|---|"]
    for title, figure, ours, peers, goal in GOALS:
        found = cases.get(title, {"subjects": {}})["subjects"]
        speeds = {name: figures(cases[title], name)[figure] for name in found if "runs" in found[name]}
        able = [name for name in peers if name in speeds]
        if ours in speeds and able:
            best = max(able, key=lambda name: speeds[name])
            what = f"{title}, {WHAT[figure]}: {ours} beside {best}"
            lines.append(f"| {what} | {speeds[ours] / speeds[best]:.2f} × | ≥ {goal:g} × |")
    for figure, share, goal in SHARES:
        for title, case in cases.items():
            if case["model"] == "mid" and case["sequences"] == 1:
                reached = [figures(case, name)[share] for name in ("herd int8", "herd int4")]
                what = f"{title}, {WHAT[figure]}: {share} in 8 and 4 bits"
                lines.append(f"| {what} | {reached[0]:.0%}, {reached[1]:.0%} | ≥ {goal:.0%} |")
    return "\n".join(lines)


def table(cases: dict[str, Any]) -> str:
    """Markdown, one table for each case."""
    lines = []
    for title, case in cases.items():
        what = f"{case['model']} model, {case['sequences']} × {case['prompt']:,} tokens read, {case['new']} made"
        lines += [f"**{title}**: {what}", ""]
        lines += _many(case) if case["sequences"] > 1 else _single(case)
        lines += [""]
    return "\n".join(lines)


def _single(case: dict[str, Any]) -> list[str]:
    lines = [
        "| | prefill tokens/s | of GEMM peak | decode tokens/s | of memory read | peak GB |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in case["subjects"].items():
        if "refused" in found:
            lines.append(f"| {name} | cannot: {found['refused']} | | | | |")
            continue
        f = figures(case, name)
        shares = [f"{f[key]:.0%}" if key in f else "" for key in ("share of GEMM peak", "share of memory read")]
        cells = [f"{f['prefill']:,.0f}", shares[0], f"{f['decode']:,.1f}", shares[1], f"{found['peak_gb']:.1f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _many(case: dict[str, Any]) -> list[str]:
    lines = ["| | new tokens/s, all in all | prefill tokens/s | decode tokens/s | peak GB |", "|---|---|---|---|---|"]
    for name, found in case["subjects"].items():
        if "refused" in found:
            lines.append(f"| {name} | cannot: {found['refused']} | | | |")
            continue
        f = figures(case, name)
        cells = [f"{f['total']:,.1f}", f"{f['prefill']:,.0f}", f"{f['decode']:,.1f}", f"{found['peak_gb']:.1f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    cases = load(map(Path, sys.argv[1:] or sorted(glob(RESULTS), reverse=True)))
    print(ratios(cases), table(cases), sep="\n\n")
