"""Keys and values of chats in a file: after a restart or an edit, all is as if nothing had happened."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import herd
from herd import checkpoint
from herd.api import Model
from herd.engine import Block, Engine, Request, stream
from herd.model import Transformer
from herd.server.conversations import Conversations
from tests.conftest import tiny_config

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


def turn(engine: Engine, prompt: list[int], count: int = 3) -> tuple[list[int], int]:
    """All tokens after a turn, and how many were not computed."""
    engine.submit(Request(prompt, count, names=prompt))
    tokens = list(stream(engine))
    return [*prompt, *(token.id for token in tokens)], tokens[0].cached


def blocks(engine: Engine, names: list[int]) -> list[Block]:
    return engine.prefixes.blocks("", names)


def same(a: Engine, b: Engine, names: list[int]) -> bool:
    """Whether both hold the same of these tokens, bit for bit."""
    pairs = list(zip(blocks(a, names), blocks(b, names), strict=True))
    return all(x.names == y.names and torch.equal(x.global_kv, y.global_kv) for x, y in pairs) and bool(pairs)


def loaded(chats: Conversations, model: Model, prompt: list[int]) -> Engine:
    """An engine as of a new process, with what is kept of a prompt."""
    engine = Engine(model.transformer)
    engine.add("", *chats.load(prompt, 0))
    return engine


@settings(max_examples=12)
@given(st.lists(st.integers(2, 90), min_size=1, max_size=4))
def test_after_restarts_a_chat_is_what_it_would_have_been(
    tmp_path_factory: pytest.TempPathFactory, model: Model, lengths: list[int]
) -> None:
    folder, engine, now = tmp_path_factory.mktemp("kv"), Engine(model.transformer), list[int]()
    for number, length in enumerate(lengths):
        prompt = [*now, *ids(length, number)]
        chats = Conversations(folder, model)
        again = loaded(chats, model, prompt)
        (now, cached), (said, seen) = turn(engine, prompt), turn(again, prompt)
        assert now == said and cached == seen and (cached > 0) == (number > 0)
        assert same(engine, again, now[:-1])
        chats.write("a", blocks(again, now[:-1]))


@settings(max_examples=15)
@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from("wf"), st.integers(0, 150), st.integers(1, 90)), max_size=6
    )
)
def test_chats_are_those_of_a_dictionary(
    tmp_path_factory: pytest.TempPathFactory, model: Model, steps: list[tuple[str, str, int, int]]
) -> None:
    """Edited anywhere and forgotten: what a chat had last is there, and nothing that no chat has."""
    engine, folder = Engine(model.transformer), tmp_path_factory.mktemp("kv")
    last: dict[str, list[int]] = {}
    for number, (chat, does, back, more) in enumerate(steps):
        chats = Conversations(folder, model)
        if does == "f":
            chats.forget(chat)
            last.pop(chat, None)
        else:
            said, _ = turn(engine, [*last.get(chat, [])[:back], *ids(more, number)])
            last[chat] = said[:-1]
            chats.write(chat, blocks(engine, last[chat]))
        for names in last.values():
            found, _ = chats.load([*names, NEVER], 0)
            assert found[: len(names)] == names
        wanted = set[tuple[int, ...]]()
        for names in last.values():
            stop = 0
            while stop < len(names):
                stop = min(engine.prefixes.end(stop), len(names))
                wanted.add(tuple(names[:stop]))
        assert count(folder) == len(wanted)


def count(folder: Path) -> int:
    """Blocks in the file."""
    with sqlite3.connect(folder / "kv.sqlite") as db:
        return int(db.execute("SELECT count(*) FROM block").fetchone()[0])


def test_what_chats_begin_with_is_there_once(tmp_path: Path, model: Model) -> None:
    engine, chats, system = Engine(model.transformer), Conversations(tmp_path, model), ids(128, 0)
    for number, chat in enumerate("abc"):
        said, _ = turn(engine, [*system, *ids(5, number + 1)])
        chats.write(chat, blocks(engine, said[:-1]))
    assert count(tmp_path) == 2 + 3
    chats.forget("a")
    assert count(tmp_path) == 2 + 2
    again = loaded(Conversations(tmp_path, model), model, [*system, *ids(9, 9)])
    assert turn(again, [*system, *ids(9, 9)])[1] >= 128, "a new chat finds it after a restart, too"


@settings(max_examples=30)
@given(st.data())
def test_what_is_damaged_is_never_used(
    tmp_path_factory: pytest.TempPathFactory, model: Model, data: st.DataObject
) -> None:
    folder, engine = tmp_path_factory.mktemp("kv"), Engine(model.transformer)
    chats = Conversations(folder, model)
    said, _ = turn(engine, ids(150, 0))
    chats.write("a", blocks(engine, said[:-1]))
    file = folder / "kv.sqlite"
    whole = file.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    changed = b"" if data.draw(st.booleans()) else bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :]
    file.write_bytes(whole[:at] + changed)
    again = Engine(model.transformer)
    found, new = chats.load([*said, NEVER], 0)
    again.add("", found, new)
    assert found == said[: len(found)]
    for block, true in zip(blocks(again, said), blocks(engine, said), strict=False):
        assert torch.equal(block.global_kv, true.global_kv)
        assert block.local_kv is None or true.local_kv is None or torch.equal(block.local_kv, true.local_kv)
    more, _ = turn(again, [*said, *ids(4, 9)])  # mends the file
    chats.write("a", blocks(again, more[:-1]))
    assert chats.load([*more, NEVER], 0)[0] == more[:-1]


def test_another_model_computes_anew(tmp_path: Path, model: Model) -> None:
    engine = Engine(model.transformer)
    said, _ = turn(engine, ids(20, 0))
    Conversations(tmp_path, model).write("a", blocks(engine, said[:-1]))
    assert Conversations(tmp_path, replace(model, fingerprint="other")).load(said, 0) == ([], [])


def test_files_of_earlier_versions_make_room(tmp_path: Path, model: Model) -> None:
    (tmp_path / "0a.kv").write_bytes(b"HERDCV01")
    assert Conversations(tmp_path, model).load(ids(9, 0), 0) == ([], [])
    assert [path.name for path in tmp_path.iterdir()] == ["kv.sqlite"]


def test_the_file_has_a_limit_and_the_oldest_chats_go(tmp_path: Path, model: Model) -> None:
    engine, limit = Engine(model.transformer), 400_000
    chats, said = Conversations(tmp_path, model, limit), list[list[int]]()
    for number in range(12):
        said.append(turn(engine, ids(300, number))[0][:-1])
        chats.write(f"{number}", blocks(engine, said[-1]))
        assert (tmp_path / "kv.sqlite").stat().st_size <= limit + 16384
    there = [bool(chats.load([*names, NEVER], 0)[0]) for names in said]
    assert there == sorted(there) and there[-1] and not there[0]


WRITER = """
import sys
from pathlib import Path
import torch
import herd
from herd.engine import Engine, Request, stream
from herd.server.conversations import Conversations

