"""kill -9 at any line, a full disk, truncation, flipped bits: nothing committed is lost, nothing wrong is believed."""

import errno
import os
import random
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import herd.context
from herd.context import maintain, manifest, read, segment, sources
from herd.context.store import NewSource, Store
from herd.errors import ContextError
from tests.context.tiny_context import MadeModel, contents, exit_status, forked, new_chunk, put, read_paths, spec

_CODE = str(Path(herd.context.__file__).parent)


def kill_at(line: int, work: Callable[[], None]) -> int:
    """Run the work in a child that gets SIGKILL at its line-th line of herd.context; its exit status."""

    def traced() -> None:
        left = line

        def trace(frame: FrameType, event: str, arg: Any) -> Any:
            nonlocal left
            if not frame.f_code.co_filename.startswith(_CODE):
                return None
            if event == "line":
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        work()

    return exit_status(forked(traced))


def lines_of(work: Callable[[], None]) -> int:
    """How many lines of herd.context the work runs."""
    count = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(_CODE):
            return None
        count += event == "line"
        return trace

    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(None)
    return count


def check_sound(folder: Path, before: dict[str, list[bytes]], after: dict[str, list[bytes]]) -> None:
    """The context is in one of two states, every byte of it verifies, and it can be written again."""
    assert contents(Store.open(folder)) in (before, after)
    assert maintain.verify(folder).problems == []
    opened = Store.open(folder)
    put(opened, "later", [b"later"])
    opened.refresh()
    named = {mapped.row.file for mapped in opened.segments}
    with manifest.connect(folder) as db:
        named |= {row.file for row in manifest.segments(db)}
    assert {path.name for path in folder.glob("*.kv")} == named, "what the crash left is gone"


@pytest.mark.parametrize("seed", range(12))
def test_kill_9_while_a_source_is_replaced(tmp_path: Path, seed: int) -> None:
    def prepare(folder: Path) -> dict[str, list[bytes]]:
        opened = Store.open(folder, spec())
        put(opened, "a", [b"one", b"two"])
        return {"a": [b"one", b"two"]}

    def work(folder: Path) -> None:
        put(Store.open(folder, spec()), "a", [b"two", b"three", b"four"])

    prepare(tmp_path / "dry")
    total = lines_of(lambda: work(tmp_path / "dry"))
    folder = tmp_path / "ctx"
    before = prepare(folder)
    at = random.Random(seed).randrange(1, total)
    assert kill_at(at, lambda: work(folder)) == -signal.SIGKILL
    opened = Store.open(folder)
    if set(contents(opened)["a"]) != set(before["a"]):
        assert set(contents(opened)["a"]) == {b"two", b"three", b"four"}
    check_sound(folder, contents(opened), contents(opened))


