"""The result file of `bench.side_by_side` as tables to read.

python -m bench.table [bench/results/side-by-side.json]
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from bench.checkpoints import MODELS
from bench.limits import decode_bytes, prefill_operations
from bench.peers import SUBJECTS

FILE = Path("bench/results/side-by-side.json")


def figures(case: dict[str, Any], name: str, limits: dict[str, float]) -> dict[str, float]:
    """Medians over the rounds: tokens/s, seconds to the first token, shares of what the machine can do."""
    runs, subject, cfg = case["subjects"][name]["runs"], SUBJECTS[name], MODELS[case["model"]]
    sequences = case["sequences"]
    out = {
        "prefill": statistics.median(sequences * run["prompt"] / run["prefill_s"] for run in runs),
        "decode": statistics.median(sequences * run["new"] / run["decode_s"] for run in runs),
        "total": statistics.median(sequences * (run["new"] + 1) / (run["prefill_s"] + run["decode_s"]) for run in runs),
    }
    if limits and sequences == 1:
        moved = decode_bytes(cfg, subject.weight_bits, subject.kv_bits, case["prompt"] + case["new"] // 2)
        done = prefill_operations(cfg, case["prompt"]) / case["prompt"]
        peak = limits["bf16_ops_per_s" if subject.weight_bits == 16 else "int8_ops_per_s"]
        out["share of read"] = out["decode"] * moved / limits["read_bytes_per_s"]
        out["share of peak"] = out["prefill"] * done / peak
    return out


def table(result: dict[str, Any]) -> str:
    """Markdown, one table for each case."""
    lines = []
    for title, case in result["cases"].items():
        what = f"{case['model']} model, {case['sequences']} × {case['prompt']:,} tokens read, {case['new']} made"
        lines += [f"**{title}**: {what}", ""]
        lines += _many(case) if case["sequences"] > 1 else _single(case, result["limits"])
        lines += [""]
    return "\n".join(lines)


def _single(case: dict[str, Any], limits: dict[str, float]) -> list[str]:
    lines = [
        "| | prefill tokens/s | of GEMM peak | decode tokens/s | of memory read | peak GB |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in case["subjects"].items():
        if "refused" in found:
            lines.append(f"| {name} | cannot: {found['refused']} | | | | |")
            continue
        f = figures(case, name, limits)
        shares = [f"{f[key]:.0%}" if key in f else "" for key in ("share of peak", "share of read")]
        cells = [f"{f['prefill']:,.0f}", shares[0], f"{f['decode']:,.1f}", shares[1], f"{found['peak_gb']:.1f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _many(case: dict[str, Any]) -> list[str]:
    lines = ["| | new tokens/s, all in all | prefill tokens/s | decode tokens/s | peak GB |", "|---|---|---|---|---|"]
    for name, found in case["subjects"].items():
        if "refused" in found:
            lines.append(f"| {name} | cannot: {found['refused']} | | | |")
            continue
        f = figures(case, name, {})
        cells = [f"{f['total']:,.1f}", f"{f['prefill']:,.0f}", f"{f['decode']:,.1f}", f"{found['peak_gb']:.1f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1] if len(sys.argv) > 1 else FILE).read_text())))
