"""One training run, from recipe to weights. Every stage but the start of looking is kept in the run's folder."""

import ctypes
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from herd.checkpoint.cria.base import fetch_wheel, home
from herd.checkpoint.cria.build import upcycle_base
from herd.checkpoint.cria.delta import make_delta, read_recipe, take
from herd.checkpoint.load import load
from herd.data.bank import hidden_states
from herd.data.pool import Pool, build
from herd.errors import ConfigError
from herd.lock import hold
from herd.model import Transformer
from herd.prompt import Tokenizer
from herd.train.batches import Bank, Batches
from herd.train.construct import Sample, construct, erase, normed, written_directions
from herd.train.copying import start_copying
from herd.train.grown import Grown
from herd.train.loop import Loop
from herd.train.recipe import Phase, Recipe, load_recipe
from herd.train.rows import Rows, firsts, passages, vocabulary

Progress = Callable[[str, int, int, dict[str, float]], None]  # stage, done, of how many, figures
_SAMPLE = 240_000  # tokens of chunks that the closed-form starts look at
_FIRSTS = 4096  # rows of one token that they look at
_ECHO = 0.5  # weight of the loss `echo`
_START = "start.safetensors"  # in the run's folder: weights of another run that it goes on from


def run(recipe_path: Path, run_dir: Path, *, resume: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """Train by a recipe in run_dir; leaves `delta.safetensors` there. Returns the last step's figures.

    ConfigError if another process trains in run_dir, or it holds another recipe's run, or a run and `resume` is not
    given.
    """
    recipe = load_recipe(recipe_path)
    run_dir.mkdir(parents=True, exist_ok=True)
    with hold(run_dir / "lock", partial(_taken, run_dir)):
        _claim(recipe_path, run_dir, resume)
        return _run(recipe, run_dir, progress or (lambda *_: None))


def _run(recipe: Recipe, run_dir: Path, report: Progress) -> dict[str, Any]:
    _keep_memory()
    init = run_dir / "init"
    if recipe.start and not (run_dir / _START).exists():
        _copy_start(Path(recipe.start), recipe, run_dir / _START)
    if not init.exists():
        m = recipe.model
        sizes = {"global_layer": m.global_layer, "chunk": m.chunk, "experts": m.experts, "expert_width": m.expert_width}
        upcycle_base(fetch_wheel(home() / "base"), init, sizes)
    transformer = load(init)
    pool = _pool(recipe, run_dir, Tokenizer.load(init), report)
    rows = {
        "chunks": Rows(pool.chunk_ids_N, pool.chunk_start_C),
        "questions": Rows(pool.question_ids_M, pool.question_start_Q),
        "passages": passages(pool, recipe.pool.passage_tokens, recipe.pool.passages_per_chunk, recipe.seed),
        "vocabulary": vocabulary(pool, transformer.config.vocab_size, recipe.seed),
        "firsts": firsts(pool, transformer.config.vocab_size, _FIRSTS, recipe.seed),
    }
    bank = {name: (r, _states(transformer, recipe, run_dir, report, name, r)) for name, r in rows.items()}
    weights, figures = _train(transformer, recipe, pool, bank, run_dir, report)
    make_delta(weights, init, run_dir / "delta.safetensors", scale=recipe.model.lora_scale)
    return figures


def _train(
    transformer: Transformer, recipe: Recipe, pool: Pool, bank: Bank, run_dir: Path, report: Progress
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Both phases, from closed-form starts or another run. Returns all weights that differ, and the last figures."""
    (at,) = transformer.config.global_layers
    local, top = transformer.blocks[at - 1], transformer.blocks[at]
    sample, start = _sample(bank), run_dir / _START if recipe.start else None
    grown = _grown(transformer, recipe, sample, start)
    directions = written_directions(local)
    batches, last = Batches(recipe, pool, bank, transformer.config.num_key_value_heads), dict[str, float]()

    def hold(masters: dict[str, Tensor]) -> None:
        """The new local layer writes where `erase` can take it away, and nowhere else."""
        for part in ("self_attn.o_proj", "feed_forward.down_proj"):
            master = masters[f"model.layers.{at - 1}.{part}.weight"]
            master.copy_(directions @ (directions.T @ master))

    def note(name: str, phase: Phase) -> Callable[[int, dict[str, float]], None]:
        def progress(step: int, figures: dict[str, float]) -> None:
            last.update({"step": step, **figures})
            report(name, step, phase.steps, figures)

        return progress

    def look(step: int) -> dict[str, Tensor]:
        # A run that resumes has just this state: other chunks as they were at the last checkpoint.
        if recipe.looking.around and step % recipe.checkpoint_every == 0:
            batches.refresh(grown.after_local)
        return grown.look(batches.draw(recipe.looking, step, looking=True))

    looking = Loop(recipe.looking, grown.looking, run_dir / "looking", every=recipe.checkpoint_every, keep=hold)
    looking.resume()
    looking.train(
        look,
        {"evidence": 1.0, "echo": _ECHO, "idle": recipe.looking.text},
        note("looking", recipe.looking),
    )
    if start is None and not (run_dir / "answering" / "checkpoint.pt").exists():
        report("start of copying", 0, 1, {})
        readout_VD = transformer.lm_head.weight * transformer.model.norm.weight
        share = start_copying(local, top, sample, readout_VD)
        erase(local, top, sample)
        report("start of copying", 1, 1, {"told_apart": share})
    if recipe.answering.around:
        batches.refresh(grown.after_local)
    answering = Loop(recipe.answering, grown.answering, run_dir / "answering", every=recipe.checkpoint_every)
    answering.resume()
    answering.train(
        lambda step: grown.answer(batches.draw(recipe.answering, step, looking=False)),
        {"answer": 1.0, "text": recipe.answering.text},
        note("answering", recipe.answering),
    )
    trained = {name: master.bfloat16() for name, master in (looking.masters | answering.masters).items()}
    return trained | _fixed(grown), last


def _grown(transformer: Transformer, recipe: Recipe, sample: Sample, start: Path | None) -> Grown:
    """What is trained, with the weights it begins with: looking's closed-form start, or all of another run's delta."""
    (at,) = transformer.config.global_layers
    if start is None:
        construct(transformer.blocks[at - 1], transformer.blocks[at], sample)
    else:
        take(transformer, start, low_rank=False)
    torch.manual_seed(recipe.seed)
    grown = Grown(transformer, recipe.model.lora_rank, recipe.model.lora_scale, normed(sample.states_ND).mean(0))
    if start is not None:
        take(transformer, start, low_rank=True)
    if recipe.compile:
        for block in grown.above:
            block.compile(dynamic=True)
    return grown


def _copy_start(delta: Path, recipe: Recipe, copy: Path) -> None:
    """Keep the weights a run begins with: a run that resumes needs them, and its result may replace the file."""
    grown = read_recipe(delta)
    if wrong := {k: v for k, v in vars(recipe.model).items() if k in grown and grown[k] != v}:
        raise ConfigError(f"{delta} was grown with {grown}; the recipe's [model] says {wrong}")
    temporary = copy.with_suffix(".tmp")
    shutil.copyfile(delta, temporary)
    temporary.replace(copy)


def _sample(bank: Bank) -> Sample:
    """Some chunks of real text, the whole vocabulary, and first tokens."""
    (chunks, states_ND), (words, words_ND) = bank["chunks"], bank["vocabulary"]
    count = max(1, int(np.searchsorted(chunks.start_R, _SAMPLE, side="right")) - 1)
    start = chunks.start_R[: count + 1]
    ids_N = np.concatenate([chunks.ids_N[: start[-1]], words.ids_N]).astype(np.int64)
    start_C = [int(s) for s in (*start, *(start[-1] + words.start_R[1:]))]
    states_ND = torch.cat([states_ND[: start[-1]], words_ND])
    return Sample(states_ND, torch.from_numpy(ids_N), start_C, bank["firsts"][1])


def _fixed(grown: Grown) -> dict[str, Tensor]:
    """The new local layer's queries and keys: set by construction, not trained, but part of what was grown."""
    attn, prefix = grown.local.self_attn, f"model.layers.{grown.at - 1}.self_attn."
    return {f"{prefix}{n}_proj.weight": getattr(attn, f"{n}_proj").weight.detach().bfloat16() for n in "qk"}


def _claim(recipe_path: Path, run_dir: Path, resume: bool) -> None:
    copy = run_dir / "recipe.toml"
    if copy.exists() and not resume:
        raise ConfigError(f"{run_dir} holds a run; go on with --resume, or choose another folder with --run-dir")
    if copy.exists() and copy.read_bytes() != recipe_path.read_bytes():
        raise ConfigError(f"{run_dir} was begun with another recipe ({copy}); choose another folder with --run-dir")
    if not copy.exists():
        shutil.copyfile(recipe_path, copy)


def _taken(run_dir: Path, owner: str) -> ConfigError:
    return ConfigError(f"process {owner} trains in {run_dir}; wait for it, or choose another folder with --run-dir")


def _pool(recipe: Recipe, run_dir: Path, tokenizer: Tokenizer, report: Progress) -> Pool:
    path = run_dir / "pool.npz"
    if not path.exists():
        report("pool", 0, recipe.pool.chunks, {})
        build(recipe.pool, tokenizer).save(path)
    return Pool.load(path)


def _states(transformer: Transformer, recipe: Recipe, run_dir: Path, report: Progress, name: str, rows: Rows) -> Tensor:
    done, path = 0, run_dir / f"{name}.bf16"

    def progress(tokens: int) -> None:
        nonlocal done
        done += tokens
        report(f"hidden states of {name}", done, len(rows.ids_N), {})

    return hidden_states(transformer, recipe.model.global_layer, rows.ids_N, rows.start_R, path, progress)


def _keep_memory() -> None:
    """Let glibc reuse freed blocks of up to 32 MB: handing them back and faulting them in took a third of a step."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its limit
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
