"""Checkpoints of any format as packed folders, rounded or calibrated on the way, one layer in memory at a time."""

import torch
from torch import Tensor, nn

from herd.checkpoint.load import Filling, empty_transformer
from herd.checkpoint.packed import EMBEDDING, NORM, Contents, write_packed
from herd.checkpoint.shapes import VISION_PREFIXES
from herd.checkpoint.streaming import Job, Progress
from herd.checkpoint.weights import Weights
from herd.errors import ConfigError
from herd.formats import Weights as Formats
from herd.kernels import native, rms_norm
from herd.kernels.layers import Layer
from herd.kernels.native import PackedWeight
from herd.model.calibrate import calibrate_block, moments, with_feedback
from herd.model.quantized import check, pack_block, pack_rows


def write_weights(
    weights: Weights,
    job: Job,
    files: dict[str, bytes],
    formats: Formats,
    *,
    calibration: Tensor | None = None,
    progress: Progress | None = None,
) -> None:
    """Write all files of the folder.

    files: further ones, such as the tokenizer's. calibration: ids of texts [rows, tokens] that weights in 8 and 4 bits
    are rounded for (`herd.model.calibrate`). CheckpointError if a tensor holds what is no finite number; ConfigError if
    a part has sizes that its format cannot have, or if there is no native library, which packs.
    """
    if native.load()[0] is None:
        raise ConfigError(f"weights are packed by the native library, which is {native.load()[1]}")
    making = _Making(weights, job, formats, calibration)
    images = sorted(name for name in weights.names if name.startswith(VISION_PREFIXES))
    plain = {name: (weights.stored(name).dtype, weights.shape(name)) for name in (EMBEDDING, *images)}
    plain[NORM] = (torch.float32, weights.shape(NORM))

    def read(name: str) -> Tensor:
        return weights.finite(name, plain[name][0])

    contents = Contents(weights.text, formats, making.layer, making.head, plain, read, files, weights.vision)
    write_packed(contents, job, progress)


class _Making:
    """Layers, in order, and the head: each read, rounded or calibrated, and packed when it is asked for.

    What the text that they are calibrated on has become below the next layer is put aside in the job, so that another
    run can begin with any layer.
    """

    def __init__(self, weights: Weights, job: Job, formats: Formats, calibration: Tensor | None) -> None:
        model = empty_transformer(weights.text)
        check(model, formats)
        self._weights, self._job, self._formats, self._calibration = weights, job, formats, calibration
        self._blocks, self._fill = dict(enumerate(model.blocks)), Filling(weights, check_finite=True)

    def layer(self, at: int) -> Layer:
        block = self._blocks.pop(at)
        self._fill(block, f"model.layers.{at}.")
        if self._calibration is not None:
            with torch.inference_mode():
                above = calibrate_block(block, self._states(at, self._calibration), self._formats)
            self._job.put_aside(_below(at + 1), above)
        return pack_block(block, self._formats)

    def head(self) -> PackedWeight:
        cfg, form = self._weights.text, self._formats.head
        rows = self._weights.finite(EMBEDDING if cfg.tie_word_embeddings else "lm_head.weight")
        if self._calibration is None or not form.whole:
            return pack_rows(rows, form)
        states = self._states(cfg.num_hidden_layers, self._calibration)
        inputs = rms_norm(states, self._weights.finite(NORM).to(states.dtype), cfg.rms_norm_eps)
        return pack_rows(with_feedback(rows, moments(inputs.flatten(0, 1)), form), form)

    def _states(self, at: int, ids_BT: Tensor) -> Tensor:
        """Of the text, below a layer or the head."""
        if at == 0:
            return nn.functional.embedding(ids_BT, self._weights.finite(EMBEDDING))
        return self._job.aside(_below(at))


def _below(at: int) -> str:
    """Where states are put aside. Those that a layer begins with are there until the next one is done."""
    return f"states-{at % 2}"
