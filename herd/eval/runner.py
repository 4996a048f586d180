"""One entry for all evaluations: run one at some lengths, add what the result must say about itself, write JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from herd.api import Model
from herd.errors import ConfigError
from herd.eval import baselines, context, corpus, lookup, needle, perplexity, report

NAMES = ("needle", "lookup", "perplexity", "context")
_TRIALS = {"needle": 100, "lookup": 200, "perplexity": 100, "context": 1}


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
    if name not in NAMES:
        raise ConfigError(f"no evaluation is called {name!r}; choose one of {', '.join(NAMES)}")
    if not lengths and name != "perplexity":
        raise ConfigError(f"evaluation {name} needs at least one length, like 128K or 1M")
    if name == "perplexity" and (lengths or kv is not None):
        raise ConfigError("perplexity is measured without a context; leave --length and --kv out")
    if not quote and name not in ("needle", "lookup"):
        raise ConfigError(f"evaluation {name} judges no answers; leave --free out")
    kv = kv or "int8"
    count = _TRIALS[name] if trials is None else trials
    if count < 1:
        raise ConfigError(f"trials is {count}; it must be at least 1")
    needs_base = with_base and name in ("lookup", "perplexity")
    base = baselines.base_model(workdir, progress) if needs_base else None
    results = [
        _one(name, model, length, count, workdir, progress, seed, kv, quote, base)
        for length in (lengths if name != "perplexity" else [perplexity.WINDOW])
    ]
    shown = "" if name == "perplexity" else f" --length {','.join(str(length) for length in lengths)}"
    compared = "" if with_base or name not in ("lookup", "perplexity") else " --no-base"
    kept = "" if kv == "int8" else f" --kv {kv}"
    free = "" if quote else " --free"
    command = f"herd eval {name}{shown} --trials {count} --seed {seed}{kept}{free}{compared}"
    result = {**report.about(command, Path(model.name).name, model.fingerprint, seed), "results": results}
    if out is not None:
        report.write_json(result, out)
    return result


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
    return perplexity.perplexity(model, base, count, progress)


def summary(result: report.Result) -> list[dict[str, object]]:
    """The figures of each length without the rows of single questions, for people."""
    return [{key: value for key, value in one.items() if "rows" not in key} for one in result["results"]]
