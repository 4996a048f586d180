"""Checkpoints of every format: opening, configuration, and loading of the text model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from herd.checkpoint.files import read_json
from herd.checkpoint.hf import open_hf, read_hf_config
from herd.checkpoint.meta import is_meta, open_meta
from herd.checkpoint.shapes import text_shapes, vision_shapes
from herd.checkpoint.weights import Weights
from herd.config import TextConfig, VisionConfig
from herd.errors import CheckpointError
from herd.kernels.heap import give_back
from herd.model import Transformer
from herd.model.quantized import Fill
from herd.model.vision import Vision


def open_weights(path: str | Path) -> Weights:
    """The weights of a checkpoint, to be read one by one. Use as a context manager.

    path: a Hugging Face folder, a folder of Meta's (`consolidated.*.pth`, params.json), a GGUF file, or a folder with
    one and perhaps its `mmproj` file for images. CheckpointError for what is damaged, and for the first tensor that
    is missing, extra or of another shape than the configuration says. ConfigError if that is of no Llama 4.
    """
    weights = _open(Path(path))
    try:
        _check(weights)
    except BaseException:
        weights.__exit__()
        raise
    return weights


def read_config(path: str | Path) -> TextConfig:
    """The configuration of a checkpoint's text model. Errors as for `open_weights`; no weight is read."""
    folder = Path(path)
    if (folder / "config.json").exists():
        return read_hf_config(folder)[0]
    with _open(folder) as weights:
        return weights.text


def load(
    path: str | Path,
    dtype: torch.dtype | None = None,
    *,
    check_finite: bool = False,
    change: Callable[[Transformer, Fill], None] | None = None,
) -> Transformer:
    """The text model of a checkpoint, in eval mode.

    path: see `open_weights`. dtype: of the weights; None: that of most of them, which is bfloat16 for those that are
    stored in 8 bits or less. Of a multimodal model this is a part; see `load_vision`.
    check_finite: also read every value and refuse infinities and NaN.
    change: such as `herd.model.quantized.quantize`, is given the model when only embedding and last norm have values,
    and what fills its other modules, so that no more than one of them is in memory as it was. It may leave some empty.
    Weights are read one by one, and memory-mapped where type and layout are kept: a loaded model's files must not be
    changed in place (`save` replaces them whole). CheckpointError names the first tensor that does not fit.
    """
    with open_weights(path) as weights:
        model = empty_transformer(weights.text)
        fill = Filling(weights, dtype or weights.dtype, check_finite=check_finite)
        fill(model.model.embed_tokens, "model.embed_tokens.")
        fill(model.model.norm, "model.norm.")
        if weights.text.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        if change is not None:
            change(model, fill)
        fill(model, "")
    return model.eval()


class Filling:
    """Gives modules the values of a checkpoint, and the pages of its files back that the last one was filled from."""

    def __init__(self, weights: Weights, dtype: torch.dtype | None = None, *, check_finite: bool = False) -> None:
        """dtype: of the values; None: as stored."""
        self._weights, self._dtype, self._filled = weights, dtype, list[str]()
        self._read = weights.finite if check_finite else weights.tensor

    def __call__(self, module: nn.Module, prefix: str) -> None:
        """Fill those parameters that are on the meta device. prefix: what stands before their names."""
        for name in self._filled:
            self._weights.forget(name)
        self._filled = [f"{prefix}{name}" for name, parameter in module.named_parameters() if parameter.is_meta]
        for name in self._filled:
            parent, _, leaf = name.removeprefix(prefix).rpartition(".")
            setattr(module.get_submodule(parent), leaf, nn.Parameter(self._read(name, self._dtype)))
            self._weights.forget(name)
            give_back()


def empty_transformer(cfg: TextConfig) -> Transformer:
    """A text model whose parameters are on the meta device: they have no values, and are to be replaced."""
    with torch.device("meta"), _NoInit():
        return Transformer(cfg)


def empty_vision(cfg: VisionConfig, hidden_size: int) -> Vision:
    """As `empty_transformer`, an image encoder for a decoder of this hidden_size."""
    with torch.device("meta"), _NoInit():
        return Vision(cfg, hidden_size)


class _NoInit(TorchFunctionMode):
    """Leaves parameters unfilled: they are about to be replaced, and filling meta tensors takes 2 s of imports."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _open(path: Path) -> Weights:
    if path.is_file() or (path.is_dir() and not (path / "config.json").exists() and any(path.glob("*.gguf"))):
        # gguf takes long to import, and every command imports this module.
        from herd.checkpoint.gguf_llama4 import open_gguf

        return open_gguf(path)
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is not a folder or a GGUF file; expected a folder with config.json and safetensors files, or with "
            "params.json and consolidated.*.pth, or a GGUF file"
        )
    if (path / "config.json").exists() and "packed" in read_json(path / "config.json"):
        raise CheckpointError(f"{path} is packed for Herd's kernels; use the checkpoint that it was made of")
    return open_meta(path) if is_meta(path) else open_hf(path)


def _check(weights: Weights) -> None:
    """CheckpointError for the first tensor that is missing, extra or of another shape."""
    shapes = text_shapes(weights.text)
    if weights.vision is not None:
        shapes |= vision_shapes(weights.vision, weights.text.hidden_size)
    for name, shape in shapes.items():
        if name not in weights.names:
            raise CheckpointError(f"{weights.path} lacks the tensor {name} of shape {list(shape)}")
        if weights.shape(name) != shape:
            stored = list(weights.shape(name))
            raise CheckpointError(
                f"{name} in {weights.path} has shape {stored}; the configuration asks for {list(shape)}"
            )
    extra = sorted(weights.names - shapes.keys())
    if extra == ["lm_head.weight"] and weights.text.tie_word_embeddings:
        _drop_tied_head(weights)
    elif extra:
        raise CheckpointError(f"{weights.path} has {len(extra)} tensors the model does not have, first {extra[0]}")


def _drop_tied_head(weights: Weights) -> None:
    """Leave out the head that some tools store though it is tied; it must equal the embedding."""
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if weights.shape(head) != weights.shape(embedding) or not torch.equal(
        weights.tensor(head), weights.tensor(embedding)
    ):
        raise CheckpointError(f"{weights.path} ties the head to the embedding, but stores a different {head}")
    for name in (head, embedding):
        weights.forget(name)
    weights.drop(head)
