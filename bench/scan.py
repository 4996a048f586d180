"""Attention of one token over a context of Cria's shape, beside the time to read its keys from memory.

    python bench/scan.py [--tokens 1000000] [--kv int4] [--reference] > bench/results/scan.json

Keys and values are random; queries are near one of the keys (as a look that found something) or near none (so that
values of many tokens must be read).
"""

import argparse
import json
import os
import platform
import sys
from typing import Any

import torch

from herd import kernels
from herd.context.segment import KV
from herd.eval.limits import median_seconds

HEADS, GROUP, DIM = 3, 3, 64
PART = 8192
SURE = 40.0  # logit of the key that a look finds; those of the others vary by 5, so a few in ten thousand values matter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--kv", choices=("int8", "int4"), default="int8", help="how keys and values are kept")
    parser.add_argument("--reference", action="store_true", help="also time the reference (slow)")
    options = parser.parse_args()
    torch.manual_seed(0)
    sizes = [min(PART, options.tokens - i) for i in range(0, options.tokens, PART)]
    parts = kernels.Parts(random_part(size, options.kv) for size in sizes)
    found = kernels.dequantize_kv(parts[0].k_GNd[:, :1], parts[0].k_scale_GN[:, :1], torch.float32)
    found = found.expand(-1, GROUP, -1) * SURE / (found.norm(dim=-1, keepdim=True) ** 2)
    near_none = torch.randn(HEADS, GROUP, DIM) * 0.1
    key_bytes = sum(p.k_GNd.nbytes + p.k_scale_GN.nbytes for p in parts)
    read = median_seconds(lambda: [p.k_GNd.view(torch.int64).sum() for p in parts])
    rows = {"found": found, "near none": near_none}
    result: dict[str, Any] = {
        "command": " ".join(["python bench/scan.py", *sys.argv[1:]]),
        "implementation": kernels.implementation(),
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "tokens": options.tokens,
        "read_keys_s": round(read, 4),
        "read_keys_gb_per_s": round(key_bytes / read / 1e9, 2),
    }
    for name, q_GRd in rows.items():
        seconds = median_seconds(lambda q=q_GRd: kernels.attend_parts(q, parts, 1e-3))
        missed = float(kernels.attend_parts(q_GRd, parts, 1e-3).left_out_GR.max())
        row = {"seconds": round(seconds, 4), "share_of_read": round(read / seconds, 3), "left_out": missed}
        if options.reference:
            slow = median_seconds(lambda q=q_GRd: kernels.reference.attend_parts(q, parts, 0.0), 3)
            row["times_faster_than_reference"] = round(slow / seconds, 1)
        result[name] = row
    print(json.dumps(result, indent=1))


def random_part(tokens: int, kv: str) -> KV:
    """Codes drawn evenly; in 4 bits scales are larger, so that numbers are as large as in 8."""
    if kv == "int8":
        codes, shape, step = torch.int8, (HEADS, tokens, DIM), 1e-3
    else:
        codes, shape, step = torch.uint8, (HEADS, tokens, DIM // 2), 16e-3
    limits = torch.iinfo(codes)
    k, v = (torch.randint(limits.min, limits.max + 1, shape, dtype=codes) for _ in range(2))
    return KV(k, v, torch.full((HEADS, tokens), step).half(), torch.full((HEADS, tokens), step).half())


if __name__ == "__main__":
    main()
