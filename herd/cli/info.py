"""`herd info`: what a model is, or what this installation runs with."""

import os
import platform
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer

from herd import __version__
from herd.cli.output import JsonFlag, examples, print_json
from herd.config import PRESETS, TextConfig

NAME = "info"
EXAMPLES = examples("herd info", "herd info scout", "herd info cria --json", "herd info ./my-model")


def command(
    model: Annotated[
        str | None, typer.Argument(metavar="[NAME|DIR]", help=f"cria, {', '.join(PRESETS)}, or a model folder.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Describe a model: architecture, parameters, layer map, bytes. Without one: versions, threads, operations."""
    found = installation() if model is None else describe(model)
    if as_json:
        print_json(found)
        return
    width = max(map(len, found))
    below = "\n" + " " * (width + 2)
    for name, value in found.items():
        lines = _by_implementation(value) if name == "operations" else [_shown(value)]
        print(f"{name.replace('_', ' '):{width}}  {below.join(lines)}")


def installation() -> dict[str, Any]:
    """Versions, threads, and which implementation each hot operation uses."""
    import torch

    from herd import kernels

    return {
        "herd": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "operations": kernels.operations(),
    }


def describe(name: str) -> dict[str, Any]:
    """A preset by name, or a model folder read from its config.json and file sizes; no weight is loaded."""
    if name in PRESETS and not Path(name).exists():
        return {"model": name, **_architecture(PRESETS[name])}
    from herd.checkpoint.names import find_model
    from herd.checkpoint import read_config

    folder = find_model(name).folder
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return {"model": str(folder), **_architecture(read_config(folder)), "weight_bytes": weights}


def _architecture(cfg: TextConfig) -> dict[str, Any]:
    kv_bytes = 2 * cfg.num_key_value_heads * cfg.head_dim
    return {
        "parameters": cfg.num_parameters(),
        "active_parameters": cfg.num_parameters(active=True),
        "layers": cfg.num_hidden_layers,
        "layer_map": layer_map(cfg),
        "hidden_size": cfg.hidden_size,
        "heads": {"query": cfg.num_attention_heads, "key_value": cfg.num_key_value_heads, "size": cfg.head_dim},
        "experts": {
            "routed": cfg.num_local_experts,
            "per_token": cfg.num_experts_per_tok,
            "width": cfg.intermediate_size,
        },
        "vocabulary": cfg.vocab_size,
        "chunk": cfg.attention_chunk_size,
        "context": cfg.max_position_embeddings,
        "bf16_bytes": 2 * cfg.num_parameters(),
        "bf16_kv_bytes_per_token": 2 * kv_bytes * len(cfg.global_layers),
    }


def layer_map(cfg: TextConfig) -> str:
    """One pair of letters per layer: l local or G global attention, then d dense or E expert feed-forward.

    Runs and repeated groups are counted, so Scout is `12x(3xlE GE)`.
    """
    kinds = [("l" if cfg.is_local(i) else "G") + ("E" if cfg.is_moe(i) else "d") for i in range(cfg.num_hidden_layers)]
    n = len(kinds)
    period = next(p for p in range(1, n + 1) if n % p == 0 and kinds[:p] * (n // p) == kinds)
    runs = [(kind, len(list(run))) for kind, run in groupby(kinds[:period])]
    group = " ".join(kind if count == 1 else f"{count}x{kind}" for kind, count in runs)
    return group if period == n else f"{n // period}x({group})"


def _by_implementation(operations: dict[str, str]) -> list[str]:
    """One line for each implementation, with all that it does."""
    return [
        f"{implementation}: {', '.join(name for name, by in operations.items() if by == implementation)}"
        for implementation in sorted(set(operations.values()))
    ]


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_shown(v)}" for k, v in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)
