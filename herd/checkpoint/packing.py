"""Checkpoints of any format as packed folders, rounded or calibrated on the way, one layer in memory at a time."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from herd.checkpoint.load import empty_transformer
from herd.checkpoint.packed import EMBEDDING, NORM, Contents, OnProgress, write_packed
from herd.checkpoint.shapes import VISION_PREFIXES
from herd.checkpoint.weights import Weights
from herd.errors import ConfigError
from herd.formats import Weights as Formats
from herd.kernels import native, rms_norm
from herd.kernels.layers import Layer
from herd.kernels.native import PackedWeight
from herd.model import Transformer
from herd.model.calibrate import calibrate_block, moments, with_feedback
from herd.model.quantized import check, pack_block, pack_rows


def save_packed(
    weights: Weights,
    out: Path,
    formats: Formats,
    *,
    calibration: Tensor | None = None,
    progress: OnProgress | None = None,
) -> None:
    """Write a checkpoint as a packed folder, one layer in memory at a time.

    calibration: ids of texts [rows, tokens] that weights in 8 and 4 bits are rounded for (`herd.model.calibrate`),
    whose states are in memory, too. progress: called with the number of files that are written and of all of them.
    CheckpointError if `out` exists, or a tensor holds what is no finite number; ConfigError if a part has sizes that
    its format cannot have, or if there is no native library, which packs.
    """
    cfg, model = weights.text, empty_transformer(weights.text)
    if native.load()[0] is None:
        raise ConfigError(f"weights are packed by the native library, which is {native.load()[1]}")
    check(model, formats)
    embedding, norm_D = weights.finite(EMBEDDING), weights.finite(NORM, torch.float32)
    states = None if calibration is None else [nn.functional.embedding(calibration, embedding)]

    def head() -> PackedWeight:
        rows = embedding if cfg.tie_word_embeddings else weights.finite("lm_head.weight")
        if states is None or not formats.head.whole:
            return pack_rows(rows, formats.head)
        inputs = rms_norm(states[0], norm_D.to(embedding.dtype), cfg.rms_norm_eps)
        return pack_rows(with_feedback(rows, moments(inputs.flatten(0, 1)), formats.head), formats.head)

    images = {name: weights.finite(name) for name in sorted(weights.names) if name.startswith(VISION_PREFIXES)}
    layers, files = _packed_layers(weights, model, formats, states), weights.tokenizer()
    contents = Contents(cfg, formats, embedding, norm_D, head, layers, files, weights.vision, images)
    write_packed(contents, out, progress=progress)


def _packed_layers(
    weights: Weights, model: Transformer, formats: Formats, states: list[Tensor] | None
) -> Iterator[Layer]:
    """The layers of a model without values, each filled, packed and given up. states: of the text that they are
    calibrated on, if they are, below the next layer."""
    blocks = model.blocks
    model.model.layers = nn.ModuleList()  # type: ignore[assignment]
    for at in range(model.config.num_hidden_layers):
        block = blocks.pop(0)
        for name, _ in list(block.named_parameters()):
            parent, _, leaf = name.rpartition(".")
            value = nn.Parameter(weights.finite(f"model.layers.{at}.{name}"), requires_grad=False)
            setattr(block.get_submodule(parent), leaf, value)
        if states is not None:
            with torch.inference_mode():
                states[0] = calibrate_block(block, states[0], formats)
        yield pack_block(block, formats)
