"""The service: errors reach who asked, and nobody else; counts are those of what happened."""

import asyncio
import re
from pathlib import Path

import pytest
import torch

import herd
from herd.engine import Engine
from herd.prompt.ask import ask_prompt
from herd.server.asks import Ask, Busy, End, TooLong
from herd.server.contexts import Contexts
from herd.server.library import Library
from herd.server.service import Service
from tests.server.served import Served, serving, user


async def answer(service: Service, ask: Ask) -> tuple[list[int], End | None]:
    ids, end = list[int](), None
    async with await service.submit(ask) as answers:
        async for told in answers:
            ids += [token.id for token in told.tokens]
            end = told.end or end
    return ids, end


@pytest.fixture
def context(model: herd.Model, tmp_path: Path) -> herd.Context:
    (tmp_path / "gate.txt").write_text("The code of the north gate is 4711.\n")
    made = herd.Context.open(tmp_path / "ctx", model)
    made.read([tmp_path / "gate.txt"])
    return made


def test_questions_and_prompts_run_side_by_side(model: herd.Model, context: herd.Context) -> None:
    questions = ["What is the code of the north gate?", "Which PIN has Ann Lee?", "☃"]
    prompts = [model.tokenizer.chat([user(text)]) for text in ("a", "b" * 90)]

    async def all_of(service: Service) -> list[tuple[list[int], End | None]]:
        asks = [Ask(ask_prompt(model.tokenizer, q), 60, contexts=(context,), question=q) for q in questions]
        return await asyncio.gather(*(answer(service, ask) for ask in [*asks, *(Ask(ids, 20) for ids in prompts)]))

    service = Service(model, memory=1 << 26)
    try:
        answers = asyncio.run(all_of(service))
    finally:
        service.close()
    for question, (ids, end) in zip(questions, answers, strict=False):
        expected = context.ask(question, max_tokens=60)
        assert (tuple(ids), end.citations, end.missed_mass) == (expected.ids, expected.citations, expected.missed_mass)
    for prompt, (ids, _) in zip(prompts, answers[3:], strict=True):
        assert tuple(i for i in ids if i not in model.tokenizer.eos_ids) == model.generate(prompt, max_tokens=20).ids


def test_memory_that_is_kept_is_given_up_where_it_is_needed(model: herd.Model) -> None:
    prompts = [model.tokenizer.chat([user(f"{n}")]) for n in range(8)]

    async def one_by_one(service: Service) -> None:
        for ids in prompts:
            said, _ = await answer(service, Ask(ids, 30))
            assert said == [token.id for token in model.generate(ids, max_tokens=30).tokens]
            assert 0 < service.memory_used <= service.memory
        with pytest.raises(TooLong, match="bytes"):
            await service.submit(Ask(prompts[0], 30_000))

    service = Service(model, memory=1 << 20)
    try:
        asyncio.run(one_by_one(service))
    finally:
        service.close()


