"""The store: what was committed is there, snapshots hold still, one writer at a time, and upkeep changes nothing."""

import contextlib
import os
import random
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from herd.context import maintain, manifest, store
from herd.context.segment import Spec, bytes_per_token
from herd.context.store import Store, pack_ids, unpack_ids
from herd.errors import ContextError
from tests.context.tiny_context import CHUNK, contents, exit_status, forked, new_chunk, put, spec

fast = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
texts = st.lists(st.binary(min_size=1, max_size=CHUNK), max_size=4)


class Folder(RuleBasedStateMachine):
    """Any sequence of writes and upkeep leaves exactly the sources that a dictionary would hold."""

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.temporary = tempfile.TemporaryDirectory()
        self.folder = Path(self.temporary.name) / "ctx"
        self.store = Store.open(self.folder, spec())
        self.model: dict[str, list[bytes]] = {}

    @rule(name=st.sampled_from("abc"), chunks=texts)
    def put(self, name: str, chunks: list[bytes]) -> None:
        put(self.store, name, chunks)
        self.model[name] = chunks

    @rule(name=st.sampled_from("abc"))
    def delete(self, name: str) -> None:
        with self.store.writer() as writer:
            writer.commit(removed=[row.id for row in manifest.sources(writer.db) if row.name == name])
        self.model.pop(name, None)

    @rule()
    def compact(self) -> None:
        done = maintain.compact(self.folder)
        assert done.damaged_sources == []

    @invariant()
    def agrees(self) -> None:
        self.store.refresh()
        assert {s.name: s.chunks for s in self.store.sources} == {n: len(c) for n, c in self.model.items()}
        live = {text for chunks in self.model.values() for text in chunks}
        assert {text for chunks in contents(self.store).values() for text in chunks} == live
        assert self.store.tokens == sum(map(len, live)), "a chunk that is used twice is there once"
        assert self.store.end_position == CHUNK * len(live)
        assert maintain.verify(self.folder).problems == []

    def teardown(self) -> None:
        self.temporary.cleanup()


Folder.TestCase.settings = settings(max_examples=10, stateful_step_count=6, deadline=None)
TestFolder = Folder.TestCase


@fast
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=CHUNK))
def test_token_ids_survive_packing(ids: list[int]) -> None:
    assert unpack_ids(pack_ids(ids), len(ids)) == ids


@fast
@given(st.binary(max_size=60), st.integers(1, CHUNK))
def test_damaged_token_ids_are_refused(packed: bytes, tokens: int) -> None:
    with contextlib.suppress(ContextError):
        assert len(unpack_ids(packed, tokens)) == tokens


def test_a_context_keeps_at_most_400_bytes_per_token() -> None:
    """Cria's shape: 3 heads of 64 and chunks of 512 tokens. The manifest is counted by test_disk_size."""
    assert bytes_per_token(Spec("x", 3, 64, 512)) == 396


def test_disk_size_with_the_manifest(tmp_path: Path) -> None:
    cria = Spec("x", 3, 64, 512)
    opened, rng = Store.open(tmp_path / "ctx", cria), random.Random(0)
    x = torch.randn(512, 3, 64)
    with opened.writer() as writer:
        for _ in range(2):
            batch = []
            for _ in range(126):
                ids = rng.choices(range(49152), k=512)  # more random than text is
                new = store.NewChunk(store.chunk_hash("x", ids), ids, 1, 60)
                batch.append((new, store.segment.pack(x, x, cria)))
            sources = [store.NewSource(f"s{new.hash.hex()}", None, "", [new.hash]) for new, _ in batch]
            writer.commit(batch, sources)
    size = sum(path.stat().st_size for path in (tmp_path / "ctx").iterdir())
    assert size / (2 * 126 * 512) <= 400


def test_a_snapshot_does_not_move(tmp_path: Path) -> None:
    first = Store.open(tmp_path / "ctx", spec())
    put(first, "a", [b"one", b"two"])
    first.refresh()
    before = contents(first)
    put(Store.open(tmp_path / "ctx", spec()), "a", [b"three"])
    maintain.compact(tmp_path / "ctx")
    assert contents(first) == before == {"a": [b"one", b"two"]}, "even though its segment is deleted"
    first.refresh()
    assert contents(first) == {"a": [b"three"]}


def test_readers_see_whole_commits_while_a_writer_writes(tmp_path: Path) -> None:
    folder = tmp_path / "ctx"
    Store.open(folder, spec())

    def write() -> None:
        opened = Store.open(folder, spec())
        for i in range(25):
            put(opened, "a", [b"%d.%d" % (i, j) for j in range(5)])
            put(opened, "b", [b"%d.%d" % (i, j) for j in range(5)])
            if i % 5 == 4:
                maintain.compact(folder)

    writer = forked(write)
    reader, seen = Store.open(folder), set()
    while (status := os.waitpid(writer, os.WNOHANG))[0] == 0:
        reader.refresh()
        for name, chunks in contents(reader).items():
            number = chunks[0].split(b".")[0]
            assert sorted(chunks) == [b"%s.%d" % (number, j) for j in range(5)]
            seen.add((name, number))
    assert status[1] == 0
    assert seen


