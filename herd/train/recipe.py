"""A training run as data: one TOML file."""

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from herd.data.pool import PoolRecipe
from herd.errors import ConfigError


@dataclass(frozen=True)
class Model:
    """What is grown (arguments of `upcycle`) and the rank of the updates on layers above the global one (0: frozen)."""

    global_layer: int
    chunk: int
    experts: int
    expert_width: int
    lora_rank: int
    lora_scale: float = 1.0


@dataclass(frozen=True)
class Phase:
    """Steps that train one part of the model: questions over chunks."""

    steps: int
    questions: int
    chunks: int
    rows: int  # answer tokens trained in one step, at the most
    dilute_to: int  # tokens of the longest context to be imitated (virtual dilution)
    lr: float
    warmup: int
    decay: float  # share of the steps, at the end, over which the rate falls to zero
    lora_lr: float = 0.0  # of low-rank updates
    text: float = 0.0  # weight of the loss in plain text: of looking at nothing, or of language modelling
    text_rows: int = 0  # rows of plain text, without a context
    around: int = 0  # chunks near those of the step that looks must tell from the evidence; no gradient goes there
    blind: float = 0.0  # share of looks, for each key/value head, that are made to find nothing
    weight_decay: float = 0.0
    clip: float = 1.0


@dataclass(frozen=True)
class Recipe:
    pool: PoolRecipe
    model: Model
    looking: Phase
    answering: Phase
    checkpoint_every: int = 50
    seed: int = 0
    start: str = ""  # delta of another run to go on from; none: closed-form starts
    compile: bool = False  # the layers above the global one, with torch.compile; needs a C++ compiler


def load_recipe(path: Path) -> Recipe:
    """Read a recipe. ConfigError names what is missing, unknown or of the wrong type."""
    try:
        raw = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    tables = {"pool": PoolRecipe, "model": Model, "looking": Phase, "answering": Phase}
    parts = {name: _table(kind, raw.pop(name, {}), f"{path} [{name}]") for name, kind in tables.items()}
    return _table(Recipe, {**raw, **parts}, str(path))


def _table(kind: type, raw: Any, where: str) -> Any:
    if not isinstance(raw, dict):
        raise ConfigError(f"{where} is {raw!r}; it must be a table")
    known = {f.name for f in fields(kind)}
    if unknown := set(raw) - known:
        raise ConfigError(f"{where}: unknown {', '.join(sorted(unknown))}; known are {', '.join(sorted(known))}")
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in raw.items()}
    hints = get_type_hints(kind)
    for name, value in values.items():
        if not _fits(value, hints[name]):
            shown = getattr(hints[name], "__name__", "") if isinstance(hints[name], type) else str(hints[name])
            raise ConfigError(f"{where}: {name} is {raw[name]!r}; it must be {shown}")
    try:
        return kind(**values)
    except TypeError as error:
        raise ConfigError(f"{where}: {str(error).removeprefix(kind.__name__ + '.__init__() ')}") from None


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of a TOML file has the type of its field; a float may be written as a whole number."""
    if parts := get_args(hint):
        if not isinstance(value, tuple):
            return False
        if parts[-1] is ...:
            return all(_fits(v, parts[0]) for v in value)
        return len(value) == len(parts) and all(_fits(v, part) for v, part in zip(value, parts, strict=True))
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)
