"""The curve of a run, drawn from its metrics."""

import json
from pathlib import Path

from herd.errors import ConfigError

_WINDOW = 20  # steps; a single step is noise
_SHARES = ("mass", "correct")  # figures between 0 and 1; the other drawn ones are losses
_LOSSES = ("evidence", "answer", "text")


def draw(run_dir: Path) -> Path:
    """Draw losses and shares of both phases over the steps; returns RUN_DIR/curve.png.

    ConfigError if matplotlib is not installed, or the run has no metrics yet.
    """
    try:
        # The object-oriented interface needs no display and no state between calls.
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("drawing a curve needs matplotlib; pip install 'herd-llm[train]'") from None
    phases = [phase for phase in ("looking", "answering") if (run_dir / phase / "metrics.jsonl").exists()]
    if not phases:
        raise ConfigError(f"{run_dir} holds no steps; train first")
    figure = Figure(figsize=(9, 3.6 * len(phases)), layout="constrained")
    for phase, (loss, share) in zip(phases, figure.subplots(len(phases), 2, squeeze=False), strict=True):
        curves = read(run_dir / phase / "metrics.jsonl")
        for axes, names in ((loss, _LOSSES), (share, _SHARES)):
            for name in names:
                if name in curves:
                    axes.plot(*smoothed(curves[name]), label=name)
            axes.set(xlabel="step", title=f"{phase}, mean of {_WINDOW} steps")
            axes.grid(alpha=0.3)
            axes.legend()
        loss.set(yscale="log")
        share.set(ylim=(0, 1))
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
