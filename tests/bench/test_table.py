"""Tables of result files: medians, shares of what the machine can do, and who cannot run."""

import json
from pathlib import Path
from typing import Any

from bench import table
from bench.checkpoints import MODELS
from bench.limits import decode_bytes


def case(speeds: dict[str, list[float]]) -> dict[str, Any]:
    """Runs of the middle model with so many tokens a second; memory gives what 100 a second read in 8 bits."""
    subjects: dict[str, Any] = {"llama.cpp Q4_0": {"refused": "not installed"}}
    for name, its in speeds.items():
        runs = [{"prompt": 512, "new": 2, "prefill_s": 1.0, "decode_s": 2 / speed} for speed in its]
        subjects[name] = {"peak_gb": 1.0, "runs": runs}
    moved = decode_bytes(MODELS["mid"], table.SUBJECTS["herd int8"].weight_bits, 16, 513)
    limits = {"read_bytes_per_s": 100 * moved, "bf16_ops_per_s": 1e12, "int8_ops_per_s": 1e12}
    return {"model": "mid", "sequences": 1, "prompt": 512, "new": 2, "limits": limits, "subjects": subjects}


def test_medians_beside_the_best_that_can_run(tmp_path: Path) -> None:
    speeds = {"herd int8": [60.0, 90.0, 1.0], "herd int4": [80.0], "llama.cpp Q8_0": [40.0]}
    (tmp_path / "a.json").write_text(json.dumps({"cases": {"mid-512": case(speeds)}}))
    (tmp_path / "b.json").write_text(json.dumps({"cases": {"mid-4K": case(speeds)}}))
    cases = table.load([tmp_path / "a.json", tmp_path / "b.json"])
    assert list(cases) == ["mid-512", "mid-4K"]
    lines = table.ratios(cases).splitlines()
    assert "| mid-512, making tokens: herd int8 beside llama.cpp Q8_0 | 1.50 × | ≥ 1.5 × |" in lines
    assert not any("Q4_0" in line for line in lines), "it cannot run"
    assert any(
        line.startswith("| mid-512, making tokens: share of memory read in 8 and 4 bits | 60%, ") for line in lines
    )
    assert "| llama.cpp Q4_0 | cannot: not installed | | | | |" in table.table(cases)
