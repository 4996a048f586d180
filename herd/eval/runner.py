"""One entry for all evaluations: run one at some lengths, add what the result must say about itself, write JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from herd.api import Model
from herd.errors import ConfigError
from herd.eval import baselines, context, corpus, lookup, needle, perplexity, quantisation, report

NAMES = ("needle", "lookup", "perplexity", "quantisation", "context")
_TRIALS = {"needle": 100, "lookup": 200, "perplexity": 100, "quantisation": 40}
_BASE = ("lookup", "perplexity")  # evaluations that also measure the unchanged base model
_PLAIN = ("perplexity", "quantisation")  # those without a context


def run(
    name: str,
    model: Model,
    *,
    lengths: Sequence[str | int],
    trials: int | None = None,
    out: Path | None = None,
    workdir: Path,
    progress: corpus.Progress = print,
    seed: int = 0,
    kv: str | None = None,
    quote: bool = True,
    with_base: bool = True,
) -> report.Result:
    """Run evaluation `name` at each length and return (and write to `out`) one result.

    trials: needles, questions or windows; None takes the published number. workdir keeps sources and contexts, so
    that a second run reads nothing again. kv: the format of contexts; None is int8. quote: as for `Context.ask`.
    with_base: also measure the unchanged base model (slow for lookup). ConfigError for an unknown name, no length, or
    what the evaluation ignores.
    """
    count = _TRIALS.get(name, 1) if trials is None else trials
    _check(name, model, lengths, trials, count, kv, quote, with_base)
    needs_base = with_base and name in _BASE
    base = baselines.base_model(workdir, progress) if needs_base else None
    results = [
        _one(name, model, length, count, workdir, progress, seed, kv or "int8", quote, base)
        for length in ([perplexity.WINDOW] if name in _PLAIN else lengths)
    ]
    command = _command(name, model, lengths, count, seed, kv or "int8", quote, with_base)
    result = {**report.about(command, Path(model.name).name, model.fingerprint, seed), "results": results}
    if out is not None:
        report.write_json(result, out)
    return result


def _check(
    name: str,
    model: Model,
    lengths: Sequence[str | int],
    trials: int | None,
    count: int,
    kv: str | None,
    quote: bool,
    with_base: bool,
) -> None:
    """ConfigError for what cannot be measured, before anything is read."""
    if name not in NAMES:
        raise ConfigError(f"no evaluation is called {name!r}; choose one of {', '.join(NAMES)}")
    if not lengths and name not in _PLAIN:
        raise ConfigError(f"evaluation {name} needs at least one length, like 128K or 1M")
    if name in _PLAIN and (lengths or kv is not None):
        raise ConfigError(f"{name} is measured without a context; leave --length and --kv out")
    if not quote and name not in ("needle", "lookup"):
        raise ConfigError(f"evaluation {name} judges no answers; leave --free out")
    if trials is not None and name not in _TRIALS:
        raise ConfigError(f"evaluation {name} always asks the same; leave --trials out")
    if not with_base and name not in _BASE:
        raise ConfigError(f"evaluation {name} measures no base model; leave --no-base out")
    if count < 1:
        raise ConfigError(f"trials is {count}; it must be at least 1")
    for length in lengths:
        corpus.check_room(model, length, count * needle.MOST_TOKENS if name == "needle" else 0)


def _command(
    name: str,
    model: Model,
    lengths: Sequence[str | int],
    count: int,
    seed: int,
    kv: str,
    quote: bool,
    with_base: bool,
) -> str:
    """The command that measures this again; a model's folder without where it is."""
    parts = [f"herd eval {name}"]
    if name not in _PLAIN:
        parts.append(f"--length {','.join(str(length) for length in lengths)}")
    if name in _TRIALS:
        parts.append(f"--trials {count}")
    parts.append(f"--seed {seed}")
    parts += [f"--kv {kv}"] * (kv != "int8")
    parts += ["--free"] * (not quote)
    parts += ["--no-base"] * (not with_base)
    parts += [f"--model {Path(model.name).name}"] * (model.name != "cria")
    return " ".join(parts)


def _one(
    name: str,
    model: Model,
    length: str | int,
    count: int,
    workdir: Path,
    progress: corpus.Progress,
    seed: int,
    kv: str,
    quote: bool,
    base: Model | None,
) -> report.Result:
    if name == "needle":
        return needle.needle(model, length, count, workdir, progress, seed=seed, kv=kv, quote=quote)
    if name == "lookup":
        packages = corpus.HELD_OUT
        return lookup.lookup(
            model, packages, length, count, workdir, progress, seed=seed, kv=kv, quote=quote, base=base
        )
    if name == "context":
        return context.context(model, length, workdir, progress, seed=seed, kv=kv)
    if name == "quantisation":
        return quantisation.quantisation(model, count, progress)
    return perplexity.perplexity(model, base, count, progress)


def summary(result: report.Result) -> list[dict[str, object]]:
    """The figures of each length without the rows of single questions, for people."""
    return [{key: value for key, value in one.items() if "rows" not in key} for one in result["results"]]
