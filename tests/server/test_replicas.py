"""What is asked of replicas: an answer is whole, whenever they die, as it would be of an engine of this process."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle
from ray.exceptions import RayActorError, RayTaskError
from torch import Tensor

import herd
from herd.engine import Token
from herd.errors import PromptError
from herd.server.asks import Ask, TooLong
from herd.server.replicas import Guide, Replica, Replicas
from herd.server.service import Service
from herd.server.structured import Grammars, Guided
from tests.server.served import user
from tests.server.test_load import until
from tests.server.test_tools import COUNTRY
from tests.test_images import folder, pictures  # noqa: F401


class Response:
    """What `Handle` says to one request."""

    def __init__(self, said: AsyncGenerator[Any], dies: int | None) -> None:
        self._said, self._left, self.cancelled = said, dies, False

    def __aiter__(self) -> "Response":
        return self

    async def __anext__(self) -> Any:
        if self._left == 0:
            await self._said.aclose()
            raise RayActorError
        if self._left is not None:
            self._left -= 1
        return cloudpickle.loads(cloudpickle.dumps(await anext(self._said)))

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """A replica in this process, as Ray Serve hands it out. dies: after so many tokens of each request in turn, None
    for one that ends."""

    def __init__(self, model: herd.Model, *dies: int | None) -> None:
        self._replica = Replica.__new__(Replica)
        self._replica._service = Service(model, memory=1 << 26, spare=0)
        self._replica._grammars = Grammars(model.tokenizer)
        self._dies, self.responses = iter(dies), list[Response]()

    def options(self, **_: object) -> "Handle":
        return self

    @property
    def answer(self) -> "Handle":
        return self

    def remote(self, ask: Ask, guide: Guide | None) -> Response:
        ask, guide = cloudpickle.loads(cloudpickle.dumps((ask, guide)))
        self.responses.append(Response(self._replica.answer(ask, guide), next(self._dies)))
        return self.responses[-1]

    def close(self) -> None:
        self._replica._service.close()


def told(model: herd.Model, handle: Handle, ask: Ask, leave: int | None = None) -> list[Token]:
    """What a service with replicas says; leave: after so many tokens."""

    async def answer(service: Service) -> list[Token]:
        tokens = list[Token]()
        async with await service.submit(ask) as answers:
            async for said in answers:
                tokens += said.tokens
                if len(tokens) == leave:
                    break
        return tokens

    its: Any = handle
    with closing(handle), closing(Replicas(model, its, "app", 1)) as engine:
        with closing(Service(model, memory=1 << 26, replicas=engine)) as service:
            tokens = asyncio.run(answer(service))
            until(lambda: not engine.running)
        assert engine.memory_used == 0 and engine.idle
        return tokens


@pytest.mark.parametrize("dies", [(None,), (0, None), (3, 0, 0, 5, 1, None), (7, 0, 0, None)])
def test_an_answer_goes_on_where_a_replica_died(model: herd.Model, dies: tuple[int | None, ...]) -> None:
    sampler = herd.Sampler(temperature=1.0, seed=7, logprobs=2, frequency_penalty=0.4)
    ids = model.tokenizer.chat([user("Who?")])
    said = told(model, Handle(model, *dies), Ask(ids, 30, sampler))
    expected = model.generate(ids, max_tokens=30, sampler=sampler).tokens
    assert [token.id for token in said] == [token.id for token in expected]
    assert [token.logprob for token in said] == pytest.approx([token.logprob for token in expected])
    assert [token.finish for token in said] == [token.finish for token in expected]


def test_images_go_with_what_is_asked(folder: Path, pictures: list[Path]) -> None:  # noqa: F811
    model = herd.load(folder)
    content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": "What?"}]
    ids = model.tokenizer.chat([{"role": "user", "content": content}])
    seen, features = model.look(ids, pictures)
    said = told(model, Handle(model, 0, 3, None), Ask(seen, 10, images=features))
    assert [token.id for token in said] == [t.id for t in model.generate(ids, images=pictures, max_tokens=10).tokens]


def test_without_a_seed_all_replicas_draw_from_one_stream(model: herd.Model) -> None:
    handle = Handle(model, 4, 4, None)
    said = told(model, handle, Ask(model.tokenizer.chat([user("Who?")]), 20, herd.Sampler(temperature=1.0)))
    assert len(handle.responses) == 3 and [token.finish for token in said[:-1]] == [None] * (len(said) - 1)


def test_what_kills_all_replicas_is_told(model: herd.Model) -> None:
    handle = Handle(model, 2, 0, 0, 0, 0, 0)
    with pytest.raises(RuntimeError, match="4 replicas in a row died"):
        told(model, handle, Ask(model.tokenizer.chat([user("Who?")]), 30))
    assert len(handle.responses) == 4


def test_who_leaves_is_not_answered_any_more(model: herd.Model) -> None:
    handle = Handle(model, None)
    assert len(told(model, handle, Ask(model.tokenizer.chat([user("Who?")]), 10_000), leave=2)) == 2
    assert handle.responses[0].cancelled


def test_a_schema_that_fails_at_a_replica_is_told(model: herd.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Guided, ids: list[int], logits_V: Tensor, row: object) -> Tensor:
        self.failed = f"it is {self._matcher} with {self.bias}"
        return logits_V

    guide = Guided(model.tokenizer.eos_ids, {3: 1.0}, Grammars(model.tokenizer).matcher(COUNTRY), COUNTRY)
    monkeypatch.setattr(Guided, "__call__", fail)
    told(model, Handle(model, None), Ask(model.tokenizer.chat([user("Who?")]), 3, guide=guide))
    assert guide.failed is not None and "LLMatcher" in guide.failed and "{3: 1.0}" in guide.failed


def test_errors_of_replicas_are_told(model: herd.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuses(self: Response) -> None:
        raise RayTaskError("answer", "", PromptError("no")).as_instanceof_cause()

    monkeypatch.setattr(Response, "__anext__", refuses)
    with pytest.raises(PromptError, match=r"^no$"):
        told(model, Handle(model, None), Ask([1], 3))


def test_what_is_too_long_for_one_is_refused_at_once(model: herd.Model) -> None:
    its: Any = Handle(model)
    with closing(its), closing(Replicas(model, its, "app", 3)) as engine:  # noqa: SIM117
        with closing(Service(model, memory=1 << 16, replicas=engine)) as service:
            with pytest.raises(TooLong, match="this server has 65,536"):
                asyncio.run(service.submit(Ask([1], 2_000)))
