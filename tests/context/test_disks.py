"""Disks that are full or may not be written, mounted for real: one clear error, and what was committed stays."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from herd.context import archive, maintain, read
from herd.context.store import Store
from herd.errors import ContextError
from tests.context.tiny_context import MadeModel, contents, put, read_paths, spec


def mount(*args: object) -> bool:
    try:
        return subprocess.run(["mount", *map(str, args)], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 600 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not mount("-t", "tmpfs", "-o", "size=600k", "tmpfs", folder):
        pytest.skip("needs the right to mount a disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "src"
    folder.mkdir()
    for i in range(8):
        (folder / f"{i}.txt").write_text("".join(f"{i} line {j}\n" for j in range(200)))
    return folder


def test_a_read_that_fills_the_disk_goes_on_when_there_is_space(
    tmp_path: Path, disk: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "SEGMENT_TOKENS", 1000)
    folder = disk / "ctx"
    opened = Store.open(folder, spec())
    with pytest.raises(ContextError, match=r"what was committed is safe") as error:
        read_paths(opened, source, model=MadeModel())
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
    opened.refresh()
    before = contents(opened)
    assert before
    assert maintain.verify(folder).problems == []
    assert mount("-o", "remount,size=50m", disk)
    report = read_paths(opened, source, model=MadeModel())
    assert report.reused_tokens > 0
    assert before.items() <= contents(opened).items()
    calm = Store.open(tmp_path / "calm", spec())
    read_paths(calm, source, model=MadeModel())
    assert {chunk.hash for chunk in opened.chunks} == {chunk.hash for chunk in calm.chunks}
    assert maintain.verify(folder).problems == []


def test_a_context_that_finds_no_space_at_all_is_one_error(disk: Path) -> None:
    with (disk / "fill").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(b"x" * 4096)
    with pytest.raises(ContextError, match=r"No space left on device"):
        Store.open(disk / "ctx", spec())
    (disk / "fill").unlink()
    opened = Store.open(disk / "ctx", spec())
    put(opened, "a", [b"x"])
    opened.refresh()
    assert contents(opened) == {"a": [b"x"]}


def test_a_read_only_disk_can_be_asked_and_says_why_it_is_not_written(tmp_path: Path, disk: Path, source: Path) -> None:
    folder = disk / "ctx"
    put(Store.open(folder, spec()), "a", [b"x"])
    archive.export(folder, tmp_path / "a.herd")
    assert mount("-o", "remount,ro", disk)
    opened = Store.open(folder, spec())
    assert contents(opened) == {"a": [b"x"]}
    assert maintain.verify(folder).problems == []
    for write in (
        lambda: read_paths(opened, source, model=MadeModel()),
        lambda: maintain.compact(folder),
        lambda: Store.open(disk / "new", spec()),
        lambda: archive.export(folder, disk / "a.herd"),
        lambda: archive.import_(tmp_path / "a.herd", disk / "new"),
        lambda: archive.import_(tmp_path / "a.herd", disk / "more" / "new"),
    ):
        with pytest.raises(ContextError, match="Read-only file system"):
            write()
