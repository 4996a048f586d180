"""Reading: only what changed is computed, what is gone disappears, an interruption costs little."""

import io
import os
import types
from pathlib import Path

import pytest
import torch

from herd.context import maintain, read, sources
from herd.context.read import Progress, Stopped
from herd.context.store import NewChunk, Store
from tests.context.tiny_context import Bytes, CountingModel, MadeModel, read_paths, spec, tiny_model


@pytest.fixture(autouse=True)
def old_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files written by these tests count as old enough for their stat to be trusted."""
    monkeypatch.setattr(sources, "_RACY_NS", -(10**18))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "src"
    root.mkdir()
    for name in "abc":
        (root / f"{name}.txt").write_text("".join(f"{name} line {i}\n" for i in range(8)))
    return root


@pytest.fixture
def opened(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "ctx", spec())


def names(opened: Store) -> list[str]:
    return [source.name for source in opened.sources]


def test_what_is_unchanged_is_neither_opened_nor_computed(
    folder: Path, opened: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = CountingModel()
    first = read_paths(opened, folder, model=model)
    assert names(opened) == ["src/a.txt", "src/b.txt", "src/c.txt"]
    assert first.read_tokens == first.tokens == opened.tokens > 0 and first.reused_tokens == 0
    rows = model.rows
    monkeypatch.setattr(sources, "load", None)
    second = read_paths(opened, folder, model=model)
    assert (second.read_tokens, second.reused_tokens, second.tokens) == (0, first.tokens, first.tokens)
    assert model.rows == rows


def test_an_edit_reads_only_the_chunks_it_touches(folder: Path, opened: Store) -> None:
    read_paths(opened, folder)
    chunks = len(opened.chunks)
    text = (folder / "b.txt").read_text()
    (folder / "b.txt").write_text(text.replace("line 7", "edit 7"))
    model = CountingModel()
    report = read_paths(opened, folder, model=model)
    assert model.rows == 1 and len(opened.chunks) == chunks
    assert report.read_tokens + report.reused_tokens == report.tokens == opened.tokens
    ids = [bytes(opened.ids(i)) for i in range(len(opened.chunks))]
    assert sum(b"edit 7" in chunk for chunk in ids) == 1 and not any(b"b line 7" in chunk for chunk in ids)


def test_touching_a_file_computes_nothing(folder: Path, opened: Store) -> None:
    read_paths(opened, folder)
    os.utime(folder / "a.txt")
    model = CountingModel()
    assert read_paths(opened, folder, model=model).read_tokens == model.rows == 0


@pytest.mark.parametrize("back_s", [0, 3600, -3600])
def test_a_change_that_keeps_the_size_is_seen_at_any_mtime(folder: Path, opened: Store, back_s: int) -> None:
    read_paths(opened, folder)
    info = (folder / "a.txt").stat()
    (folder / "a.txt").write_text((folder / "a.txt").read_text().replace("line 3", "LINE 3"))
    os.utime(folder / "a.txt", ns=(info.st_atime_ns, info.st_mtime_ns - back_s * 10**9))
    assert read_paths(opened, folder).read_tokens > 0


def test_a_deleted_source_disappears_with_the_next_read_and_costs_nothing_to_bring_back(
    folder: Path, opened: Store
) -> None:
    read_paths(opened, folder)
    text = (folder / "b.txt").read_text()
    (folder / "b.txt").unlink()
    read_paths(opened, folder)
    assert names(opened) == ["src/a.txt", "src/c.txt"]
    (folder / "b.txt").write_text(text)
    assert read_paths(opened, folder).read_tokens == 0, "its chunks are kept until the context is compacted"
    assert len(names(opened)) == 3


def test_reading_one_file_of_a_folder_leaves_the_others(folder: Path, opened: Store) -> None:
    read_paths(opened, folder)
    (folder / "b.txt").write_text("new\n")
    (folder / "c.txt").unlink()
    read_paths(opened, folder / "b.txt")
    assert names(opened) == ["src/a.txt", "src/b.txt", "src/c.txt"], "b.txt keeps its name; c.txt was not asked about"


def test_what_cannot_be_read_any_more_is_listed_and_not_answered_from(folder: Path, opened: Store) -> None:
    read_paths(opened, folder)
    (folder / "b.txt").write_bytes(b"\0\1\2")
    report = read_paths(opened, folder)
    assert [(s.name, s.reason) for s in report.skipped] == [("src/b.txt", "binary file")]
    assert names(opened) == ["src/a.txt", "src/c.txt"]
    assert opened.skipped == [("src/b.txt", "binary file")]
    assert Store.open(opened.folder).skipped == opened.skipped, "remembered, not only reported"
    (folder / "b.txt").unlink()
    assert read_paths(opened, folder).skipped == [] == opened.skipped


def test_folders_of_the_same_name_get_longer_names(tmp_path: Path, opened: Store) -> None:
    for parent in ("one", "two"):
        (tmp_path / parent / "lib").mkdir(parents=True)
        (tmp_path / parent / "lib" / "a.txt").write_text(f"{parent}\n")
    read_paths(opened, tmp_path / "one" / "lib", tmp_path / "two" / "lib")
    assert names(opened) == ["lib/a.txt", "two/lib/a.txt"]
    read_paths(opened, tmp_path / "one" / "lib", tmp_path / "two" / "lib")
    assert names(opened) == ["lib/a.txt", "two/lib/a.txt"]


def test_a_moved_folder_keeps_its_names_and_chunks(folder: Path, tmp_path: Path, opened: Store) -> None:
    tokens = read_paths(opened, folder).tokens
    (tmp_path / "elsewhere").mkdir()
    folder.rename(tmp_path / "elsewhere" / "src")
    report = read_paths(opened, tmp_path / "elsewhere" / "src")
    assert names(opened) == ["src/a.txt", "src/b.txt", "src/c.txt"]
    assert (report.read_tokens, report.tokens) == (0, tokens)


def test_equal_chunks_are_computed_once(tmp_path: Path, opened: Store) -> None:
    (tmp_path / "a.txt").write_text("same\n")
    model = CountingModel()
    read_paths(opened, tmp_path / "a.txt", model=model)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.txt").write_text("same\n")
    report = read_paths(opened, tmp_path / "x" / "a.txt", model=model)
    assert model.rows == 2 or report.reused_tokens > 0


def test_blank_files_are_sources_without_tokens(tmp_path: Path, opened: Store) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.txt").write_text(" \n\n")
    read_paths(opened, tmp_path / "empty.txt", tmp_path / "blank.txt")
    assert [(s.name, s.tokens) for s in opened.sources] == [("blank.txt", 0), ("empty.txt", 0)]


def test_standard_input_is_a_source(opened: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in (b"first\n", b"second\n"):
        monkeypatch.setattr(sources.sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(text)))
        read_paths(opened, Path("-"))
        assert names(opened) == ["stdin"]
        assert bytes(opened.ids(0)).endswith(text)


@pytest.mark.parametrize(
    ("sizes", "rows", "bounds"),
    [
        pytest.param((8, 8, 8), 4, {"BATCH_TOKENS": 64}, id="several files"),
        pytest.param((400,), 40, {"SEGMENT_TOKENS": 200}, id="inside one long file"),
    ],
)
def test_an_interrupted_read_keeps_what_was_computed(
    sizes: tuple[int, ...],
    rows: int,
    bounds: dict[str, int],
    tmp_path: Path,
    opened: Store,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Interrupted(CountingModel):
        def read(self, ids_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            if self.rows >= rows:
                raise KeyboardInterrupt
            return super().read(ids_BT)

    for name, value in bounds.items():
        monkeypatch.setattr(read, name, value)
    folder = tmp_path / "files"
    folder.mkdir()
    for file, lines in enumerate(sizes):
        (folder / f"{file}.txt").write_text("".join(f"{file} line {i}\n" for i in range(lines)))
    interrupted, rest = Interrupted(), CountingModel()
    with pytest.raises(KeyboardInterrupt):
        read_paths(opened, folder, model=interrupted)
    opened.refresh()
    assert names(opened) == [], "no source is half there"
    assert maintain.verify(opened.folder).problems == []
    report = read_paths(opened, folder, model=rest)
    assert report.reused_tokens > 0 and report.read_tokens + report.reused_tokens == opened.tokens
    assert interrupted.rows + rest.rows == len(opened.chunks), "nothing was computed twice"
    clean = Store.open(opened.folder.with_name("clean"), spec())
    read_paths(clean, folder)
    assert {chunk.hash for chunk in clean.chunks} == {chunk.hash for chunk in opened.chunks}


def test_who_is_told_of_the_progress_may_end_a_read(folder: Path, opened: Store) -> None:
    def stop(progress: Progress) -> None:
        if progress.read_tokens:
            raise Stopped

    with pytest.raises(Stopped):
        read.read([folder], opened, tiny_model(), Bytes(), stop)
    opened.refresh()
    assert names(opened) == [], "no source is half there"
    report = read_paths(opened, folder)
    assert report.reused_tokens == report.tokens > 0, "what was read is kept"


def test_very_many_tiny_files_are_a_source_each(tmp_path: Path, opened: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 2000
    for i in range(count):
        (tmp_path / str(i % 20)).mkdir(exist_ok=True)
        (tmp_path / str(i % 20) / f"{i}.txt").write_text(f"item {i}\n")
    report = read_paths(opened, tmp_path, model=MadeModel())
    assert report.sources == len(opened.sources) == len(opened.chunks) == count
    assert len(opened.segments) == 1, "they are committed together"
    monkeypatch.setattr(sources, "load", None)
    assert read_paths(opened, tmp_path, model=MadeModel()).reused_tokens == report.tokens


def test_long_reads_are_committed_on_the_way(folder: Path, opened: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "SEGMENT_TOKENS", 100)
    read_paths(opened, folder)
    assert len(opened.segments) > 2


def test_progress_is_told_and_ends_at_the_end(folder: Path, opened: Store) -> None:
    told: list[Progress] = []
    report = read.read([folder], opened, tiny_model(), Bytes(), told.append)
    assert [p.sources for p in told] == sorted(p.sources for p in told)
    last = told[-1]
    assert (last.sources, last.sources_total, last.read_tokens) == (3, 3, report.read_tokens)
    assert last.tokens_per_s > 0 and last.eta_s == 0


def test_progress_inside_one_long_file_tells_what_is_left(
    tmp_path: Path, opened: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "SEGMENT_TOKENS", 200)
    path = tmp_path / "long.txt"
    path.write_text("".join(f"line {i:03}\n" for i in range(1000)))
    told: list[Progress] = []
    report = read.read([path], opened, tiny_model(), Bytes(), told.append)
    for at in told:
        assert at.eta_s is not None
        assert at.read_tokens + at.eta_s * at.tokens_per_s == pytest.approx(report.tokens, rel=0.2)


def test_batches_are_full_but_not_over(opened: Store) -> None:
    chunks = [NewChunk(bytes([n]), [0] * n, 1, 1) for n in (5, 32, 7, 30, 8, 1)]
    made = read.batches(chunks, 64)
    assert sorted(len(c.ids) for batch in made for c in batch) == [1, 5, 7, 8, 30, 32]
    assert all(len(batch) * max(len(c.ids) for c in batch) <= 64 for batch in made)
    assert [len(batch) for batch in made] == [2, 4]
    assert read.batches(chunks[1:2], 10) == [chunks[1:2]]


def test_what_was_skipped_for_its_content_is_not_opened_again(
    folder: Path, opened: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "b.txt").write_bytes(b"\0\1\2")
    first = read_paths(opened, folder)
    monkeypatch.setattr(sources, "load", None)
    assert [(s.name, s.reason) for s in read_paths(opened, folder).skipped] == [
        (s.name, s.reason) for s in first.skipped
    ]


def test_an_error_of_the_caller_stays_what_it_is(folder: Path, opened: Store) -> None:
    def broken(progress: Progress) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        read.read([folder], opened, tiny_model(), Bytes(), broken)
    assert read_paths(opened, folder).tokens > 0
