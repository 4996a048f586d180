"""The engine: in whatever company and whenever they come, requests get what they get alone; memory is exact."""

from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.engine import Engine, Request, Sampler, Token, scheduler, stream
from herd.errors import PromptError
from herd.model import Transformer, bytes_needed
from tests.engine.test_sampler import reference_choice
from tests.model.tiny_models import CHUNK, build, tiny, tokens

CONFIG = tiny()
SAMPLERS = [
    Sampler(),
    Sampler(repetition_penalty=1.4, frequency_penalty=0.3, logprobs=2),
    Sampler(temperature=0.9, seed=1),
    Sampler(temperature=1.5, top_k=30, top_p=0.9, min_p=0.02, presence_penalty=0.5, seed=2, logprobs=0),
]
EOS = [7, 8]


@pytest.fixture(scope="module")
def model() -> Transformer:
    return build(CONFIG)


def prompt(length: int, seed: int = 0) -> list[int]:
    return tokens(1, length, seed)[0].tolist()


def run(engine: Engine) -> dict[int, list[Token]]:
    """The tokens of all requests, until none is left."""
    found: dict[int, list[Token]] = {}
    for token in stream(engine):
        found.setdefault(token.request, []).append(token)
    return found


def alone(model: Transformer, request: Request) -> list[int]:
    engine = Engine(model)
    engine.submit(request)
    return [token.id for token in run(engine)[0]]


# The same as alone


@dataclass(frozen=True)
class Visit:
    """A request, when it comes and how many steps later it is cancelled. It begins with so many tokens of a text that
    others begin with, too; scope: of those it shares them with, None: of none."""

    shared: int
    scope: str | None
    length: int
    max_tokens: int
    sampler: int
    comes: int
    stays: int | None

    @property
    def request(self) -> Request:
        ids = [*prompt(self.shared), *prompt(self.length, self.length)]
        its = Request(ids, self.max_tokens, SAMPLERS[self.sampler], EOS)
        return its if self.scope is None else replace(its, names=ids, scope=self.scope)

    @property
    def bytes(self) -> int:
        return bytes_needed(CONFIG, self.shared + self.length + self.max_tokens, torch.float32)


@cache
def _alone(model: Transformer, shared: int, length: int, max_tokens: int, sampler: int) -> list[int]:
    return alone(model, Visit(shared, None, length, max_tokens, sampler, 0, None).request)


VISITS = st.builds(
    Visit,
    shared=st.integers(0, 3 * CHUNK),
    scope=st.sampled_from([None, "a", "a", "b"]),
    length=st.integers(1, 3 * CHUNK),
    max_tokens=st.integers(1, 12),
    sampler=st.integers(0, len(SAMPLERS) - 1),
    comes=st.integers(0, 12),
    stays=st.none() | st.integers(0, 12),
)


