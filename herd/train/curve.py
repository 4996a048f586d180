"""The curve of a run, drawn from its metrics."""

import json
from pathlib import Path

from herd.errors import ConfigError

_WINDOW = 20  # steps; a single step is noise
_LOSSES = ("answer", "evidence", "text", "quiet")


def draw(run_dir: Path) -> Path:
    """Draw the terms of the loss and the share of correct tokens over the steps; returns RUN_DIR/curve.png.

    ConfigError if matplotlib is not installed, or the run has no metrics yet.
    """
    try:
        # The object-oriented interface needs no display and no state between calls.
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("drawing a curve needs matplotlib; pip install 'herd-llm[train]'") from None
    curves = read(run_dir / "metrics.jsonl")
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    loss, share = figure.subplots(1, 2)
    for name in _LOSSES:
        if name in curves:
            loss.plot(*smoothed(curves[name]), label=name)
    loss.set(xlabel="step", yscale="log", title=f"loss, mean of {_WINDOW} steps")
    loss.legend()
    if "correct" in curves:
        share.plot(*smoothed(curves["correct"]))
    share.set(xlabel="step", ylim=(0, 1), title="share of answer tokens predicted")
    for axes in (loss, share):
        axes.grid(alpha=0.3)
    path = run_dir / "curve.png"
    figure.savefig(path, dpi=120)
    return path


def read(metrics: Path) -> dict[str, list[tuple[int, float]]]:
    """Name → (step, figure) of every step that has it. ConfigError if there is none."""
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    if not lines:
        raise ConfigError(f"{metrics} holds no steps; train first")
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        figures = json.loads(line)
        step = figures.pop("step")
        for name, value in figures.items():
            curves.setdefault(name, []).append((step, value))
    return curves


def smoothed(curve: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """Steps, and at each the mean of the last figures up to it."""
    values = [value for _, value in curve]
    windows = (values[max(0, i + 1 - _WINDOW) : i + 1] for i in range(len(values)))
    return [step for step, _ in curve], [sum(window) / len(window) for window in windows]
