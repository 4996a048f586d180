"""Images in prompts, and prompts that go on from kept memory: both give what one forward pass over everything gives."""

import gc
import weakref
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from herd.engine import Engine, Request, Sampler, stream
from herd.errors import PromptError
from herd.kernels import native
from herd.model import Transformer, bytes_needed
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


# Going on


TURNS = [
    prompt(text(4), seen(2), text(3, 1)),
    prompt(text(2, 2)),
    prompt(seen(1, 4), text(1, 3), seen(1, 5)),
    prompt(text(CHUNK, 4)),
]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("prompt_tokens", [2, 64])
def test_turns_that_go_on_equal_one_prompt_of_all(model: Transformer, prompt_tokens: int, packed: bool) -> None:
    """Images of earlier turns are in kept memory; only what is new is given to the model."""
    if packed:
        if native.load()[0] is None:
            pytest.skip("the native library is not there")
        model = build(tiny(head_dim=64))
        pack_halves(model.bfloat16())
    engine = Engine(model, prompt_tokens=prompt_tokens, vision=VISION)
    ids, images, before = list[int](), list[Tensor](), None
    for number, (new_ids, new_images) in enumerate(TURNS):
        other = engine.submit(Request(text(9, 8), 5))
        room = 100 if before is None else 0
        before = engine.submit(Request(new_ids, 5, images=new_images, room=room, after=before))
        found = answers(engine)
        ids, images = ids + new_ids, images + new_images
        assert found[before] == full(model, ids, images, 5), number
        assert found[other] == full(model, text(9, 8), [], 5)
        ids += found[before]


PART = st.tuples(st.sampled_from(["text", "image"]), st.integers(1, 3), st.integers(0, 99))


@settings(max_examples=25, derandomize=True)
@given(
    turns=st.lists(st.lists(PART, min_size=1, max_size=4), min_size=1, max_size=4),
    prompt_tokens=st.sampled_from([1, 3, 10, 100]),
    answer=st.integers(1, 5),
)
def test_any_turns_equal_one_prompt_of_all(
    model: Transformer, turns: list[list[tuple[str, int, int]]], prompt_tokens: int, answer: int
) -> None:
    engine = Engine(model, prompt_tokens=prompt_tokens, vision=VISION)
    ids, images, before = list[int](), list[Tensor](), None
    for turn in turns:
        parts = [text(size, seed) if kind == "text" else seen(size, seed) for kind, size, seed in turn]
        new_ids, new_images = prompt(*parts)
        room = 400 if before is None else 0
        before = engine.submit(Request(new_ids, answer, images=new_images, room=room, after=before))
        said = answers(engine)[before]
        ids, images = ids + new_ids, images + new_images
        assert said == full(model, ids, images, answer)
        ids += said


def test_what_was_cancelled_while_it_answered_can_be_gone_on_from(model: Transformer) -> None:
    engine = Engine(model, vision=VISION)
    ids, images = TURNS[0]
    first = engine.submit(Request(ids, 5, images=images, room=20))
    said = [token.id for _ in range(2) for token in engine.step()]
    assert engine.cancel(first)
    engine.submit(Request([5, 6], 4, after=first))
    assert answers(engine)[1] == full(model, [*ids, *said, 5, 6], images, 4)


def test_features_are_given_up_once_they_are_seen(model: Transformer) -> None:
    ids, images = PROMPTS[0]
    features = [images[0].clone()]
    alive = weakref.ref(features[0])
    engine = Engine(model, prompt_tokens=4, vision=VISION)
    engine.submit(Request(ids, 5, images=features, room=10))
    del features
    engine.step()
    assert alive() is not None, "not all patches are seen"
    assert [token.request for _ in range(2) for token in engine.step()] == [0]
    gc.collect()
    assert alive() is None


def test_room_is_given_once(model: Transformer) -> None:
    for wrong in ({"room": -1}, {"room": 5, "after": 0}):
        with pytest.raises(PromptError, match=f"room is {wrong['room']}; it is 0 or more, and given with the first"):
            Request([1], 1, **wrong)


def test_penalties_count_all_that_was_gone_on_from(model: Transformer) -> None:
    sampler = Sampler(repetition_penalty=3.0)
    whole, turns = Engine(model), Engine(model)
    turns.submit(Request([1, 2, 3], 4, room=20))
    said = answers(turns)[0]
    turns.submit(Request([4, 5], 6, sampler, after=0))
    whole.submit(Request([1, 2, 3, *said, 4, 5], 6, sampler))
    assert answers(turns)[1] == answers(whole)[0]


def test_memory_is_kept_until_it_is_forgotten(model: Transformer) -> None:
    engine = Engine(model)
    id = engine.submit(Request(text(4), 3, room=10))
    needed = bytes_needed(CONFIG, 17, torch.float32)
    answers(engine)
    assert engine.memory_used == needed and engine.idle
    with pytest.raises(PromptError, match="would be 20 tokens in room for 17; leave more room"):
        engine.submit(Request(text(8), 5, after=id))
    with pytest.raises(PromptError, match="the prompt is empty"):
        engine.submit(Request([], 5, after=id))
    assert engine.memory_used == needed, "a refused request changes nothing"
    second = engine.submit(Request(text(5), 5, after=id))
    assert engine.memory_used == needed, "what waits to go on keeps its memory"
    with pytest.raises(PromptError, match=f"request {id} cannot be gone on from"):
        engine.submit(Request(text(1), 1, after=id))
    answers(engine)
    assert engine.memory_used == needed
    engine.forget(second)
    engine.forget(second)
    assert engine.memory_used == 0
    with pytest.raises(PromptError, match=f"request {second} cannot be gone on from"):
        engine.submit(Request(text(1), 1, after=second))


def test_the_oldest_that_is_kept_makes_room(model: Transformer) -> None:
    one = bytes_needed(CONFIG, 64, torch.float32)
    engine = Engine(model, memory=3 * one)
    kept = []
    for seed in range(3):
        kept.append(engine.submit(Request(text(4, seed), 3, room=57)))
        answers(engine)
    assert engine.memory_used == 3 * one
    later = engine.submit(Request(text(60), 4))
    goes_on = engine.submit(Request(text(3), 2, after=kept[2]))
    found = answers(engine)
    assert len(found[later]) == 4 and len(found[goes_on]) == 2
    assert engine.memory_used == 2 * one
    with pytest.raises(PromptError, match=f"request {kept[0]} cannot be gone on from"):
        engine.submit(Request(text(1), 1, after=kept[0]))
    engine.submit(Request(text(1), 1, after=kept[1]))


def test_a_step_that_fails_keeps_nothing(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model)
    id = engine.submit(Request(text(4), 3, room=10))
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(model, "logits", lambda _: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    assert engine.memory_used == 0
    with pytest.raises(PromptError, match="cannot be gone on from"):
        engine.submit(Request(text(1), 1, after=id))