@settings(max_examples=25, derandomize=True)
@given(
    visits=st.lists(VISITS, min_size=1, max_size=8),
    rows=st.sampled_from([1, 2, 5]),
    prompt_tokens=st.sampled_from([1, 5, 64]),
    tokens_in_memory=st.sampled_from([None, 60, 140]),
    worth=st.sampled_from([1, 6]),
)
def test_requests_that_come_and_go_get_what_they_get_alone(
    model: Transformer, visits: list[Visit], rows: int, prompt_tokens: int, tokens_in_memory: int | None, worth: int
) -> None:
    """Whoever they share a beginning with, and wherever that one is when they come, or goes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "WORTH", worth)
        _come_and_go(model, visits, rows, prompt_tokens, tokens_in_memory)


def _come_and_go(
    model: Transformer, visits: list[Visit], rows: int, prompt_tokens: int, tokens_in_memory: int | None
) -> None:
    memory = None if tokens_in_memory is None else bytes_needed(CONFIG, tokens_in_memory, torch.float32)
    engine = Engine(model, rows=rows, prompt_tokens=prompt_tokens, memory=memory)
    ids: dict[int, Visit] = {}
    found: dict[int, list[int]] = {}
    finished, cancelled, step = set[int](), set[int](), 0
    while step <= 12 or not engine.idle:
        for visit in visits:
            if visit.comes == step:
                ids[engine.submit(visit.request)] = visit
        for id, visit in ids.items():
            if visit.stays is not None and step == visit.comes + visit.stays and engine.cancel(id):
                cancelled.add(id)
        for token in engine.step():
            assert token.request not in finished | cancelled
            found.setdefault(token.request, []).append(token.id)
            if token.finish:
                finished.add(token.request)
        assert len(engine.running) <= rows
        sizes = [ids[id].bytes for id in engine.running]
        assert engine.memory_used == sum(sizes) + engine.prefixes.nbytes
        assert memory is None or engine.memory_used <= memory
        step += 1
    assert engine.memory_used == engine.prefixes.nbytes
    assert len(ids) == len(visits) and finished | cancelled == set(ids) and not finished & cancelled
    for id, visit in ids.items():
        expected = _alone(model, visit.shared, visit.length, visit.max_tokens, visit.sampler)
        got = found.get(id, [])
        assert got == (expected if id in finished else expected[: len(got)])


@pytest.mark.parametrize("sampler", SAMPLERS)
@torch.inference_mode()
def test_answers_equal_full_forwards_and_the_reference_sampler(model: Transformer, sampler: Sampler) -> None:
    """Neither cache nor engine nor its sampler: the whole text again for every token."""
    given_ids = prompt(2 * CHUNK + 3)
    answer: list[int] = []
    uniforms = torch.Generator().manual_seed(sampler.seed or 0)
    for _ in range(40):
        logits = model(torch.tensor([given_ids + answer]))[0, -1].numpy()
        uniform = float(torch.rand(1, generator=uniforms, dtype=torch.float64)) if sampler.temperature else 0.0
        answer.append(reference_choice(logits, sampler, given_ids, answer, uniform))
    assert alone(model, Request(given_ids, 40, sampler)) == answer
    assert len(set(answer)) > 5


def test_rows_of_one_batch_have_their_own_samplers_and_logprobs(model: Transformer) -> None:
    engine = Engine(model)
    for sampler in SAMPLERS:
        engine.submit(Request(prompt(5), 4, sampler))
    for id, events in run(engine).items():
        wanted = SAMPLERS[id].logprobs
        for event in events:
            assert (event.logprob is None) == (wanted is None) and len(event.top) == (wanted or 0)
            if SAMPLERS[id] == SAMPLERS[1]:
                assert event.top[0][1] >= (event.logprob or 0.0)


# Scheduling


def test_a_long_prompt_does_not_stall_an_answer(model: Transformer) -> None:
    engine = Engine(model, prompt_tokens=4)
    first = engine.submit(Request(prompt(4), 20))
    assert [token.request for token in engine.step()] == [first]
    second = engine.submit(Request(prompt(30), 2))
    for _ in range(7):
        assert [token.request for token in engine.step()] == [first]
    assert [token.request for token in engine.step()] == [first, second], "the last 2 of 30 tokens"


def test_prompts_share_a_step(model: Transformer) -> None:
    engine = Engine(model, prompt_tokens=10)
    for length in (4, 3, 5):
        engine.submit(Request(prompt(length), 3))
    assert [token.request for token in engine.step()] == [0, 1], "the third's 5 tokens would not fit"
    assert [token.request for token in engine.step()] == [0, 1, 2]


def test_a_short_prompt_does_not_wait_for_a_long_one(model: Transformer) -> None:
    engine = Engine(model, prompt_tokens=8)
    long = engine.submit(Request(prompt(40), 1))
    assert engine.step() == []
    short = engine.submit(Request(prompt(4), 1))
    assert [token.request for token in engine.step()] == [short]
    # Nor does the long one wait for ever, however many short ones come: a quarter of each step is its own.
    steps = 0
    while long in engine.running:
        engine.submit(Request(prompt(4), 1))
        engine.step()
        steps += 1
    assert steps == 14, "30 of 40 tokens were left: 2 of each step, and 4 of the last"


def test_first_come_first_served(model: Transformer) -> None:
    """A request waits for memory, and smaller ones behind it do not overtake it."""
    engine = Engine(model, memory=bytes_needed(CONFIG, 100, torch.float32))
    for max_tokens in (55, 85, 2):
        engine.submit(Request(prompt(5), max_tokens))
    engine.step()
    assert engine.running == [0], "the last one would fit"
    assert [token.request for token in stream(engine) if token.finish] == [0, 1, 2]
    engine.submit(Request(prompt(5), 55))
    engine.submit(Request(prompt(5), 85))
    engine.step()
    assert engine.running == [3]
    engine.cancel(3)
    engine.step()
    assert engine.running == [4], "a cancelled request makes room at once"


def test_a_row_is_refilled_when_its_request_ends(model: Transformer) -> None:
    engine = Engine(model, rows=2)
    for max_tokens in (1, 5, 5, 5):
        engine.submit(Request(prompt(3), max_tokens))
    engine.step()
    assert engine.running == [1]
    engine.step()
    assert engine.running == [1, 2]


# Memory


@pytest.mark.parametrize("steps", range(9))
def test_cancelling_at_any_step_gives_memory_back(model: Transformer, steps: int) -> None:
    engine = Engine(model, prompt_tokens=3)
    id = engine.submit(Request(prompt(9), 4))
    other = engine.submit(Request(prompt(2), 9))
    row = engine.row(id)
    events = [token for _ in range(steps) for token in engine.step()]
    ended = any(token.request == id and token.finish for token in events)
    assert ended == (steps >= 8), "the prompt takes five: 2 and 2 beside the other's, 3, and 1 up to a chunk's end"
    assert engine.cancel(id) == (not ended)
    assert not engine.cancel(id), "ending twice is not an error"
    assert not row._layers and id not in engine.running
    expected = alone(model, Request(prompt(2), 9))
    assert [t.id for t in events + list(stream(engine)) if t.request == other] == expected


def test_what_can_never_fit_is_refused_with_the_numbers(model: Transformer) -> None:
    limit = bytes_needed(CONFIG, 32, torch.float32)
    engine = Engine(model, memory=limit)
    needed = bytes_needed(CONFIG, 33, torch.float32)
    assert needed == limit + 32 * 2 * 2 * 8 * 4, "a panel of tokens more in the one global layer"
    with pytest.raises(PromptError, match=rf"20 tokens.*up to 13.*{needed:,} bytes.*has {limit:,}"):
        engine.submit(Request(prompt(20), 13))
    with pytest.raises(PromptError, match=r"needs 1,025 positions .* has 1,024"):
        engine.submit(Request(prompt(20), 1005))
    assert engine.idle
    engine.submit(Request(prompt(20), 12))
    assert len(run(engine)[0]) == 12


def test_a_step_that_fails_ends_its_requests_only(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model, rows=2)
    for _ in range(3):
        engine.submit(Request(prompt(4), 3))
    with monkeypatch.context() as patch:
        patch.setattr(model, "logits", lambda _: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    assert engine.memory_used == 0
    assert [token.id for token in run(engine)[2]] == alone(model, Request(prompt(4), 3))