torch.set_num_threads(1)
model = herd.load(sys.argv[1])
engine, chats, now = Engine(model.transformer), Conversations(Path(sys.argv[2]), model), [1, 2, 3]
while True:
    engine.submit(Request(now, 40, names=now))
    now = [*now, *(token.id for token in stream(engine)), 5]
    chats.write("a", engine.prefixes.blocks("", now))
    print(*now[:-2], flush=True)
"""


@pytest.mark.parametrize("lines", [1, 3, 6])
def test_a_kill_loses_nothing_that_was_written(tiny_model: Path, tmp_path: Path, lines: int) -> None:
    """Killed while it goes on: all that it said was written is there, and as an engine computes it."""
    command = [sys.executable, "-c", WRITER, str(tiny_model), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(lines):
            line = process.stdout.readline()
        os.kill(process.pid, signal.SIGKILL)
        said = [line, *process.stdout.readlines()]
    written = [int(id) for id in [line for line in said if line.endswith("\n")][-1].split()]
    model = herd.load(tiny_model)
    found, _ = Conversations(tmp_path, model).load([*written, NEVER], 0)
    assert found[: len(written)] == written
    again, whole = loaded(Conversations(tmp_path, model), model, [*written, 5]), Engine(model.transformer)
    (answer, cached), (expected, _) = turn(again, [*written, 5], 10), turn(whole, [*written, 5], 10)
    assert answer == expected and cached == len(written)