def test_a_step_that_fails_ends_its_own_answers_only(model: herd.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in no step then goes on; what comes later is answered."""
    ids, step, broken = model.tokenizer.chat([user("x")]), Engine.step, [True]

    def breaks(engine: Engine) -> object:
        if broken and engine.running:
            broken.clear()
            for id in list(engine.running):
                engine.cancel(id)
            raise torch.OutOfMemoryError("no memory")
        return step(engine)

    async def both(service: Service) -> None:
        await answer(service, Ask(ids, 2))
        monkeypatch.setattr(Engine, "step", breaks)
        with pytest.raises(torch.OutOfMemoryError):
            for _ in range(2):  # the first step may only admit it
                await answer(service, Ask(ids, 5))
        assert len((await answer(service, Ask(ids, 5)))[0]) > 0
        assert service.open

    service = Service(model, memory=1 << 26)
    try:
        asyncio.run(both(service))
    finally:
        service.close()


def test_a_service_that_is_closed_tells_all(model: herd.Model) -> None:
    async def asked(service: Service) -> None:
        ids = model.tokenizer.chat([user("x")])
        answers = await service.submit(Ask(ids, 100_000))
        await asyncio.to_thread(service.close)
        with pytest.raises(Busy, match="being stopped"):
            async with answers:
                async for _ in answers:
                    pass
        with pytest.raises(Busy):
            await service.submit(Ask(ids, 1))
        assert await service.call(lambda: 3) == 3, "what still asks is not left waiting"

    asyncio.run(asked(Service(model, memory=1 << 26)))


def test_a_read_ends_where_the_server_does_and_goes_on_later(model: herd.Model, tmp_path: Path) -> None:
    file = tmp_path / "long.txt"
    file.write_text("".join(f"Line {n} of many.\n" for n in range(20_000)))

    async def stopped() -> None:
        service = Service(model, memory=1 << 26)
        library = Library(tmp_path / "data")
        contexts = Contexts(library, service)
        id = contexts.create("long")
        reading = asyncio.create_task(contexts.add(id, [("long.txt", file)]))
        while not contexts.reading.get(id) or not contexts.reading[id].read_tokens:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(service.close)
        with pytest.raises(Busy, match="read again"):
            await reading
        again = Service(model, memory=1 << 26)
        report = await Contexts(library, again).read(id, [library.context_folder(id) / "files" / "long.txt"])
        assert report.reused_tokens > 0 and report.read_tokens > 0 and not report.skipped
        again.close()
        library.close()

    asyncio.run(stopped())


def test_counts(model: herd.Model, tmp_path: Path) -> None:
    with serving(model, tmp_path) as served:
        used = served.ask(messages=[user("Count.")], max_tokens=7, temperature=0)["usage"]
        served.ask(status=400)
        text = served.http.get("/metrics").text
        for name, value in {
            "herd_prompt_tokens_total": used["prompt_tokens"],
            "herd_generated_tokens_total": used["completion_tokens"],
            "herd_cached_tokens_total": 0,
            "herd_time_to_first_token_seconds_count": 1,
            'herd_refused_total{status="400"}': 1,
            "herd_requests_waiting": 0,
            "herd_requests_running": 0,
            "herd_context_tokens": 0,
        }.items():
            found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
            assert found and float(found[1]) == value, name


def test_choices_compute_their_prompt_once(model: herd.Model, tmp_path: Path) -> None:
    with serving(model, tmp_path) as served:
        used = served.ask(messages=[user("Once upon a time. " * 8)], n=3, max_tokens=2, seed=1)["usage"]
        assert used["prompt_tokens_details"]["cached_tokens"] == 0, "one of them computed it"
        counted = re.search(r"^herd_cached_tokens_total (\S+)$", served.http.get("/metrics").text, re.MULTILINE)
        assert counted and float(counted[1]) == 2 * (used["prompt_tokens"] - 1)


def test_tokens_and_text(served: Served) -> None:
    ids = served.model.tokenizer.encode("A llama ☃ <|im_end|>")
    assert served.ask("/tokenize", prompt="A llama ☃ <|im_end|>")["tokens"] == ids
    assert served.ask("/detokenize", tokens=ids)["prompt"] == "A llama ☃ <|im_end|>"
    turn = served.model.tokenizer.chat([user("hi")])
    assert served.ask("/tokenize", messages=[user("hi")]) == {
        "tokens": turn,
        "count": len(turn),
        "max_model_len": served.model.config.max_position_embeddings,
    }
    for body in ({}, {"prompt": "x", "messages": []}):
        served.ask("/tokenize", status=400, **body)
    served.ask("/detokenize", status=400, tokens=[1 << 30])
    for prompt in ([], [[]], [[1], []]):
        assert "empty" in served.ask("/v1/completions", status=400, prompt=prompt)["error"]["message"]
    served.ask("/v1/embeddings", status=400, input=[])
    assert served.ask("/v1/embeddings", status=400, input="x" * 9000)["error"]["code"] == "context_length_exceeded"