def test_kill_9_at_20_moments_of_a_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each read goes on where the one before was killed, and the last ends where a read in peace does."""
    monkeypatch.setattr(read, "SEGMENT_TOKENS", 100)
    # Files count as just written on the slowest machine, too: every read looks into them, and is long enough to kill.
    monkeypatch.setattr(sources, "_RACY_NS", 10**18)
    source = tmp_path / "src"
    source.mkdir()
    for name in "abcdef":
        (source / f"{name}.txt").write_text("".join(f"{name} line {i}\n" for i in range(12)))

    def work(folder: Path) -> None:
        read_paths(Store.open(folder, spec()), source, model=MadeModel())

    total = lines_of(lambda: work(tmp_path / "peace"))
    folder, rng, kept, killed = tmp_path / "ctx", random.Random(0), set[bytes](), 0
    Store.open(folder, spec())
    for _ in range(20):
        killed += kill_at(rng.randrange(1, total), lambda: work(folder)) == -signal.SIGKILL
        assert maintain.verify(folder).problems == []
        contents(Store.open(folder))
        with manifest.connect(folder) as db:
            known = set(manifest.known_hashes(db))
        assert kept <= known, "what was committed stays"
        kept = known
    assert killed > 10
    work(folder)
    assert contents(Store.open(folder)) == contents(Store.open(tmp_path / "peace"))


@pytest.mark.parametrize("kv", [None, "int4"])
@pytest.mark.parametrize("seed", range(8))
def test_kill_9_while_a_context_is_compacted(tmp_path: Path, seed: int, kv: str | None) -> None:
    """Also to another format: then all of it has the old or the new one (`contents` compares every byte)."""

    def prepare(folder: Path) -> None:
        opened = Store.open(folder, spec())
        for i in range(4):
            put(opened, f"s{i}", [b"%d" % i])
        put(opened, "s0", [b"new"])

    prepare(tmp_path / "dry")
    total = lines_of(lambda: maintain.compact(tmp_path / "dry", kv) and None)
    folder = tmp_path / "ctx"
    prepare(folder)
    before = contents(Store.open(folder))
    at = random.Random(seed).randrange(1, total)
    assert kill_at(at, lambda: maintain.compact(folder, kv) and None) == -signal.SIGKILL
    assert contents(Store.open(folder)) == before
    check_sound(folder, before, before)


@pytest.mark.parametrize("seed", range(6))
def test_kill_9_while_a_context_is_created(tmp_path: Path, seed: int) -> None:
    total = lines_of(lambda: Store.open(tmp_path / "dry", spec()) and None)
    at = random.Random(seed).randrange(1, total)
    kill_at(at, lambda: Store.open(tmp_path / "ctx", spec()) and None)
    opened = Store.open(tmp_path / "ctx", spec())
    put(opened, "a", [b"x"])
    opened.refresh()
    assert contents(opened) == {"a": [b"x"]}


@pytest.mark.parametrize("limit", [1 << 10, 40 << 10, 70 << 10, 100 << 10])
def test_a_file_that_may_not_grow_is_one_clear_error(tmp_path: Path, limit: int) -> None:
    """The system refuses writes beyond a size, whichever file reaches it first."""
    folder = tmp_path / "ctx"
    put(Store.open(folder, spec()), "a", [b"one"])

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            opened = Store.open(folder, spec())
            for i in range(100):
                put(opened, f"s{i}", [b"%d.%d" % (i, j) for j in range(200)])
        except ContextError as error:
            if str(folder) in str(error) and "\n" not in str(error):
                os._exit(7)

    assert exit_status(forked(work)) == 7
    opened = Store.open(folder)
    assert all(len(chunks) in (1, 200) for chunks in contents(opened).values())
    assert contents(opened)["a"] == [b"one"]
    check_sound(folder, contents(opened), contents(opened))


def test_a_full_disk_says_so_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Store.open(tmp_path / "ctx", spec())
    put(opened, "a", [b"one"])

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(segment.os, "fsync", full)
        with pytest.raises(ContextError, match=r"No space left on device; what was committed is safe"):
            put(opened, "a", [b"two"])
    assert len(list((tmp_path / "ctx").glob("*.kv"))) == 1, "the piece that did not fit is gone"
    check_sound(tmp_path / "ctx", {"a": [b"one"]}, {"a": [b"one"]})


def damaged_context(folder: Path) -> Path:
    """Two sources in two segments; the second one's segment file."""
    opened = Store.open(folder, spec())
    put(opened, "good", [b"one", b"two"])
    before = set(folder.glob("*.kv"))
    put(opened, "bad", [b"three", b"four"])
    (path,) = set(folder.glob("*.kv")) - before
    return path


def mended(folder: Path) -> None:
    """The fix that every message names: compact drops what is damaged, reading again brings it back."""
    assert maintain.compact(folder).damaged_sources == ["bad"]
    opened = Store.open(folder, spec())
    assert contents(opened) == {"good": [b"one", b"two"]}
    assert opened.skipped == [("bad", "its K/V was damaged and dropped; read it again")]
    put(opened, "bad", [b"three", b"four"])
    opened.refresh()
    assert {name: set(chunks) for name, chunks in contents(opened).items()} == {
        "good": {b"one", b"two"},
        "bad": {b"three", b"four"},
    }
    assert maintain.verify(folder).problems == []


@pytest.mark.parametrize("keep", [0, 1, 100, 200, -1])
def test_a_truncated_segment_is_found_on_opening(tmp_path: Path, keep: int) -> None:
    path = damaged_context(tmp_path / "ctx")
    size = path.stat().st_size
    os.truncate(path, keep if keep >= 0 else size + keep)
    with pytest.raises(ContextError, match=r"bytes instead of .* run `herd context compact"):
        Store.open(tmp_path / "ctx")
    assert len(maintain.verify(tmp_path / "ctx").problems) == 1
    mended(tmp_path / "ctx")


def test_a_missing_segment_is_found_on_opening(tmp_path: Path) -> None:
    damaged_context(tmp_path / "ctx").unlink()
    with pytest.raises(ContextError, match=r"the file is missing; run `herd context compact"):
        Store.open(tmp_path / "ctx")
    mended(tmp_path / "ctx")