def test_a_second_writer_is_told_who_writes(tmp_path: Path) -> None:
    first = Store.open(tmp_path / "ctx", spec())
    with first.writer(), pytest.raises(ContextError, match=r"being written by process \d+"):
        put(Store.open(tmp_path / "ctx", spec()), "a", [b"x"])
    put(first, "a", [b"x"])


def test_writers_in_other_processes_are_kept_out(tmp_path: Path) -> None:
    opened = Store.open(tmp_path / "ctx", spec())

    def write() -> None:
        put(Store.open(tmp_path / "ctx", spec()), "a", [b"x"])

    with opened.writer():
        assert exit_status(forked(write)) == 1
    assert exit_status(forked(write)) == 0
    opened.refresh()
    assert contents(opened) == {"a": [b"x"]}


def test_another_model_is_refused_and_the_folder_stays(tmp_path: Path) -> None:
    put(Store.open(tmp_path / "ctx", spec()), "a", [b"x"])
    with pytest.raises(ContextError, match="read by another model"):
        Store.open(tmp_path / "ctx", spec("other"))
    with pytest.raises(ContextError, match="dtype int8 instead of float32"):
        Store.open(tmp_path / "ctx", spec(dtype="float32"))
    assert contents(Store.open(tmp_path / "ctx", spec())) == {"a": [b"x"]}


def test_a_folder_of_other_things_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ContextError, match="not empty"):
        Store.open(tmp_path, spec())
    with pytest.raises(ContextError, match="holds no context"):
        Store.open(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_read_only_folder_can_be_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(Store.open(tmp_path / "ctx", spec()), "a", [b"x"])
    monkeypatch.setattr(manifest.os, "access", lambda *a: False)
    assert contents(Store.open(tmp_path / "ctx")) == {"a": [b"x"]}
    with pytest.raises(ContextError, match="readonly"):
        put(Store.open(tmp_path / "ctx"), "b", [b"y"])


def test_large_commits_are_split_into_segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SEGMENT_TOKENS", 20)
    opened = Store.open(tmp_path / "ctx", spec())
    chunks = [b"%010d" % i for i in range(7)] + [b"x" * CHUNK]
    put(opened, "a", chunks)
    opened.refresh()
    assert [mapped.row.tokens for mapped in opened.segments] == [20, 20, 20, 10, 32]
    assert contents(opened) == {"a": chunks}


def test_compact_joins_small_segments_and_drops_what_nobody_uses(tmp_path: Path) -> None:
    opened = Store.open(tmp_path / "ctx", spec())
    for i in range(6):
        put(opened, f"s{i}", [b"%d" % i * 20])
    put(opened, "s0", [b"new"])
    done = maintain.compact(tmp_path / "ctx")
    assert done.dropped_chunks == 1 and done.bytes_after < done.bytes_before
    opened.refresh()
    assert len(opened.segments) == 1 and len(opened.chunks) == 6
    files = list((tmp_path / "ctx").glob("*.kv"))
    assert maintain.compact(tmp_path / "ctx").dropped_chunks == 0
    assert list((tmp_path / "ctx").glob("*.kv")) == files, "nothing to do, nothing written"


def test_chunks_are_shared_between_sources(tmp_path: Path) -> None:
    opened = Store.open(tmp_path / "ctx", spec())
    put(opened, "b", [b"same", b"own"])
    put(opened, "a", [b"same"])
    opened.refresh()
    assert len(opened.chunks) == 2
    named = {bytes(opened.ids(i)): opened.sources[s].name for i, s in enumerate(opened.source_of)}
    assert named == {b"same": "a", b"own": "b"}, "the first source by name stands for a shared chunk"


def test_a_merge_takes_over_sources_chunks_and_omissions(tmp_path: Path) -> None:
    a, b = Store.open(tmp_path / "a", spec()), Store.open(tmp_path / "b", spec())
    put(a, "x", [b"shared", b"only a"])
    put(b, "y", [b"shared", b"only b"])
    with b.writer() as writer:
        writer.commit(skipped=[manifest.SkippedRow(b"/p", "p", "binary file")])
    assert maintain.merge(tmp_path / "a", tmp_path / "b") == len(b"only b")
    a.refresh()
    assert {s.name: s.chunks for s in a.sources} == {"x": 2, "y": 2} and len(a.chunks) == 3
    assert a.skipped == [("p", "binary file")]
    assert maintain.merge(tmp_path / "a", tmp_path / "b") == 0
    assert maintain.verify(tmp_path / "a").problems == []


def test_a_merge_never_overwrites_a_different_source_of_the_same_name(tmp_path: Path) -> None:
    a, b = Store.open(tmp_path / "a", spec()), Store.open(tmp_path / "b", spec())
    put(a, "x", [b"mine"])
    new, kv = new_chunk(b"theirs")
    with b.writer() as writer:
        writer.commit([(new, kv)], [store.NewSource("x", b"/elsewhere/x", "", [new.hash])])
    maintain.merge(tmp_path / "a", tmp_path / "b")
    a.refresh()
    assert contents(a) == {"x": [b"mine"], "x~2": [b"theirs"]}
    with pytest.raises(ContextError, match="into itself"):
        maintain.merge(tmp_path / "a", tmp_path / "a")
    with pytest.raises(ContextError, match="different models"):
        Store.open(tmp_path / "c", spec("other"))
        maintain.merge(tmp_path / "a", tmp_path / "c")
