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
from herd.context.segment import Spec, bytes_per_token, convert
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

    @rule()
    def narrow(self) -> None:
        maintain.compact(self.folder, "int4")
        assert Store.open(self.folder).spec == spec(dtype="int4")

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


@pytest.mark.parametrize(("dtype", "size"), [("int8", 396), ("int4", 204), ("float32", 1536)])
def test_bytes_per_token(dtype: str, size: int) -> None:
    """Cria's shape: 3 heads of 64 and chunks of 512 tokens. The manifest is counted by test_disk_size."""
    assert bytes_per_token(Spec("x", 3, 64, 512, dtype)) == size


@pytest.mark.parametrize(("dtype", "limit"), [("int8", 400), ("int4", 208)])
def test_disk_size_with_the_manifest(tmp_path: Path, dtype: str, limit: int) -> None:
    cria = Spec("x", 3, 64, 512, dtype)
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
    assert size / (2 * 126 * 512) <= limit


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
    assert contents(Store.open(tmp_path / "ctx", spec())) == {"a": [b"x"]}


def test_a_context_keeps_its_format_and_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "ctx"
    put(Store.open(folder, spec(dtype="int8")), "a", [b"x"])
    assert contents(Store.open(folder, spec(dtype="int4"), any_dtype=True)) == {"a": [b"x"]}
    with pytest.raises(ContextError, match=r"keeps K/V as int8, not int4; .* run `herd context compact .* --kv int4`"):
        Store.open(folder, spec(dtype="int4"))
    with pytest.raises(ContextError, match=r"keeps K/V as int8, not float32; .* into another folder"):
        Store.open(folder, spec(dtype="float32"))
    with pytest.raises(ContextError, match="read by another model"):
        Store.open(folder, spec("other", "int4"), any_dtype=True)
    with pytest.raises(ContextError, match="int8, int4 or float32, not 'int5'"):
        spec(dtype="int5")
    with pytest.raises(ContextError, match="two numbers in a byte and heads have 7"):
        Spec("x", 1, 7, 8, "int4")


@pytest.mark.parametrize("wide", ["int8", "float32"])
def test_compact_narrows_and_never_widens(tmp_path: Path, wide: str) -> None:
    folder = tmp_path / "ctx"
    stale = Store.open(folder, spec(dtype=wide))
    put(stale, "a", [b"one", b"two"])
    put(stale, "b", [b"three"])
    stale.refresh()
    exact = stale.kv(0)
    done = maintain.compact(folder, "int4")
    assert (done.dropped_chunks, done.damaged_sources) == (0, [])
    opened = Store.open(folder)
    assert opened.spec == spec(dtype="int4") and maintain.verify(folder).problems == []
    for a, b in zip(opened.kv(0).arrays(), convert(exact, opened.spec).arrays(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(stale.kv(0).k_GNd, exact.k_GNd), "who reads goes on with what was"
    put(stale, "c", [b"four"])  # a writer that opened the context before it was narrowed
    stale.refresh()
    assert stale.spec == opened.spec and maintain.verify(folder).problems == []
    files = list(folder.glob("*.kv"))
    maintain.compact(folder, "int4")
    assert len(list(folder.glob("*.kv"))) < len(files), "small segments are joined as ever"
    with pytest.raises(ContextError, match=f"keeps K/V as int4, and {wide} would not bring back .* --kv {wide}"):
        maintain.compact(folder, wide)
    with pytest.raises(ContextError, match="not 'int5'"):
        maintain.compact(folder, "int5")


def test_an_empty_context_can_be_narrowed(tmp_path: Path) -> None:
    Store.open(tmp_path / "ctx", spec())
    maintain.compact(tmp_path / "ctx", "int4")
    opened = Store.open(tmp_path / "ctx", spec(dtype="int4"))
    put(opened, "a", [b"x"])
    assert contents(Store.open(tmp_path / "ctx")) == {"a": [b"x"]}


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


@pytest.mark.parametrize("formats", [("int8", "int4"), ("int4", "int8")])
def test_a_merge_of_two_formats_names_what_to_narrow(tmp_path: Path, formats: tuple[str, str]) -> None:
    for name, dtype in zip("ab", formats, strict=True):
        put(Store.open(tmp_path / name, spec(dtype=dtype)), name, [name.encode()])
    wide = tmp_path / "ab"[formats.index("int8")]
    with pytest.raises(ContextError, match=f"run `herd context compact {wide} --kv int4` first"):
        maintain.merge(tmp_path / "a", tmp_path / "b")
    maintain.compact(wide, "int4")
    assert maintain.merge(tmp_path / "a", tmp_path / "b") == 1
    assert contents(Store.open(tmp_path / "a")) == {"a": [b"a"], "b": [b"b"]}
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
