"""Loading and saving of Hugging Face Llama 4 folders (spec §6.1): config.json and safetensors, single or sharded."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from herd.checkpoint.files import (
    SHARD_BYTES,
    ShardWriter,
    WeightFiles,
    copy_companions,
    new_folder,
    read_json,
    write_json,
)
from herd.config import TextConfig
from herd.errors import CheckpointError
from herd.model import Transformer

_log = logging.getLogger(__name__)
_TEXT_PREFIX = "language_model."
_OTHER_MODALITIES = ("vision_model.", "multi_modal_projector.")


def load(path: str | Path, dtype: torch.dtype | None = None, *, check_finite: bool = False) -> Transformer:
    """The text model of a Hugging Face Llama 4 folder, in eval mode.

    dtype: of the weights, as stored if None. Of a multimodal folder only the text model is loaded, with a warning.
    check_finite: also read every value and refuse infinities and NaN.
    Weights are read one by one, and memory-mapped where their type is kept: a loaded model's files must not be
    changed in place (`save` replaces them whole). CheckpointError names the first tensor that does not fit.
    """
    folder = _folder(path)
    config = read_config(folder)
    with torch.device("meta"), _NoInit():
        model = Transformer(config)
    with WeightFiles(folder) as weights:
        stored = _text_names(weights)
        parameters = dict(model.named_parameters())  # a tied head comes once, as the embedding
        for name, parameter in parameters.items():
            value = _checked(weights, stored, name, parameter)
            if check_finite and not value.isfinite().all():
                raise CheckpointError(f"{name} in {folder} holds values that are not finite numbers")
            _assign(model, name, value if dtype is None else value.to(dtype))
        extra = sorted(stored.keys() - parameters.keys())
        if config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
            extra = _without_tied_head(weights, stored, extra)
    if extra:
        raise CheckpointError(f"{folder} has {len(extra)} tensors the model does not have, first {extra[0]}")
    return model.eval()


def save(
    model: Transformer,
    path: str | Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    companions_of: str | Path | None = None,
) -> None:
    """Write a folder that `load` and transformers read back bit by bit, replacing `path` as a whole.

    companions_of: a model folder whose tokenizer and generation settings are copied along.
    """
    with new_folder(Path(path), replace=True) as folder:
        writer = ShardWriter(folder, shard_bytes)
        for name, parameter in model.named_parameters():
            writer.add(name, parameter)
        writer.finish()
        dtype = str(model.model.embed_tokens.weight.dtype).removeprefix("torch.")
        write_json(folder / "config.json", {**model.config.to_hf(), "dtype": dtype})
        if companions_of is not None:
            copy_companions(Path(companions_of), folder)


def read_config(path: str | Path) -> TextConfig:
    """config.json of a folder. CheckpointError if it cannot be read, ConfigError if it is no Llama 4."""
    return TextConfig.from_hf(read_json(_folder(path) / "config.json"))


class _NoInit(TorchFunctionMode):
    """Leaves parameters unfilled: they are about to be replaced, and filling meta tensors takes 2 s of imports."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _folder(path: str | Path) -> Path:
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; expected one with config.json and safetensors files")
    return folder


def _text_names(weights: WeightFiles) -> dict[str, str]:
    """Name in the model -> name in the files, for the text model's tensors."""
    if not any(name.startswith(_TEXT_PREFIX) for name in weights.names):
        return {name: name for name in weights.names}
    others = sum(name.startswith(_OTHER_MODALITIES) for name in weights.names)
    _log.warning("%s is multimodal: loading its text model, leaving %d vision tensors", weights.folder, others)
    text = (name for name in weights.names if not name.startswith(_OTHER_MODALITIES))
    return {name.removeprefix(_TEXT_PREFIX): name for name in text}


def _checked(weights: WeightFiles, stored: dict[str, str], name: str, parameter: Tensor) -> Tensor:
    """The stored tensor for a parameter; CheckpointError if it is absent, misshapen or of a quantised type."""
    if name not in stored:
        raise CheckpointError(f"{weights.folder} lacks the tensor {name} of shape {list(parameter.shape)}")
    shape = weights.shape(stored[name])
    if shape != tuple(parameter.shape):
        raise CheckpointError(
            f"{name} in {weights.folder} has shape {list(shape)}; config.json asks for {list(parameter.shape)}"
        )
    value = weights.tensor(stored[name])
    if value.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise CheckpointError(
            f"{name} in {weights.folder} has type {value.dtype}; float32, bfloat16 and float16 can be loaded"
        )
    return value


def _assign(model: nn.Module, name: str, value: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Parameter(value))


def _without_tied_head(weights: WeightFiles, stored: dict[str, str], extra: Iterable[str]) -> list[str]:
    """`extra` without lm_head.weight, which some tools store though it is tied; it must equal the embedding."""
    rest = [name for name in extra if name != "lm_head.weight"]
    if len(rest) != len(list(extra)):
        head, embedding = (weights.tensor(stored[n]) for n in ("lm_head.weight", "model.embed_tokens.weight"))
        if not torch.equal(head, embedding):
            raise CheckpointError(
                f"{weights.folder} ties the head to the embedding, but stores a different lm_head.weight"
            )
    return rest