def test_every_flipped_bit_of_a_segment_is_found(tmp_path: Path) -> None:
    path = damaged_context(tmp_path / "ctx")
    sound = path.read_bytes()
    opened = Store.open(tmp_path / "ctx")
    values = [a for mapped in opened.segments for a in mapped.kv.arrays()]
    padding = 0
    for position in random.Random(0).sample(range(len(sound)), 200):
        flipped = bytearray(sound)
        flipped[position] ^= 1 << (position % 8)
        path.write_bytes(flipped)
        if not maintain.verify(tmp_path / "ctx").problems:
            padding += 1
            again = [a for mapped in Store.open(tmp_path / "ctx").segments for a in mapped.kv.arrays()]
            assert all((a == b).all() for a, b in zip(values, again, strict=True)), "only padding may be anything"
    assert padding < 100
    path.write_bytes(bytes([sound[0] ^ 1]) + sound[1:])
    with pytest.raises(ContextError, match="its header does not match"):
        Store.open(tmp_path / "ctx")
    flipped = bytearray(sound)
    flipped[130] ^= 1  # a key: sizes are right, so only verify sees it
    path.write_bytes(flipped)
    assert "its checksum does not match" in maintain.verify(tmp_path / "ctx").problems[0]
    mended(tmp_path / "ctx")


def flipped_copies(folder: Path, file: str) -> Iterator[Path]:
    """Copies of a context, one after the other, each with one bit of a file flipped."""
    copy, sound = folder.with_name("copy"), (folder / file).read_bytes()
    for position in random.Random(1).sample(range(len(sound)), 200):
        # The -shm file is an index of the log for processes that are alive.
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*-shm"))
        flipped = bytearray(sound)
        flipped[position] ^= 1 << (position % 8)
        (copy / file).write_bytes(flipped)
        yield copy
        shutil.rmtree(copy)


def state(folder: Path) -> tuple[object, ...]:
    """All that a context says: chunks and their lines, sources, what was skipped."""
    opened = Store.open(folder)
    lines = [(chunk.first_line, chunk.last_line) for chunk in opened.chunks]
    return contents(opened), lines, opened.sources, opened.skipped


def test_a_flipped_bit_of_the_manifest_is_found_or_harmless(tmp_path: Path) -> None:
    folder = tmp_path / "ctx"
    damaged_context(folder)
    with Store.open(folder).writer() as writer:
        writer.commit(skipped=[manifest.SkippedRow(b"/p", "p", "binary file")])
    before, silent = state(folder), 0
    for copy in flipped_copies(folder, manifest.FILE):
        try:
            if not maintain.verify(copy).problems:
                silent += 1
                assert state(copy) == before
            Store.open(copy, spec())
        except ContextError as error:
            assert "\n" not in str(error) and str(copy) in str(error)
    assert silent < 190, "some of them hit something"
    os.truncate(folder / manifest.FILE, 100)
    with pytest.raises(ContextError, match="damaged"):
        Store.open(folder, spec())


def test_a_flipped_bit_of_a_line_number_or_a_reason_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "ctx"
    opened, (chunk, kv) = Store.open(folder, spec()), new_chunk(b"text")
    chunk = replace(chunk, first_line=0x616263, last_line=0x646566)
    with opened.writer() as writer:
        skipped = [manifest.SkippedRow(b"/p", "p", "binary file")]
        writer.commit([(chunk, kv)], [NewSource("a", b"/a", "", [chunk.hash])], skipped=skipped)
    path = folder / manifest.FILE
    sound = path.read_bytes()
    for value in (b"abc", b"def", b"binary file"):
        at = sound.index(value)
        path.write_bytes(sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
        (problem, *_) = maintain.verify(folder).problems
        assert "manifest.sqlite is damaged" in problem and "\n" not in problem


def test_a_flipped_bit_of_the_log_gives_an_earlier_state(tmp_path: Path) -> None:
    """Commits that were not yet moved into the manifest stand in SQLite's log, and are believed up to the damage."""
    folder = tmp_path / "ctx"
    Store.open(folder, spec())

    def work() -> None:
        with Store.open(folder, spec()).writer() as writer:
            for i in range(6):
                new, kv = new_chunk(b"%d" % i)
                writer.commit([(new, kv)], [NewSource(f"s{i}", None, "", [new.hash])])
            os.kill(os.getpid(), signal.SIGKILL)

    assert exit_status(forked(work)) == -signal.SIGKILL
    states = [{f"s{i}": [b"%d" % i] for i in range(n)} for n in range(7)]
    seen = set()
    for copy in flipped_copies(folder, f"{manifest.FILE}-wal"):
        assert maintain.verify(copy).problems == []
        seen.add(states.index(contents(Store.open(copy))))
    assert len(seen) > 3
    assert contents(Store.open(folder)) == states[6], "undamaged, it holds everything"


def test_another_context_s_segment_is_not_accepted(tmp_path: Path) -> None:
    """Right size, right format, wrong model: the header carries the fingerprint."""
    path = damaged_context(tmp_path / "ctx")
    other = Store.open(tmp_path / "other", spec("other"))
    put(other, "bad", [b"three", b"four"])
    (theirs,) = (tmp_path / "other").glob("*.kv")
    assert theirs.stat().st_size == path.stat().st_size
    path.write_bytes(theirs.read_bytes())
    with pytest.raises(ContextError, match="its header does not match"):
        Store.open(tmp_path / "ctx")
