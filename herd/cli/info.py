"""`herd info`: what a model is, or what this installation runs with."""

import os
import platform
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer

from herd import __version__
from herd.cli.output import JsonFlag, examples, print_json
from herd.config import MAVERICK, PRESETS, SCOUT, VISION, TextConfig, VisionConfig

NAME = "info"
EXAMPLES = examples("herd info", "herd info scout", "herd info cria --json", "herd info ./my-model", "herd info m.gguf")


def command(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[NAME|DIR|FILE]", help=f"cria, {', '.join(PRESETS)}, a model folder or GGUF file."),
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
    """A preset by name, or a checkpoint by its configuration and what its headers say; no weight is loaded."""
    if name in PRESETS and not Path(name).exists():
        vision = VISION if PRESETS[name] in (SCOUT, MAVERICK) else None  # nothing is known of Behemoth's
        return {"model": name, **_architecture(PRESETS[name], vision), **_licence(PRESETS[name], vision)}
    from herd.checkpoint.hf import read_hf_config
    from herd.checkpoint.names import find_model
    from herd.checkpoint.summary import summarize

    path = find_model(name).folder
    if (path / "config.json").exists() and not any(path.glob("*.safetensors")):
        cfg, vision = read_hf_config(path)
        return {"model": str(path), **_architecture(cfg, vision), "weight_bytes": 0, **_licence(cfg, vision)}
    found = summarize(path)
    return {
        "model": str(path),
        "format": found.format,
        **_architecture(found.text, found.vision),
        "weight_bytes": sum(found.bytes_of.values()),
        "bytes": found.bytes_of,
        "types": found.types,
        **_licence(found.text, found.vision),
    }


def _licence(cfg: TextConfig, vision: VisionConfig | None) -> dict[str, str]:
    """What applies to Meta's weights, which have a vocabulary of their own size (spec §8.4)."""
    if cfg.vocab_size != SCOUT.vocab_size:
        return {}
    text = (
        "if these are Meta's weights or made from them, the Llama 4 Community License: show 'Built with Llama', keep "
        "its notice, call derived models Llama; above 700 million monthly users Meta's own permission is needed"
    )
    if vision is not None:
        text += "; its use policy grants no rights in multimodal models to people and companies in the EU"
    return {"licence": text}


def _architecture(cfg: TextConfig, vision: VisionConfig | None) -> dict[str, Any]:
    """parameters: of the text model, of which a token passes through the active ones."""
    kv_bytes = 2 * cfg.num_key_value_heads * cfg.head_dim
    images = 0 if vision is None else vision.num_parameters(cfg.hidden_size)
    return {
        "parameters": cfg.num_parameters(),
        "active_parameters": cfg.num_parameters(active=True),
        **({"image_parameters": images, "all_parameters": cfg.num_parameters() + images} if images else {}),
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
        "bf16_bytes": 2 * (cfg.num_parameters() + images),
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
