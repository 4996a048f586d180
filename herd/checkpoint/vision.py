"""Loading of the image encoder that a multimodal checkpoint has beside its text model."""

from pathlib import Path

import torch

from herd.checkpoint.load import Filling, empty_vision, open_weights
from herd.model.vision import Vision


def load_vision(path: str | Path, dtype: torch.dtype | None = None) -> Vision | None:
    """Encoder and projector of a checkpoint, in eval mode; None if it is of a text model.

    dtype: of the weights; None: that of most weights of the model. See `load`, also for errors.
    """
    with open_weights(path) as weights:
        if weights.vision is None:
            return None
        vision = empty_vision(weights.vision, weights.text.hidden_size)
        Filling(weights, dtype or weights.dtype)(vision, "")
    return vision.eval()
