"""A context that is read in sequence, over time: its order, what is read again, and that nothing is lost."""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from herd.context import maintain, manifest, read, sources
from herd.context.forward import ReadingCache
from herd.context.segment import INDEPENDENT
from herd.context.store import Store
from tests.context.tiny_context import CHUNK, Bytes, MadeSequence, read_paths, several
from tests.context.tiny_sequence import from_scratch, late_first, order, read_rows, state, write

pytestmark = pytest.mark.usefixtures("old_files")


def test_what_is_unchanged_is_neither_opened_nor_computed(
    letters: Path, in_sequence: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_rows(in_sequence, letters) == len(in_sequence.chunks) == 12
    assert order(in_sequence.folder) == ["src/a", "src/b", "src/c", "src/d"]
    before = state(in_sequence.folder)
    monkeypatch.setattr(sources, "load", None)
    report = read_paths(in_sequence, letters, model=MadeSequence())
    assert (report.read_tokens, report.reused_tokens) == (0, in_sequence.tokens)
    assert state(in_sequence.folder) == before


def test_all_from_the_first_changed_chunk_on_is_read_again(letters: Path, in_sequence: Store, tmp_path: Path) -> None:
    read_rows(in_sequence, letters)
    text = (letters / "b").read_text()
    (letters / "b").write_text(text.replace("b line 1", "b edit 1"))
    report = read_paths(in_sequence, letters, model=(model := MadeSequence()))
    assert model.rows == 12 - 4, "a, and the first chunk of b"
    assert report.read_tokens + report.reused_tokens == report.tokens == in_sequence.tokens
    assert order(in_sequence.folder) == ["src/a", "src/b", "src/c", "src/d"], "it keeps its place"
    assert state(in_sequence.folder) == from_scratch(tmp_path / "clean", in_sequence.folder)
    (letters / "b").write_text(text)
    assert read_rows(in_sequence, letters) == 0, "until the context is compacted, what was is kept"
    assert state(in_sequence.folder) == from_scratch(tmp_path / "again", in_sequence.folder)


def test_new_sources_come_last_and_cost_only_themselves(letters: Path, in_sequence: Store, tmp_path: Path) -> None:
    late_first(in_sequence, letters)
    assert order(in_sequence.folder) == ["src/c", "src/d", "src/a", "src/b"]
    write(letters / "aa", "aa")
    assert read_rows(in_sequence, letters) == 3
    assert order(in_sequence.folder) == ["src/c", "src/d", "src/a", "src/b", "src/aa"]
    assert state(in_sequence.folder) == from_scratch(tmp_path / "clean", in_sequence.folder)


def test_what_comes_after_a_removed_source_is_read_again(letters: Path, in_sequence: Store, tmp_path: Path) -> None:
    read_rows(in_sequence, letters)
    (letters / "c").unlink()
    assert read_rows(in_sequence, letters) == 3
    assert order(in_sequence.folder) == ["src/a", "src/b", "src/d"]
    assert state(in_sequence.folder) == from_scratch(tmp_path / "clean", in_sequence.folder)
    (letters / "d").unlink()
    write(letters / "e", "e")  # its row may get the number that the row of d had
    assert read_rows(in_sequence, letters) == 3
    assert order(in_sequence.folder) == ["src/a", "src/b", "src/e"]


def test_a_touched_file_keeps_its_place(letters: Path, in_sequence: Store) -> None:
    read_rows(in_sequence, letters)
    before = state(in_sequence.folder)
    (letters / "b").write_text((letters / "b").read_text())
    assert read_rows(in_sequence, letters) == 0
    assert state(in_sequence.folder) == before


def test_what_was_not_asked_about_is_read_again_from_its_token_ids(
    letters: Path, in_sequence: Store, tmp_path: Path
) -> None:
    """Even where its file is no longer there."""
    read_rows(in_sequence, letters)
    write(letters / "a", "A")
    (letters / "b").unlink()
    (letters / "c").write_text("changed, and not asked about\n")
    report = read_paths(in_sequence, letters / "a", model=(model := MadeSequence()))
    assert model.rows == 12 and report.read_tokens == in_sequence.tokens
    assert order(in_sequence.folder) == ["src/a", "src/b", "src/c", "src/d"]
    write(letters / "b", "b")
    write(letters / "c", "c")
    assert state(in_sequence.folder) == from_scratch(tmp_path / "clean", in_sequence.folder)


def test_what_can_no_longer_be_read_goes(letters: Path, in_sequence: Store, tmp_path: Path) -> None:
    read_rows(in_sequence, letters)
    (letters / "b").write_bytes(b"\0\1\2")
    report = read_paths(in_sequence, letters, model=MadeSequence())
    assert [(s.name, s.reason) for s in report.skipped] == [("src/b", "binary file")] == in_sequence.skipped
    assert order(in_sequence.folder) == ["src/a", "src/c", "src/d"]
    assert state(in_sequence.folder) == from_scratch(tmp_path / "clean", in_sequence.folder)
    assert read_rows(in_sequence, letters) == 0


def test_a_moved_folder_keeps_its_places(letters: Path, in_sequence: Store, tmp_path: Path) -> None:
    read_rows(in_sequence, letters)
    before = state(in_sequence.folder)
    (tmp_path / "elsewhere").mkdir()
    letters.rename(tmp_path / "elsewhere" / "src")
    (tmp_path / "elsewhere" / "src" / "b").write_bytes(b"\0")
    assert read_rows(in_sequence, tmp_path / "elsewhere" / "src") == 0
    assert state(in_sequence.folder) == before, "b, whose old file is gone, is kept for want of another"
    write(tmp_path / "elsewhere" / "src" / "b", "b")
    assert read_rows(in_sequence, tmp_path / "elsewhere" / "src") == 0
    assert state(in_sequence.folder) == before


def test_equal_files_are_chunks_of_their_own(tmp_path: Path, in_sequence: Store) -> None:
    """They come after different chunks, so their K/V differ."""
    for place in ("x", "y"):
        (tmp_path / place / "src").mkdir(parents=True)
        write(tmp_path / place / "src" / "a", "same", 1)
    put_model = MadeSequence()
    read_paths(in_sequence, tmp_path / "x" / "src" / "a", model=put_model)
    (tmp_path / "x" / "src" / "a").rename(tmp_path / "x" / "src" / "b")
    read_paths(in_sequence, tmp_path / "x" / "src", tmp_path / "y" / "src", model=put_model)
    assert in_sequence.end_position == CHUNK * len(in_sequence.chunks) == CHUNK * len(state(in_sequence.folder))


def test_blank_files_are_sources_of_a_sequence(letters: Path, in_sequence: Store, tmp_path: Path) -> None:
    (letters / "b").write_text(" \n")
    read_rows(in_sequence, letters)
    assert [(s.name, s.tokens == 0) for s in in_sequence.sources] == [
        ("src/a", False), ("src/b", True), ("src/c", False), ("src/d", False)
    ]  # fmt: skip
    assert len(state(in_sequence.folder)) == 9
    write(letters / "b", "b")
    assert read_rows(in_sequence, letters) == 9 and order(in_sequence.folder)[1] == "src/b"


def test_progress_counts_what_is_read_again(letters: Path, in_sequence: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "SEGMENT_TOKENS", 60)
    read_rows(in_sequence, letters)
    write(letters / "b", "B")
    told: list[read.Progress] = []
    report = read.read([letters], in_sequence, MadeSequence(), Bytes(), told.append)  # type: ignore[arg-type]
    assert report.read_tokens < report.tokens and len(told) > 8
    for at in told:
        assert at.eta_s is None or at.read_tokens + at.eta_s * at.tokens_per_s == pytest.approx(
            report.read_tokens, rel=0.2
        )
    assert told[-1].eta_s == 0


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
    letters: Path, in_sequence: Store, tmp_path: Path, tokens: int, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "SEGMENT_TOKENS", tokens)
    monkeypatch.setattr(read, "_COMMIT_S", seconds)
    with pytest.raises(KeyboardInterrupt):
        read_paths(in_sequence, letters, model=Interrupted(8))
    in_sequence.refresh()
    assert [name for name, *_ in state(in_sequence.folder)] == (["src/a"] * 3 + ["src/b"] * 3 if tokens == 60 else [])
    assert read_rows(in_sequence, letters) == 4, "nothing is computed twice"
    assert state(in_sequence.folder) == from_scratch(tmp_path / "clean", in_sequence.folder)


@pytest.mark.parametrize("tokens", [60, 1 << 16])
def test_until_a_changed_sequence_is_there_the_old_one_is(
    letters: Path, in_sequence: Store, tmp_path: Path, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "SEGMENT_TOKENS", tokens)
    read_rows(in_sequence, letters)
    before = state(in_sequence.folder)
    write(letters / "a", "A", 4)
    (letters / "c").unlink()
    with pytest.raises(KeyboardInterrupt):
        read_paths(in_sequence, letters, model=Interrupted(8))
    in_sequence.refresh()
    assert state(in_sequence.folder) == before
    assert read_rows(in_sequence, letters) == 2
    assert order(in_sequence.folder) == ["src/a", "src/b", "src/d"]
    assert state(in_sequence.folder) == from_scratch(tmp_path / "clean", in_sequence.folder)


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
