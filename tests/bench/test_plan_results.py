"""The committed comparison of planned memory with processes is of the planner that is here."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from bench.plan import CASES, predicted

RESULTS = json.loads((Path(__file__).parents[2] / "bench/results/plan.json").read_text())["cases"]


@pytest.mark.parametrize("name", CASES)
def test_memory_is_planned_within_five_percent(name: str) -> None:
    found, need = RESULTS[name], predicted(CASES[name])
    assert {key: found[key] for key in ("shape", "weights", "context")} == asdict(CASES[name])
    assert found["planned"] == {**asdict(need), "own": need.own, "peak": need.peak}
    assert abs(need.peak / found["measured"]["peak"] - 1) <= 0.05


def test_every_case_was_measured() -> None:
    assert set(RESULTS) == set(CASES) and len(CASES) == 6
