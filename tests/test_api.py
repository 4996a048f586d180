"""Herd from Python: what a model's name stands for, and which contexts can be asked together."""

import os
from pathlib import Path

import pytest
import torch

import herd
from herd.errors import ConfigError, ContextError, PromptError


def test_each_choice_of_formats_is_a_model_of_its_own(tiny_model: Path) -> None:
    names = ("", "@int8:8", "@int4:8", "@experts=int8:8", "@shared=int8:8", "@attention=fp8")
    prints = [herd.load(f"{tiny_model}{name}").fingerprint for name in names]
    assert len(set(prints)) == len(names)
    assert herd.load(f"{tiny_model}@experts=int8:8,shared=int8:8,attention=int8:8,head=int8:8").fingerprint == prints[1]


def test_a_calibrated_model_is_one_of_its_own(tiny_model: Path) -> None:
    text = torch.randint(250, (2, 40), generator=torch.Generator().manual_seed(0))
    rounded, *calibrated = (
        herd.load(f"{tiny_model}@int4:8", calibration=rows) for rows in (None, text, text[:1], text)
    )
    assert calibrated[0].fingerprint == calibrated[2].fingerprint
    assert len({rounded.fingerprint, calibrated[0].fingerprint, calibrated[1].fingerprint}) == 3
    assert torch.equal(calibrated[0].logits([1, 2]), calibrated[2].logits([1, 2]))
    assert not torch.equal(calibrated[0].logits([1, 2]), rounded.logits([1, 2]))
    with pytest.raises(ConfigError, match=r"names no weights to calibrate; name a format, such as .*@int4"):
        herd.load(tiny_model, calibration=text)


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    file = tmp_path / "gate.txt"
    file.write_text("The code of the north gate is 4711.\n")
    return file


def read_into(folder: Path, model: herd.Model, file: Path) -> herd.Context:
    context = herd.Context.open(folder, model)
    context.read([file])
    return context


def test_contexts_of_two_models_are_not_asked_together(notes: Path, tiny_model: Path, tmp_path: Path) -> None:
    first = read_into(tmp_path / "first", herd.load(tiny_model), notes)
    second = read_into(tmp_path / "second", herd.load(f"{tiny_model}@int8:8"), notes)
    with pytest.raises(ContextError, match=r"second was read by another model than .*first; ask them apart"):
        first.ask("What is the code?", also=[second])


@pytest.mark.parametrize("kind", ["tiny_model", "several_model"])
def test_an_answer_is_a_quote_or_says_that_there_is_none(
    notes: Path, kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Whatever the weights."""
    context = read_into(tmp_path / "ctx", herd.load(request.getfixturevalue(kind)), notes)
    for question in ("What is the code of the north gate?", "Which PIN has Ann Lee?", "☃"):
        [answer] = context.ask_many([question], max_tokens=80)
        assert answer.quoted
        there = [answer.text[at:] in notes.read_text() for at in range(len(answer.text) - 4)]
        assert answer.text.endswith(" is not in the context.") or any(there), answer.text
        told = list[str]()
        assert context.ask(question, max_tokens=80, on_text=told.append).text == answer.text == "".join(told)
    free = context.ask(question, max_tokens=8, quote=False)
    assert not free.quoted and free.text not in notes.read_text()


def test_a_context_named_twice_is_not_asked(notes: Path, tiny_model: Path, tmp_path: Path) -> None:
    model = herd.load(tiny_model)
    first = read_into(tmp_path / "first", model, notes)
    (tmp_path / "link").symlink_to(tmp_path / "first")
    for again in (first, herd.Context.open(tmp_path / "link", model)):
        with pytest.raises(ContextError, match="named twice"):
            first.ask("What is the code?", also=[again])


def test_only_contexts_whose_chunks_were_read_on_their_own_are_asked_together(
    notes: Path, several_model: Path, tmp_path: Path
) -> None:
    model = herd.load(several_model)
    other = notes.with_name("other.txt")
    other.write_text("The code of the south gate is 4712.\n")
    first, second = read_into(tmp_path / "first", model, notes), read_into(tmp_path / "second", model, other)
    with pytest.raises(ContextError, match=r"first was read in sequence .* asked alone; .* --reading independent"):
        first.ask("Which code?", also=[second])
    assert [c.source for c in first.ask("Which code?", max_tokens=2).citations] == ["gate.txt"]
    alone = [herd.Context.open(tmp_path / name, model, reading="independent") for name in "ab"]
    for context, file in zip(alone, (notes, other), strict=True):
        context.read([file])
    assert alone[0].ask("Which code?", also=[alone[1]], max_tokens=2).citations
    with pytest.raises(ContextError, match="was read in sequence"):
        alone[0].ask("Which code?", also=[second])


def test_questions_asked_together_of_several_layers(notes: Path, several_model: Path, tmp_path: Path) -> None:
    context = read_into(tmp_path / "ctx", herd.load(several_model), notes)
    questions = ["What is the code of the north gate?", "Which gate?"]
    assert context.ask_many(questions, max_tokens=6) == [context.ask(q, max_tokens=6) for q in questions]


def test_a_context_cut_under_its_reader_is_an_error(notes: Path, tiny_model: Path, tmp_path: Path) -> None:
    context = read_into(tmp_path / "ctx", herd.load(tiny_model), notes)
    before = context.ask("What is the code?", max_tokens=2)
    [segment] = context.folder.glob("*.kv")
    kept, size = tmp_path / "kept", segment.stat().st_size
    segment.rename(kept)
    assert context.ask("What is the code?", max_tokens=2) == before, "a deleted file stays readable"
    kept.rename(segment)
    # One byte only: without the check this test fails; with more than a page it would kill the whole run.
    os.truncate(segment, size - 1)
    with pytest.raises(ContextError, match=f"{size - 1:,} bytes instead of {size:,}; run `herd context compact"):
        context.ask("What is the code?", max_tokens=2)


def test_what_can_be_asked_is_limited_by_tokens_and_not_by_chunks(short_model: Path, tmp_path: Path) -> None:
    model, files = herd.load(short_model), [tmp_path / f"{name}.txt" for name in "abcdef"]
    for file in files:
        file.write_text(f"The code of gate {file.stem} is 4711.\n")
    context = herd.Context.open(tmp_path / "ctx", model)
    context.read(files)
    assert len(context.sources) * 512 > model.config.max_position_embeddings == 1536 > context.tokens + 400
    assert context.too_long is None
    answers = context.ask_many([f"Which code has gate {file.stem}?" for file in files], max_tokens=2)
    assert [answer.citations[0].context for answer in answers] == [context.folder] * 6
    assert context.ask("Which code?", max_tokens=600).citations
    with pytest.raises(PromptError, match="this model has 1,536; shorten the prompt or allow fewer new tokens"):
        context.ask("Which code?", max_tokens=1300)

    long = tmp_path / "long.txt"
    long.write_text("The code of this gate is a secret.\n" * 30)
    other = read_into(tmp_path / "other", model, long)
    assert 1024 < other.tokens < 1536, "more than a question can stand behind"
    with pytest.raises(ContextError, match=r"2 contexts have 1,\d+ tokens, .* 1,536 positions .* ask fewer at a time"):
        context.ask("Which code?", also=[other])
    assert other.too_long is not None and f"other has {other.tokens:,} tokens" in other.too_long
    with pytest.raises(ContextError, match="and ask each by itself") as refused:
        other.ask("Which code?", max_tokens=2)
    assert str(refused.value) == other.too_long
