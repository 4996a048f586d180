"""Keys and values of conversations in files: after a restart or an edit, all is as if nothing had happened."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import herd
from herd import checkpoint
from herd.api import Model
from herd.engine import Engine, Request, stream
from herd.model import KVRow, Transformer
from herd.server.conversations import Conversations
from tests.conftest import tiny_config

CHUNK = 64
NEVER = 256  # a token that is not said


@pytest.fixture(scope="module", params=["plain", "packed"])
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Model:
    """In PyTorch's layers, and, where there is the native library, in its own."""
    if request.param == "plain":
        return herd.load(tiny_model)
    folder = tmp_path_factory.mktemp("model") / "wide"
    torch.manual_seed(0)
    transformer = Transformer(replace(tiny_config(), head_dim=64))
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    checkpoint.save(transformer, folder)
    for file in tiny_model.glob("tokenizer*"):
        shutil.copy(file, folder)
    return herd.load(f"{folder}@int8")


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(NEVER, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def turn(
    model: Model, prompt: list[int], before: tuple[list[int], KVRow] | None = None, count: int = 3
) -> tuple[list[int], KVRow]:
    """All tokens after a turn, and memory of all but the last. before: the same of what the prompt goes on from."""
    engine = Engine(model.transformer)
    if before is None:
        id = engine.submit(Request(prompt, count, room=1024))
    else:
        said, row = before
        assert prompt[: len(said)] == said
        id = engine.submit(Request(prompt[len(said) :], count, after=engine.keep(said, row)))
    chosen = [token.id for token in stream(engine)]
    kept = engine.release(id)
    assert kept is not None
    return [*prompt, *chosen], kept


def saved(chats: Conversations, model: Model, lengths: list[int]) -> tuple[list[int], KVRow]:
    """A chat of such turns, saved after each of them."""
    now = None
    for number, length in enumerate(lengths):
        now = turn(model, [*(now[0] if now else []), *ids(length, number)], now)
        chats.write(chats.take("a", now[0][:-1], now[1]))
    assert now is not None
    return now


def same(a: tuple[list[int], KVRow], b: tuple[list[int], KVRow]) -> bool:
    """Whether tokens and memory are equal, bit for bit."""
    stop = len(a[0]) - 1
    both = zip(a[1].take(0, stop), b[1].take(0, stop), strict=True)
    return a[0] == b[0] and all(torch.equal(x, y) for x, y in both)


@settings(max_examples=12)
@given(st.lists(st.integers(2, 90), min_size=1, max_size=4))
def test_after_restarts_a_chat_is_what_it_would_have_been(
    tmp_path_factory: pytest.TempPathFactory, model: Model, lengths: list[int]
) -> None:
    folder, now, again = tmp_path_factory.mktemp("kv"), None, None
    for number, length in enumerate(lengths):
        prompt = [*(now[0] if now else []), *ids(length, number)]
        chats = Conversations(folder, model)  # as of a new process
        found = chats.load("a", prompt, 1024)
        assert (found is None) == (number == 0)
        now, again = turn(model, prompt, now), turn(model, prompt, found)
        assert same(now, again)
        chats.write(chats.take("a", again[0][:-1], again[1]))


@settings(max_examples=12)
@given(st.integers(2, 200), st.integers(0, 200), st.integers(2, 60))
def test_an_edited_chat_goes_on_from_where_it_was_edited(
    tmp_path_factory: pytest.TempPathFactory, model: Model, length: int, back: int, more: int
) -> None:
    chats = Conversations(tmp_path_factory.mktemp("kv"), model)
    said, row = saved(chats, model, [length])
    back = min(back, len(said) - 1)
    edited = [*said[:back], NEVER, *ids(more, 1)]
    in_file, at_hand = chats.load("a", edited, 1024), chats.fit(said[:-1], row, edited, 1024)
    # What a local layer sees is gone where its chunk is; what begins a chunk needs nothing of it.
    kept = back if back // CHUNK == (len(said) - 1) // CHUNK else back // CHUNK * CHUNK
    assert [found and len(found[0]) - 1 for found in (in_file, at_hand)] == [kept or None] * 2
    if in_file is None or at_hand is None:
        return
    assert same(in_file, at_hand)
    went_on = turn(model, edited, in_file)
    assert same(went_on, turn(model, edited, at_hand))
    chats.write(chats.take("a", went_on[0][:-1], went_on[1]))
    read = chats.load("a", [*went_on[0], NEVER], 1024)
    assert read is not None and same(read, went_on)


def test_a_chat_moves_into_a_larger_memory(tmp_path: Path, model: Model) -> None:
    chats = Conversations(tmp_path, model)
    now = saved(chats, model, [100, 30])
    moved = chats.fit(now[0][:-1], now[1], [*now[0], NEVER], 3000)
    assert moved is not None and moved[1].tokens == 3000 and same(moved, now)


@settings(max_examples=20)
@given(st.data())
def test_what_is_damaged_is_never_used(
    tmp_path_factory: pytest.TempPathFactory, model: Model, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("kv")
    chats = Conversations(folder, model)
    said, row = saved(chats, model, [20, 5, 7])
    file = folder / "a.kv"
    whole = file.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    cut = data.draw(st.booleans())
    file.write_bytes(
        whole[:at] if cut else whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :]
    )
    found = chats.load("a", [*said, NEVER], 1024)
    if found is not None:
        assert len(found[0]) < len(said) and same(found, (said[: len(found[0])], row))
    again = turn(model, [*said, *ids(4, 9)], found)  # mends the file
    chats.write(chats.take("a", again[0][:-1], again[1]))
    read = chats.load("a", [*again[0], NEVER], 1024)
    assert read is not None and same(read, again)


def test_another_model_computes_anew(tmp_path: Path, model: Model) -> None:
    said, _ = saved(Conversations(tmp_path, model), model, [20])
    other = Conversations(tmp_path, replace(model, fingerprint="other"))
    assert other.load("a", [*said, NEVER], 1024) is None


def test_files_have_a_limit_and_the_oldest_go(tmp_path: Path, model: Model) -> None:
    said, row = turn(model, ids(20, 0))
    probe = Conversations(tmp_path, model)
    probe.write(probe.take("a", said[:-1], row))
    size = (tmp_path / "a.kv").stat().st_size
    chats = Conversations(tmp_path, model, limit=2 * size)
    for chat in "bc":
        chats.write(chats.take(chat, said[:-1], row))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.kv", "c.kv"]
    chats.forget("b")
    assert chats.load("b", [*said, NEVER], 1024) is None and chats.load("c", [*said, NEVER], 1024) is not None
