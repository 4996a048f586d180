"""Features stand in for embeddings, wherever they are in a batch and whatever runs the layers."""

import pytest
import torch

from herd.errors import PromptError
from herd.formats import Format, Weights
from herd.kernels import native
from herd.model.fusion import Patches, places
from herd.model.quantized import pack_halves, quantize
from tests.model.tiny_models import build, tiny, tokens
from tests.model.tiny_vision import PATCH


@pytest.mark.parametrize("weights", ["plain", "int8", "halves"])
@torch.inference_mode()
def test_features_that_are_embeddings_change_nothing(weights: str) -> None:
    """Patches whose features are the embeddings of other tokens give the logits of these tokens, to the bit."""
    model = build(tiny(head_dim=64, hidden_size=64)).bfloat16()
    if weights != "plain":
        if native.load()[0] is None:
            pytest.skip("the native library is not there")
        pack_halves(model) if weights == "halves" else quantize(model, Weights.all(Format("int8", 32)))
        assert model.packed is not None
    ids = tokens(2, 29) % PATCH
    hidden = ids.clone()
    hidden[0, 2:9] = hidden[1, 20] = hidden[1, 28] = PATCH
    at = (hidden.flatten() == PATCH).nonzero().flatten()
    features = model.model.embed_tokens(ids.flatten()[at]).float()
    assert torch.equal(model(hidden, patches=Patches(at, features)), model(ids))
    assert not torch.equal(model(hidden), model(ids))


def test_places_must_be_as_many_as_features() -> None:
    features = [torch.zeros(2, 8), torch.zeros(1, 8)]
    assert places([PATCH, 1, PATCH, PATCH], PATCH, features) == [0, 2, 3]
    assert places([1, 2], PATCH, []) == []
    for ids, given in (([PATCH, 1], features), ([PATCH] * 4, features), ([PATCH], [])):
        count, wanted = ids.count(PATCH), sum(map(len, given))
        with pytest.raises(PromptError, match=rf"prompt: {count}; .* given: {wanted} \(images: {len(given)}\)"):
            places(ids, PATCH, given)
