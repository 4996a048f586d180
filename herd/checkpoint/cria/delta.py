"""The trained difference between an upcycled model and its finished form, as one safetensors file.

It holds changed tensors in full, or as a low-rank pair `NAME.lora_a` [r, in], `NAME.lora_b` [out, r] with
W += scale * b @ a, and the experts even if unchanged: only they come from a random generator. The file's metadata
holds `scale` and the `recipe`: the arguments of `upcycle` that give the model it applies to.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from herd.checkpoint.files import ShardWriter, WeightFiles, copy_companions, read_json, write_json
from herd.checkpoint.upcycle import RECIPE_FILE, RECIPE_KEYS
from herd.config import TextConfig
from herd.errors import CheckpointError

_A, _B = ".lora_a", ".lora_b"


def make_delta(
    trained: Path | Mapping[str, Tensor],
    init: Path,
    out: Path,
    *,
    scale: float = 1.0,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, int]:
    """Write the difference between `trained` and the upcycled folder `init` to the file `out`.

    trained: a model folder, or tensors by name; what it lacks is unchanged. A low-rank pair may be named after the
    tensor (`...q_proj.weight.lora_a`) or its module (`...q_proj.lora_a`). Tensors get the type they have in `init`.
    Returns the bytes of each stored tensor. CheckpointError for tensors that do not belong to the model.
    """
    if isinstance(trained, Path):
        with WeightFiles(trained) as weights:
            return make_delta({n: weights.tensor(n) for n in weights.names}, init, out, scale=scale, metadata=metadata)
    config = TextConfig.from_hf(read_json(init / "config.json"))
    recipe = read_json(init / RECIPE_FILE)
    with WeightFiles(init) as base:
        kept = dict(_changes(trained, base, f"model.layers.{config.global_layers[0]}.feed_forward."))
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = out.with_name(f".{out.name}.new")
    info = {"format": "pt", "recipe": json.dumps(recipe, sort_keys=True), "scale": repr(float(scale))}
    save_file(kept, scratch, metadata={**(metadata or {}), **info})
    scratch.chmod(0o644)
    scratch.replace(out)
    return {name: tensor.nbytes for name, tensor in kept.items()}


def read_recipe(delta: Path) -> dict[str, Any]:
    """The arguments of `upcycle` for the model a delta applies to. CheckpointError if it is missing or damaged."""
    recipe, _ = _metadata(delta)
    return recipe


def apply_delta(init: Path, delta: Path, out: Path) -> None:
    """Write the finished model to the existing folder `out`, tokenizer included.

    CheckpointError if the delta is damaged or does not fit the model in `init`.
    """
    recipe, scale = _metadata(delta)
    if recipe != (found := read_json(init / RECIPE_FILE)):
        raise CheckpointError(f"{delta} is for a model upcycled with {recipe}, {init} was made with {found}")
    with WeightFiles(init) as base, WeightFiles.of_file(delta) as changes:
        _check_names(changes, base, delta)
        writer = ShardWriter(out)
        for name in sorted(base.names):
            writer.add(name, _changed(name, base, changes, scale))
        writer.finish()
    copy_companions(init, out)
    write_json(out / "config.json", read_json(init / "config.json"))


@torch.no_grad()
def take(model: nn.Module, delta: Path, *, low_rank: bool) -> None:
    """Set a model's parameters to those of a delta: whole tensors, or low-rank pairs where it has some.

    CheckpointError if the delta is damaged or does not fit the model.
    """
    parameters = dict(model.named_parameters())
    with WeightFiles.of_file(delta) as changes:
        for name in sorted(name for name in changes.names if (_target(name) != name) == low_rank):
            parameter = parameters.get(name.replace(".weight.lora_", ".lora_"))
            if parameter is None or parameter.shape != changes.shape(name):
                found = "has none of this name" if parameter is None else f"has {list(parameter.shape)}"
                raise CheckpointError(f"{delta}: {name} {list(changes.shape(name))} does not fit; the model {found}")
            parameter.copy_(changes.tensor(name))


def _metadata(delta: Path) -> tuple[dict[str, Any], float]:
    if not delta.is_file():
        raise CheckpointError(f"{delta} is missing; reinstall herd, or make it with `herd train recipes/cria.toml`")
    try:
        with safetensors.safe_open(delta, framework="pt") as file:
            info = file.metadata() or {}
        recipe, scale = json.loads(info["recipe"]), float(info["scale"])
    except (OSError, safetensors.SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{delta} is not a readable delta: {error!r}") from error
    if not isinstance(recipe, dict) or set(recipe) != RECIPE_KEYS:
        raise CheckpointError(f"{delta} has no valid recipe in its metadata; expected {', '.join(sorted(RECIPE_KEYS))}")
    return recipe, scale


def _changes(trained: Mapping[str, Tensor], base: WeightFiles, random: str) -> Iterator[tuple[str, Tensor]]:
    """What the delta has to store: experts (names that start with `random`), changed tensors, low-rank pairs."""
    given = {_full_name(name, base.names): tensor for name, tensor in trained.items()}
    for name in sorted(given.keys() | {name for name in base.names if name.startswith(random)}):
        target = _target(name)
        if target not in base.names:
            raise CheckpointError(f"{name} does not belong to the model in {base.folder}")
        original = base.tensor(target)
        value = given.get(name, original).detach().to(original.dtype).contiguous()
        if target == name and value.shape != original.shape:
            raise CheckpointError(f"{name} has shape {list(value.shape)}, expected {list(original.shape)}")
        if not value.isfinite().all():
            raise CheckpointError(f"{name} holds values that are not finite numbers")
        if target != name or name.startswith(random) or not torch.equal(value, original):
            yield name, value


def _target(name: str) -> str:
    """The tensor that a stored one changes."""
    return name.removesuffix(_A).removesuffix(_B)


def _full_name(name: str, known: set[str]) -> str:
    """`q_proj.lora_a` -> `q_proj.weight.lora_a`, where `q_proj.weight` is a tensor of the model."""
    target = _target(name)
    weight = f"{target}.weight"
    return weight + name[len(target) :] if target != name and weight in known else name


def _check_names(changes: WeightFiles, base: WeightFiles, delta: Path) -> None:
    for name in changes.names:
        target = _target(name)
        if target not in base.names:
            raise CheckpointError(f"{delta} changes {target}, which the model in {base.folder} does not have")
        shape = base.shape(target)
        pair = {target + _A, target + _B}
        if name == target:
            fits = changes.shape(name) == shape
        elif not pair <= changes.names or len(shape) != 2:
            fits = False
        else:
            (rank_a, columns), (rows, rank_b) = changes.shape(target + _A), changes.shape(target + _B)
            fits = rank_a == rank_b and (rows, columns) == shape
        if not fits:
            raise CheckpointError(f"{delta}: {name} of shape {list(changes.shape(name))} does not fit {list(shape)}")


def _changed(name: str, base: WeightFiles, changes: WeightFiles, scale: float) -> Tensor:
    value = changes.tensor(name) if name in changes.names else base.tensor(name)
    if name + _A in changes.names:
        a, b = changes.tensor(name + _A).float(), changes.tensor(name + _B).float()
        value = (value.float() + scale * (b @ a)).to(value.dtype)
    return value
