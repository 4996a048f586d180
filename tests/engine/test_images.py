"""Images in prompts give what one forward pass over everything gives."""

import gc
import weakref
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from herd.engine import Engine, Request, stream
from herd.errors import PromptError
from herd.kernels import native
from herd.model import Transformer
from herd.model.fusion import Patches, places
from herd.model.quantized import pack_halves
from tests.model.tiny_models import CHUNK, build, tiny, tokens
from tests.model.tiny_vision import PATCH, TINY, build_vision, tiles

CONFIG = tiny()
VISION = build_vision()


@pytest.fixture(scope="module")
def model() -> Transformer:
    return build(CONFIG)


def text(length: int, seed: int = 0) -> list[int]:
    return (tokens(1, length, seed)[0] % PATCH).tolist()


@torch.inference_mode()
def seen(count: int, seed: int = 0) -> tuple[list[int], Tensor]:
    """Ids and features of an image of so many tiles."""
    return [PATCH] * (count * TINY.tokens_per_tile), VISION.features(tiles(count, seed=seed))


def prompt(*parts: list[int] | tuple[list[int], Tensor]) -> tuple[list[int], list[Tensor]]:
    ids = [id for part in parts for id in (part[0] if isinstance(part, tuple) else part)]
    return ids, [part[1] for part in parts if isinstance(part, tuple)]


PROMPTS = [
    prompt(text(3), seen(1), text(2)),
    prompt(text(CHUNK + 2, 1)),
    prompt(text(1), seen(3, 1), text(4, 2), seen(1, 2), text(1)),
    prompt(seen(2, 3)),
]


@torch.inference_mode()
def full(model: Transformer, ids: Sequence[int], images: Sequence[Tensor], count: int) -> list[int]:
    """Neither engine nor cache: everything again for every token."""
    patches = Patches(torch.tensor(places(ids, PATCH, images)), torch.cat(images)) if images else None
    answer: list[int] = []
    for _ in range(count):
        answer.append(int(model(torch.tensor([[*ids, *answer]]), patches=patches)[0, -1].argmax()))
    return answer


def answers(engine: Engine) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for token in stream(engine):
        found.setdefault(token.request, []).append(token.id)
    return found


@pytest.mark.parametrize("prompt_tokens", [1, 3, 7, 1024])
def test_requests_with_and_without_images_run_together(model: Transformer, prompt_tokens: int) -> None:
    """However a prompt is cut into pieces, within an image or not."""
    engine = Engine(model, prompt_tokens=prompt_tokens, vision=VISION, rows=3)
    ids = [engine.submit(Request(ids, 6, images=images)) for ids, images in PROMPTS]
    found = answers(engine)
    expected = [full(model, ids, images, 6) for ids, images in PROMPTS]
    assert [found[id] for id in ids] == expected
    blank = [full(model, ids, [torch.zeros_like(image) for image in images], 6) for ids, images in PROMPTS]
    assert sum(one != other for one, other in zip(expected, blank, strict=True)) >= 2, "images count"


def test_a_packed_model_sees_images() -> None:
    if native.load()[0] is None:
        pytest.skip("the native library is not there")
    model = build(tiny(head_dim=64, hidden_size=64)).bfloat16()
    pack_halves(model)
    assert model.packed is not None
    vision, own = build_vision(hidden_size=64), tokens(1, 8, 3)[0]
    with torch.inference_mode():
        features = [vision.features(tiles(2))]
        embedded = [model.model.embed_tokens(own)]
    ids = [*text(5), *[PATCH] * 8, *text(4, 1)]
    for images, same_as in ((embedded, [*text(5), *own.tolist(), *text(4, 1)]), (features, None)):
        engine = Engine(model, prompt_tokens=3, vision=VISION)
        engine.submit(Request(ids, 6, images=images))
        if same_as is None:
            assert answers(engine)[0] == full(model, ids, images, 6)
        else:
            plain = Engine(model, prompt_tokens=3)
            plain.submit(Request(same_as, 6))
            assert answers(engine)[0] == answers(plain)[0]


def test_patches_that_are_not_those_of_the_images_are_refused(model: Transformer) -> None:
    engine = Engine(model, vision=VISION)
    ids, images = PROMPTS[2]
    for features, count in ((images[:1], 12), ([], 0), ([*images, *images], 32)):
        with pytest.raises(PromptError, match=rf"prompt: 16; of the images given: {count} \(images: {len(features)}\)"):
            engine.submit(Request(ids, 1, images=features))
    with pytest.raises(PromptError, match=r"this engine has no image encoder; .* \(given: 2\)"):
        Engine(model).submit(Request(ids, 1, images=images))
    assert engine.idle


def test_features_are_given_up_once_they_are_seen(model: Transformer) -> None:
    ids, images = PROMPTS[0]
    features = [images[0].clone()]
    alive = weakref.ref(features[0])
    engine = Engine(model, prompt_tokens=4, vision=VISION)
    engine.submit(Request(ids, 5, images=features))
    del features
    engine.step()
    assert alive() is not None, "not all patches are seen"
    assert [token.request for _ in range(2) for token in engine.step()] == [0]
    gc.collect()
    assert alive() is None
