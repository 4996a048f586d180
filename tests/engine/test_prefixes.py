"""What is kept of requests: others that begin the same go on from it, with the answers they get without."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from herd.engine import Engine, Request, Sampler, Token, named, stream
from herd.kernels import native
from herd.model import Transformer, bytes_needed
from herd.model.quantized import pack_halves
from tests.engine.test_images import VISION, full, prompt, seen, text
from tests.model.tiny_models import CHUNK, build, tiny
from tests.model.tiny_vision import PATCH

CONFIG = tiny()


@pytest.fixture(scope="module", params=["plain", "packed", "no chunks"])
def model(request: pytest.FixtureRequest) -> Iterator[Transformer]:
    if request.param == "packed" and native.load()[0] is None:
        pytest.skip("the native library is not there")
    changes = {"plain": {}, "packed": {"head_dim": 64}, "no chunks": {"attention_chunk_size": None}}[request.param]
    made = build(tiny(**changes))
    if request.param == "packed":
        pack_halves(made.bfloat16())
    yield made


def ask(
    engine: Engine, ids: list[int], count: int = 5, images: tuple[Tensor, ...] = (), scope: str = ""
) -> list[Token]:
    engine.submit(Request(ids, count, images=images, names=named(ids, images, PATCH), scope=scope))
    return list(stream(engine))


PART = st.tuples(st.sampled_from(["text", "image"]), st.integers(1, 3), st.integers(0, 2))
ASKED = st.tuples(st.integers(0, 30), st.lists(PART, min_size=1, max_size=5), st.sampled_from(["a", "b"]))


@settings(max_examples=25, derandomize=True)
@given(asked=st.lists(ASKED, min_size=1, max_size=6), prompt_tokens=st.sampled_from([3, 10, 100]))
def test_answers_and_counts_are_those_of_a_dictionary(
    asked: list[tuple[int, list[tuple[str, int, int]], str]], prompt_tokens: int
) -> None:
    """The dictionary holds, by scope, all tokens that were seen, images by what they show."""
    model = _plain()
    engine = Engine(model, prompt_tokens=prompt_tokens, vision=VISION)
    known: dict[str, list[list[object]]] = {"a": [], "b": []}
    for number, (back, parts, scope) in enumerate(asked):
        pieces = [text(size, seed) if kind == "text" else seen(size, seed) for kind, size, seed in parts]
        ids, images = prompt(text(back % 12, 7), *pieces)
        shown = iter([(image.sum().item(), at) for image in images for at in range(len(image))])
        plain: list[object] = [next(shown) if id == PATCH else id for id in ids]
        same = max([_common(plain, old) for old in known[scope]], default=0)
        tokens = ask(engine, ids, 4, tuple(images), scope)
        expected = full(model, ids, images, 4)
        assert [token.id for token in tokens] == expected, number
        cached = tokens[0].cached
        # All that is shared, or as much of it as ends where local layers begin to look anew.
        most = min(same, len(ids) - 1)
        assert cached in (most, most // CHUNK * CHUNK)
        assert cached == most or most > CHUNK
        known[scope].append([*plain, *expected[:-1]])
        assert engine.memory_used == engine.prefixes.nbytes == sum(its.nbytes for its in engine.prefixes._order)


_MODELS: list[Transformer] = []


def _plain() -> Transformer:
    if not _MODELS:
        _MODELS.append(build(CONFIG))
    return _MODELS[0]


def _common(a: list[object], b: list[object]) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def test_chats_with_one_system_prompt_hold_it_once(model: Transformer) -> None:
    engine = Engine(model)
    system = text(70, 3)
    first = ask(engine, [*system, *text(3, 1)])
    alone = engine.prefixes.nbytes
    second = ask(engine, [*system, 96, *text(2, 2)])
    assert first[0].cached == 0 and second[0].cached in (70, 70 // CHUNK * CHUNK)
    assert engine.prefixes.nbytes - alone < alone / 4
    fresh = Engine(model)
    expected = ask(fresh, [*system, 96, *text(2, 2)])
    assert [token.id for token in second] == [token.id for token in expected]


def test_turns_go_on_where_they_were(model: Transformer) -> None:
    engine, whole = Engine(model), Engine(model)
    ids, before = text(CHUNK - 2), 0
    for number in range(5):
        answer = ask(engine, ids, 6)
        whole.submit(Request(ids, 6))
        assert [token.id for token in answer] == [token.id for token in stream(whole)]
        assert answer[0].cached == before
        before = len(ids) + 5
        ids = [*ids, *(token.id for token in answer), *text(3, number)]


def test_an_image_is_gone_on_from_only_where_it_shows_the_same() -> None:
    engine = Engine(_plain(), vision=VISION)
    first, other = (prompt(text(2), seen(1, seed), text(3, 1)) for seed in (0, 1))
    ids = first[0]
    assert ids == other[0]
    cached = [ask(engine, ids, 2, tuple(images))[0].cached for _, images in (first, first, other, other)]
    assert cached == [0, len(ids) - 1, 2, len(ids) - 1]


def test_blocks_to_be_kept_elsewhere_hold_no_other_tokens(model: Transformer) -> None:
    engine, ids = Engine(model), text(20)
    ask(engine, ids)
    found = engine.prefixes.blocks("", [*ids[:6], 96])
    assert [name for block in found for name in block.names] == ids[:6]
    assert all(block.global_kv.shape[3] == len(block.names) for block in found)


def test_scopes_share_nothing(model: Transformer) -> None:
    engine = Engine(model)
    ids = text(20)
    assert [ask(engine, ids, 2, scope=scope)[0].cached for scope in ("a", "b", "a", "b")] == [0, 0, 19, 19]


def test_what_is_cancelled_can_be_kept_as_far_as_it_was_seen(model: Transformer) -> None:
    engine = Engine(model, prompt_tokens=7)
    for ids, keep in ((text(30), True), (text(30, 1), False)):
        id = engine.submit(Request(ids, 5, names=ids))
        engine.step()
        assert engine.cancel(id, keep=keep)
        assert ask(engine, ids)[0].cached == 7 * keep


def test_memory_is_never_more_than_allowed_and_the_oldest_goes() -> None:
    model = _plain()
    limit = 2 * bytes_needed(CONFIG, 64, torch.float32)
    engine = Engine(model, memory=limit)
    for seed in range(8):
        ids = text(50, seed)
        engine.submit(Request(ids, 6, names=ids))
        while not engine.idle:
            engine.step()
            assert engine.memory_used <= limit
    newest, oldest = ask(engine, text(50, 7)), ask(engine, text(50, 0))
    assert newest[0].cached > 0 and oldest[0].cached <= 1
    assert engine.prefixes.shrink(0) and engine.memory_used == 0


def test_a_step_that_fails_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _plain()
    engine = Engine(model)
    ids = text(4)
    engine.submit(Request(ids, 3, names=ids))
    with monkeypatch.context() as patch:
        patch.setattr(model, "logits", lambda _: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    assert engine.memory_used == 0 and ask(engine, ids)[0].cached == 0


def test_penalties_count_what_was_not_computed_again() -> None:
    model, sampler, ids = _plain(), Sampler(repetition_penalty=3.0), text(12)
    engine, whole = Engine(model), Engine(model)
    ask(engine, ids)
    request = Request([*ids, 4], 6, sampler, names=[*ids, 4])
    engine.submit(request)
    whole.submit(replace(request, names=None))
    got, expected = list(stream(engine)), list(stream(whole))
    assert [token.id for token in got] == [token.id for token in expected] and got[0].cached == 12


# Requests that come together


def together(engine: Engine, *prompts: list[int], scope: str = "") -> list[int]:
    return [engine.submit(Request(ids, 5, names=ids, scope=scope)) for ids in prompts]


def ends(engine: Engine, model: Transformer, ids: list[int], prompts: list[list[int]]) -> list[int]:
    """How many tokens of each prompt were not computed; answers must be those that each gets alone."""
    found: dict[int, list[Token]] = {id: [] for id in ids}
    for token in stream(engine):
        found[token.request].append(token)
    for tokens, asked in zip(found.values(), prompts, strict=True):
        assert [token.id for token in tokens] == [token.id for token in ask(Engine(model), asked)]
    return [tokens[0].cached for tokens in found.values()]


def test_a_beginning_is_computed_once(model: Transformer) -> None:
    """A system prompt of all, and a document of two of them."""
    system, document = text(100, 3), text(80, 4)
    prompts = [[*system, 1], [*system, 2, *document, 3], [*system, 4, *text(9)], [*system, 2, *document, 5, 6]]
    engine = Engine(model, prompt_tokens=10)
    ids = together(engine, *prompts)
    assert ends(engine, model, ids, prompts) == [0, 100, 100, 181]


def test_a_prompt_that_is_seen_by_half_is_followed(model: Transformer) -> None:
    """By one that shares more than was seen; one that shares less begins at once."""
    begin = text(110, 3)
    prompts = [[*begin, *text(50, 1)], [*begin, 1], [*begin[:80], 2]]
    engine = Engine(model, prompt_tokens=10)
    ids = together(engine, prompts[0])
    for _ in range(10):
        assert engine.step() == []
    ids += together(engine, *prompts[1:])
    assert ends(engine, model, ids, prompts) == [0, 110, 80]


def test_who_follows_one_that_is_cancelled_goes_on(model: Transformer) -> None:
    prompts = [[*text(100, 3), number] for number in range(3)]
    engine = Engine(model, prompt_tokens=10)
    first, *others = together(engine, *prompts)
    for _ in range(3):
        engine.step()
    engine.cancel(first)
    cached = ends(engine, model, others, prompts[1:])
    assert cached[0] <= CHUNK and cached[1] == 100, "the next one is followed"


def test_who_follows_waits_no_longer_than_for_its_own_prompt() -> None:
    """Its turns are the other's, which would be the last to be served by itself."""
    model, begin, steps = _plain(), text(100, 3), list[int]()
    for scope in ("a", "b"):
        engine = Engine(model, prompt_tokens=8)
        for ids in (text(400), *(text(150, seed) for seed in range(10, 20))):
            engine.submit(Request(ids, 1))
        together(engine, [*begin, *text(300, 1)], scope="a")
        (last,) = together(engine, [*begin, 1], scope=scope)
        steps.append(next(n for n in range(1000) if any(token.request == last for token in engine.step())))
    assert steps[0] <= steps[1] + 1


@pytest.mark.parametrize(("tokens", "at_once"), [(40, True), (70, False)])
def test_a_few_tokens_are_not_waited_for(tokens: int, at_once: bool) -> None:
    engine = Engine(_plain())
    ids = together(engine, [*text(tokens), 1], [*text(tokens), 2])
    first = next(said for said in iter(engine.step, None) if said)
    assert [token.request for token in first] == (ids if at_once else ids[:1])


def test_nobody_waits_for_what_there_is_no_room_to_keep() -> None:
    engine = Engine(_plain(), memory=2 * bytes_needed(CONFIG, 106, torch.float32))
    prompts = [[*text(100), 1], [*text(100), 2]]
    assert ends(engine, _plain(), together(engine, *prompts), prompts) == [0, 0]


def test_nobody_waits_for_another_scope(model: Transformer) -> None:
    engine, prompts = Engine(model), [[*text(100), 1], [*text(100), 2]]
    ids = [*together(engine, prompts[0], scope="a"), *together(engine, prompts[1], scope="b")]
    assert ends(engine, model, ids, prompts) == [0, 0]
