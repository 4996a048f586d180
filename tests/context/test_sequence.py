"""A context that is read in sequence, over time: its order, what is read again, and that nothing is lost."""

import random
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from herd.context import archive, maintain, manifest, read, sources
from herd.context.forward import ReadingCache
from herd.context.segment import INDEPENDENT
from herd.context.store import Store
from herd.errors import ContextError
from tests.context.test_archive import rewrite
from tests.context.test_crash import flipped_copies, kill_at, lines_of
from tests.context.tiny_context import CHUNK, MadeSequence, put, read_paths, several, spec


@pytest.fixture(autouse=True)
def old_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files written by these tests count as old enough for their stat to be trusted."""
    monkeypatch.setattr(sources, "_RACY_NS", -(10**18))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Sources of three chunks each."""
    root = tmp_path / "src"
    root.mkdir()
    for name in "abcd":
        write(root / name, name)
    return root


@pytest.fixture
def opened(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "ctx", several())


def write(path: Path, text: str, lines: int = 3) -> None:
    """Each line fills a chunk, beside the header (`# src/a:1`)."""
    path.write_text("".join(f"{text} line {i}\n".rjust(CHUNK // 2) for i in range(lines)))


def state(folder: Path) -> list[tuple[str, bytes, int, int]]:
    """The sequence: source, token ids, checksum of the K/V and first line of each chunk, after checking all of it."""
    assert maintain.verify(folder).problems == []
    with manifest.connect(folder) as db:
        pairs, names = manifest.source_chunks(db), {row.id: row.name for row in manifest.sources(db)}
    opened = Store.open(folder)
    index = {chunk.id: place for place, chunk in enumerate(opened.chunks)}
    found = []
    for source, chunk in pairs:
        row = opened.chunks[index[chunk]]
        found.append((names[source], bytes(opened.ids(index[chunk])), row.crc, row.first_line))
    return found


def order(folder: Path) -> list[str]:
    return list(dict.fromkeys(name for name, *_ in state(folder)))


def from_scratch(folder: Path, like: Path) -> list[tuple[str, bytes, int, int]]:
    """The state of a context into which copies of the sources of another one are read one by one, in their order."""
    with manifest.connect(like) as db:
        rows = sorted(manifest.sources(db), key=lambda row: row.id)
    opened, copies = Store.open(folder / "ctx", several()), folder / "src"
    copies.mkdir()
    for row in rows:
        assert row.path is not None
        shutil.copy(row.path.decode(), copies)
        read_paths(opened, copies, model=MadeSequence())
    return state(folder / "ctx")


def read_rows(opened: Store, *paths: Path) -> int:
    """How many chunks a read ran through the model."""
    model = MadeSequence()
    read_paths(opened, *paths, model=model)
    return model.rows


def late_first(opened: Store, folder: Path) -> None:
    """Read c and d, and then a and b as well."""
    for name in "ab":
        (folder / name).unlink()
    assert read_rows(opened, folder) == 6
    for name in "ab":
        write(folder / name, name)
    assert read_rows(opened, folder) == 6


def test_what_is_unchanged_is_neither_opened_nor_computed(
    folder: Path, opened: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_rows(opened, folder) == len(opened.chunks) == 12
    assert order(opened.folder) == ["src/a", "src/b", "src/c", "src/d"]
    before = state(opened.folder)
    monkeypatch.setattr(sources, "load", None)
    report = read_paths(opened, folder, model=MadeSequence())
    assert (report.read_tokens, report.reused_tokens) == (0, opened.tokens)
    assert state(opened.folder) == before


def test_all_from_the_first_changed_chunk_on_is_read_again(folder: Path, opened: Store, tmp_path: Path) -> None:
    read_rows(opened, folder)
    text = (folder / "b").read_text()
    (folder / "b").write_text(text.replace("b line 1", "b edit 1"))
    report = read_paths(opened, folder, model=(model := MadeSequence()))
    assert model.rows == 12 - 4, "a, and the first chunk of b"
    assert report.read_tokens + report.reused_tokens == report.tokens == opened.tokens
    assert order(opened.folder) == ["src/a", "src/b", "src/c", "src/d"], "it keeps its place"
    assert state(opened.folder) == from_scratch(tmp_path / "clean", opened.folder)
    (folder / "b").write_text(text)
    assert read_rows(opened, folder) == 0, "until the context is compacted, what was is kept"
    assert state(opened.folder) == from_scratch(tmp_path / "again", opened.folder)


def test_new_sources_come_last_and_cost_only_themselves(folder: Path, opened: Store, tmp_path: Path) -> None:
    late_first(opened, folder)
    assert order(opened.folder) == ["src/c", "src/d", "src/a", "src/b"]
    write(folder / "aa", "aa")
    assert read_rows(opened, folder) == 3
    assert order(opened.folder) == ["src/c", "src/d", "src/a", "src/b", "src/aa"]
    assert state(opened.folder) == from_scratch(tmp_path / "clean", opened.folder)


def test_what_comes_after_a_removed_source_is_read_again(folder: Path, opened: Store, tmp_path: Path) -> None:
    read_rows(opened, folder)
    (folder / "c").unlink()
    assert read_rows(opened, folder) == 3
    assert order(opened.folder) == ["src/a", "src/b", "src/d"]
    assert state(opened.folder) == from_scratch(tmp_path / "clean", opened.folder)
    (folder / "d").unlink()
    write(folder / "e", "e")  # its row may get the number that the row of d had
    assert read_rows(opened, folder) == 3
    assert order(opened.folder) == ["src/a", "src/b", "src/e"]


def test_a_touched_file_keeps_its_place(folder: Path, opened: Store) -> None:
    read_rows(opened, folder)
    before = state(opened.folder)
    (folder / "b").write_text((folder / "b").read_text())
    assert read_rows(opened, folder) == 0
    assert state(opened.folder) == before


def test_what_was_not_asked_about_is_read_again_from_its_token_ids(folder: Path, opened: Store, tmp_path: Path) -> None:
    """Even where its file is no longer there."""
    read_rows(opened, folder)
    write(folder / "a", "A")
    (folder / "b").unlink()
    (folder / "c").write_text("changed, and not asked about\n")
    report = read_paths(opened, folder / "a", model=(model := MadeSequence()))
    assert model.rows == 12 and report.read_tokens == opened.tokens
    assert order(opened.folder) == ["src/a", "src/b", "src/c", "src/d"]
    write(folder / "b", "b")
    write(folder / "c", "c")
    assert state(opened.folder) == from_scratch(tmp_path / "clean", opened.folder)


def test_what_can_no_longer_be_read_goes(folder: Path, opened: Store, tmp_path: Path) -> None:
    read_rows(opened, folder)
    (folder / "b").write_bytes(b"\0\1\2")
    report = read_paths(opened, folder, model=MadeSequence())
    assert [(s.name, s.reason) for s in report.skipped] == [("src/b", "binary file")] == opened.skipped
    assert order(opened.folder) == ["src/a", "src/c", "src/d"]
    assert state(opened.folder) == from_scratch(tmp_path / "clean", opened.folder)
    assert read_rows(opened, folder) == 0


def test_a_moved_folder_keeps_its_places(folder: Path, opened: Store, tmp_path: Path) -> None:
    read_rows(opened, folder)
    before = state(opened.folder)
    (tmp_path / "elsewhere").mkdir()
    folder.rename(tmp_path / "elsewhere" / "src")
    (tmp_path / "elsewhere" / "src" / "b").write_bytes(b"\0")
    assert read_rows(opened, tmp_path / "elsewhere" / "src") == 0
    assert state(opened.folder) == before, "b, whose old file is gone, is kept for want of another"
    write(tmp_path / "elsewhere" / "src" / "b", "b")
    assert read_rows(opened, tmp_path / "elsewhere" / "src") == 0
    assert state(opened.folder) == before


def test_equal_files_are_chunks_of_their_own(tmp_path: Path, opened: Store) -> None:
    """They come after different chunks, so their K/V differ."""
    for place in ("x", "y"):
        (tmp_path / place / "src").mkdir(parents=True)
        write(tmp_path / place / "src" / "a", "same", 1)
    put_model = MadeSequence()
    read_paths(opened, tmp_path / "x" / "src" / "a", model=put_model)
    (tmp_path / "x" / "src" / "a").rename(tmp_path / "x" / "src" / "b")
    read_paths(opened, tmp_path / "x" / "src", tmp_path / "y" / "src", model=put_model)
    assert opened.end_position == CHUNK * len(opened.chunks) == CHUNK * len(state(opened.folder))


def test_blank_files_are_sources_of_a_sequence(folder: Path, opened: Store, tmp_path: Path) -> None:
    (folder / "b").write_text(" \n")
    read_rows(opened, folder)
    assert [(s.name, s.tokens == 0) for s in opened.sources] == [
        ("src/a", False), ("src/b", True), ("src/c", False), ("src/d", False)
    ]  # fmt: skip
    assert len(state(opened.folder)) == 9
    write(folder / "b", "b")
    assert read_rows(opened, folder) == 9 and order(opened.folder)[1] == "src/b"


class Folder(RuleBasedStateMachine):
    """After any changes, a read leaves the state that reading from scratch in the same order does."""

    def __init__(self) -> None:
        super().__init__()
        self.temporary = tempfile.TemporaryDirectory()
        self.place = Path(self.temporary.name)
        (self.place / "src").mkdir()
        self.opened, self.fresh, self.expected = Store.open(self.place / "ctx", several()), 0, list[str]()

    @rule(name=st.sampled_from("abcd"), text=st.sampled_from(["x", "y"]), lines=st.integers(0, 4))
    def change(self, name: str, text: str, lines: int) -> None:
        write(self.place / "src" / name, text, lines)

    @rule(name=st.sampled_from("abcd"))
    def remove(self, name: str) -> None:
        (self.place / "src" / name).unlink(missing_ok=True)

    @rule(name=st.sampled_from("abcd"))
    def spoil(self, name: str) -> None:
        (self.place / "src" / name).write_bytes(b"\0")

    @rule()
    def read(self) -> None:
        read_paths(self.opened, self.place / "src", model=MadeSequence())
        there = [p.name for p in sorted((self.place / "src").iterdir()) if p.read_bytes() != b"\0"]
        self.expected = [n for n in self.expected if n in there] + [n for n in there if n not in self.expected]
        with manifest.connect(self.opened.folder) as db:
            rows = sorted(manifest.sources(db), key=lambda row: row.id)
        assert [row.name for row in rows] == [f"src/{name}" for name in self.expected]
        self.fresh += 1
        assert state(self.opened.folder) == from_scratch(self.place / str(self.fresh), self.opened.folder)

    @rule()
    def compact(self) -> None:
        before = state(self.opened.folder)
        assert maintain.compact(self.opened.folder).damaged_sources == []
        assert state(self.opened.folder) == before

    @invariant()
    def is_sound(self) -> None:
        state(self.opened.folder)

    def teardown(self) -> None:
        self.temporary.cleanup()


Folder.TestCase.settings = settings(max_examples=15, stateful_step_count=10, deadline=None)
TestFolder = Folder.TestCase


class Interrupted(MadeSequence):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.limit = rows

    def read(self, ids_BT: torch.Tensor, first: int, cache: ReadingCache) -> tuple[torch.Tensor, torch.Tensor]:
        if self.rows >= self.limit:
            raise KeyboardInterrupt
        return super().read(ids_BT, first, cache)


@pytest.mark.parametrize(("tokens", "seconds"), [(60, 60.0), (1 << 16, 60.0), (1 << 16, 0.0)])
def test_an_interrupted_read_goes_on(
    folder: Path, opened: Store, tmp_path: Path, tokens: int, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "SEGMENT_TOKENS", tokens)
    monkeypatch.setattr(read, "_COMMIT_S", seconds)
    with pytest.raises(KeyboardInterrupt):
        read_paths(opened, folder, model=Interrupted(8))
    opened.refresh()
    assert [name for name, *_ in state(opened.folder)] == (["src/a"] * 3 + ["src/b"] * 3 if tokens == 60 else [])
    assert read_rows(opened, folder) == 4, "nothing is computed twice"
    assert state(opened.folder) == from_scratch(tmp_path / "clean", opened.folder)


@pytest.mark.parametrize("tokens", [60, 1 << 16])
def test_until_a_changed_sequence_is_there_the_old_one_is(
    folder: Path, opened: Store, tmp_path: Path, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "SEGMENT_TOKENS", tokens)
    read_rows(opened, folder)
    before = state(opened.folder)
    write(folder / "a", "A", 4)
    (folder / "c").unlink()
    with pytest.raises(KeyboardInterrupt):
        read_paths(opened, folder, model=Interrupted(8))
    opened.refresh()
    assert state(opened.folder) == before
    assert read_rows(opened, folder) == 2
    assert order(opened.folder) == ["src/a", "src/b", "src/d"]
    assert state(opened.folder) == from_scratch(tmp_path / "clean", opened.folder)


@pytest.mark.parametrize("edited", [False, True], ids=["from nothing", "after an edit"])
def test_kill_9_at_20_moments_of_a_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edited: bool) -> None:
    """Each read goes on where the one before was killed, and the last ends where a read in peace does."""
    monkeypatch.setattr(read, "SEGMENT_TOKENS", 100)
    # Files count as just written: every read looks into them, and is long enough to kill.
    monkeypatch.setattr(sources, "_RACY_NS", 10**18)
    source = tmp_path / "src"
    source.mkdir()
    for name in "abcdef":
        write(source / name, name, 4)
    peace, ctx = tmp_path / "peace", tmp_path / "ctx"

    def work(folder: Path) -> None:
        read_paths(Store.open(folder, several()), source, model=MadeSequence())

    for place in (peace, ctx):
        Store.open(place, several())
        if edited:
            work(place)
    before = state(ctx)
    if edited:
        write(source / "b", "B", 5)
        (source / "d").unlink()
        write(source / "g", "g", 4)
    total = lines_of(lambda: work(peace))
    after = state(peace)
    # A read that goes on is shorter than one from the start.
    rng, kept, killed = random.Random(0), set[bytes](), 0
    for _ in range(20):
        killed += kill_at(rng.randrange(1, total // 2), lambda: work(ctx)) == -signal.SIGKILL
        now = state(ctx)
        if edited and now != before:
            assert len({name for name, *_ in now}) >= 5 and now == after[: len(now)], "the old part came at once"
        elif not edited:
            assert now == after[: len(now)]
        with manifest.connect(ctx) as db:
            known = set(manifest.known_hashes(db))
        assert kept <= known, "what was committed stays"
        kept = known
    assert killed > 10
    work(ctx)
    assert state(ctx) == after


def test_a_name_that_passes_on_keeps_the_new_source(tmp_path: Path) -> None:
    """Of contexts without a sequence, too: the row of the new source may have the number of the old one."""
    for place in ("one", "two"):
        (tmp_path / place / "lib").mkdir(parents=True)
    opened = Store.open(tmp_path / "ctx", several(INDEPENDENT))
    write(tmp_path / "one" / "lib" / "a", "old")
    read_paths(opened, tmp_path / "one" / "lib", model=MadeSequence())
    (tmp_path / "one" / "lib" / "a").unlink()
    write(tmp_path / "two" / "lib" / "a", "new")
    read_paths(opened, tmp_path / "one" / "lib", tmp_path / "two" / "lib", model=MadeSequence())
    assert [(s.name, s.path) for s in opened.sources] == [("lib/a", bytes(tmp_path / "two" / "lib" / "a"))]


def damage(opened: Store, place: int) -> None:
    """Flip a bit of the K/V of a chunk of the sequence."""
    with manifest.connect(opened.folder) as db:
        chunk = manifest.chunk(db, manifest.source_chunks(db)[place][1])
        path = opened.folder / manifest.segment(db, chunk.segment).file
    data = bytearray(path.read_bytes())
    data[128 + chunk.start * 8] ^= 1  # the first key, of 8 bytes per token
    path.write_bytes(data)


@pytest.mark.parametrize("segment_tokens", [60, 1 << 16])
def test_what_came_after_damage_is_dropped_with_it(
    folder: Path, opened: Store, tmp_path: Path, segment_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "SEGMENT_TOKENS", segment_tokens)
    read_rows(opened, folder)
    before = state(opened.folder)
    damage(opened, 4)
    assert len(maintain.verify(opened.folder).problems) == 1
    done = maintain.compact(opened.folder)
    assert done.damaged_sources == ["src/b", "src/c", "src/d"] and done.dropped_chunks == 8
    assert state(opened.folder) == before[:3]
    assert [(name, "damaged" in reason) for name, reason in Store.open(opened.folder).skipped] == [
        (name, True) for name in done.damaged_sources
    ]
    assert "was read after one" in Store.open(opened.folder).skipped[1][1]
    assert read_rows(opened, folder) == 8
    assert state(opened.folder) == before and opened.skipped == []


def test_nothing_is_read_after_damage(folder: Path, opened: Store) -> None:
    """It would be read from the damage, and look sound."""
    read_rows(opened, folder)
    damage(opened, 4)
    write(folder / "e", "e")
    with pytest.raises(ContextError, match=r"its checksum does not match; run `herd context compact"):
        read_rows(opened, folder)
    opened.refresh()
    assert len(opened.chunks) == 12
    maintain.compact(opened.folder)
    assert read_rows(opened, folder) == 11 and len(state(opened.folder)) == 15


def test_a_segment_cut_under_a_read_is_an_error(folder: Path, opened: Store) -> None:
    read_rows(opened, folder)
    (path,) = opened.folder.glob("*.kv")
    write(folder / "e", "e")

    class Cutting(MadeSequence):
        def read(self, ids_BT: torch.Tensor, first: int, cache: ReadingCache) -> tuple[torch.Tensor, torch.Tensor]:
            path.write_bytes(path.read_bytes()[:-1])
            return super().read(ids_BT, first, cache)

    with pytest.raises(ContextError, match="bytes instead of"):
        read_paths(opened, folder, model=Cutting())


def test_a_sequence_goes_on_after_it_is_narrowed(folder: Path, opened: Store) -> None:
    read_rows(opened, folder)
    maintain.compact(opened.folder, "int4")
    opened.refresh()
    assert opened.spec == several(dtype="int4")
    write(folder / "e", "e")
    assert read_rows(opened, folder) == 3 and len(state(opened.folder)) == 15


def test_verify_finds_a_sequence_that_is_none(folder: Path, opened: Store) -> None:
    read_rows(opened, folder)
    with manifest.connect(opened.folder) as db, manifest.transaction(db):
        db.execute("PRAGMA defer_foreign_keys = ON")
        db.execute("UPDATE source_chunk SET ordinal = 9 WHERE source = 2 AND ordinal = 0")
    (problem,) = maintain.verify(opened.folder).problems
    assert "number 4 of the sequence, was not read after the one before it" in problem and "\n" not in problem


def test_a_flipped_bit_of_the_manifest_is_found_or_harmless(folder: Path, opened: Store) -> None:
    read_rows(opened, folder)
    before, silent = state(opened.folder), 0
    for copy in flipped_copies(opened.folder, manifest.FILE):
        try:
            if not maintain.verify(copy).problems:
                silent += 1
                assert state(copy) == before
            Store.open(copy, several())
        except ContextError as error:
            assert "\n" not in str(error) and str(copy) in str(error)
    assert silent < 190, "some of them hit something"


def test_an_archive_keeps_the_sequence(folder: Path, opened: Store, tmp_path: Path) -> None:
    late_first(opened, folder)
    before = state(opened.folder)
    archive.export(opened.folder, tmp_path / "ctx.tar")
    imported = archive.import_(tmp_path / "ctx.tar", tmp_path / "new")
    assert state(tmp_path / "new") == before and imported.spec == several()
    assert read_rows(imported, folder) == 0, "the files it was read from take their places"
    assert state(tmp_path / "new") == before


LIES: dict[str, Callable[[dict[str, Any], Any], None]] = {
    "another order": lambda index, members: index["sources"].reverse(),
    "a source less": lambda index, members: index["sources"].pop(1),
    "no reading": lambda index, members: index["spec"].pop("reading"),
    "more layers": lambda index, members: index["spec"].update(layers=4),
    "one layer": lambda index, members: index["spec"].update(layers=1, kv_heads=6, reading=INDEPENDENT),
    "another reading": lambda index, members: index["spec"].update(reading="backwards"),
}


@pytest.mark.parametrize("lie", LIES)
def test_an_archive_that_is_no_sequence_is_refused(folder: Path, opened: Store, tmp_path: Path, lie: str) -> None:
    read_rows(opened, folder)
    archive.export(opened.folder, tmp_path / "ctx.tar")
    rewrite(tmp_path / "ctx.tar", tmp_path / "lie.tar", LIES[lie])
    with pytest.raises(ContextError):
        archive.import_(tmp_path / "lie.tar", tmp_path / "new")
        # What is only called otherwise can be no other context of this model.
        Store.open(tmp_path / "new", several())
    assert lie in ("no reading", "one layer") or not (tmp_path / "new").exists()


def test_sequences_are_not_merged(folder: Path, opened: Store, tmp_path: Path) -> None:
    read_rows(opened, folder)
    other = Store.open(tmp_path / "other", several())
    read_rows(other, folder / "a")
    with pytest.raises(ContextError, match=r"was read in sequence, .* cannot be merged; read the sources of both into"):
        maintain.merge(opened.folder, other.folder)
    alone = [Store.open(tmp_path / name, several(INDEPENDENT)) for name in "xy"]
    for store, name in zip(alone, "ab", strict=True):
        read_paths(store, folder / name, model=MadeSequence())
    assert maintain.merge(alone[0].folder, alone[1].folder) == alone[1].tokens
    put(Store.open(tmp_path / "one", spec()), "a", [b"x"])
    with pytest.raises(ContextError, match="in sequence"):
        maintain.merge(tmp_path / "one", opened.folder)
