"""Which files are found, what is skipped and why: nothing crashes, nothing is left out silently."""

import os
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

from herd.context import sources
from herd.context.sources import Found, Skipped, Source, display, find, load
from herd.errors import SourceError


def names(entries: list[Found | Skipped]) -> list[str]:
    return [e.name() for e in entries if isinstance(e, Found)]


def reasons(entries: list[Found | Skipped]) -> dict[str, str]:
    return {e.name: e.reason for e in entries if isinstance(e, Skipped)}


def text_of(path: Path) -> str:
    (found,) = find([path])
    loaded = load(found)
    assert isinstance(loaded, Source), loaded
    return loaded.text


def test_a_folder_is_walked_in_the_order_of_names_and_named_from_its_parent(tmp_path: Path) -> None:
    for name in ("b/z.py", "b/a.py", "a.txt", "c.txt"):
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x\n")
    assert names(find([tmp_path / "root"])) == ["root/a.txt", "root/c.txt", "root/b/a.py", "root/b/z.py"]
    assert names(find([tmp_path / "root" / "a.txt"])) == ["a.txt"]
    assert len(find([tmp_path / "root", tmp_path / "root" / "a.txt"])) == 4, "each file once"


def test_a_path_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such file"):
        find([tmp_path / "nothing"])


def test_gitignore_is_honoured_as_git_does(tmp_path: Path) -> None:
    (tmp_path / ".git" / "info").mkdir(parents=True)
    (tmp_path / ".git" / "info" / "exclude").write_text("secret.txt\n")
    (tmp_path / ".gitignore").write_text("*.log\n/build/\n!keep.log\n# comment\ntrail\\ \n")
    files = ["a.log", "keep.log", "build/x.py", "src/build/x.py", "src/a.py", "src/deep/b.tmp", "src/deep/c.tmp",
             "secret.txt", "trail "]  # fmt: skip
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x\n")
    (tmp_path / "src" / ".gitignore").write_text("*.tmp\n")
    (tmp_path / "src" / "deep" / ".gitignore").write_text("!c.tmp\n")
    root = tmp_path.name
    found = find([tmp_path])
    kept = {name.removeprefix(f"{root}/") for name in names(found)}
    assert kept == {"keep.log", "src/build/x.py", "src/a.py", "src/deep/c.tmp",
                    ".gitignore", "src/.gitignore", "src/deep/.gitignore"}  # fmt: skip
    assert set(reasons(found)) == {f"{root}/{n}" for n in ("a.log", "build", "src/deep/b.tmp", "secret.txt", "trail ")}
    # The rules of the work tree reach into a folder inside of it.
    assert set(reasons(find([tmp_path / "src"]))) == {"src/deep/b.tmp"}


def test_git_agrees_on_what_is_ignored(tmp_path: Path) -> None:
    patterns = "*.o\n!important.o\n/top\nsub/*.c\n**/gen/\n*.[ch]pp\nfoo/**/bar\n"
    files = ["a.o", "important.o", "top", "x/top", "sub/a.c", "x/sub/a.c", "x/gen/f", "gen/f", "a.cpp", "a.hpp",
             "foo/a/b/bar", "foo/bar", "bar", "gen.txt"]  # fmt: skip
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / ".gitignore").write_text(patterns)
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    listed = subprocess.run(
        ["git", "ls-files", "--others", "--exclude-standard"], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert {n.removeprefix(f"{tmp_path.name}/") for n in names(find([tmp_path]))} == set(listed)


def test_what_is_no_regular_file_is_skipped_with_its_kind(tmp_path: Path) -> None:
    root = tmp_path / "r"
    root.mkdir()
    os.mkfifo(root / "pipe")
    (root / "loop").symlink_to(root)
    (root / "dangling").symlink_to("nowhere")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(root / "sock"))
        assert reasons(find([root])) == {
            "r/pipe": "named pipe",
            "r/sock": "socket",
            "r/loop": "symbolic link; name its target to read it",
            "r/dangling": "symbolic link; name its target to read it",
        }
    assert reasons(find(["/dev/null"])) == {"null": "device"}
    (root / "itself").symlink_to("itself")
    assert reasons(find([root]))["r/itself"] == "symbolic link; name its target to read it"
    with pytest.raises(SourceError, match="too many levels of symbolic links"):
        find([root / "itself"])


def test_a_link_that_the_user_named_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.txt").write_text("x\n")
    (tmp_path / "link").symlink_to("real")
    assert names(find([tmp_path / "link"])) == ["link/a.txt"]


def test_unreadable_files_and_folders_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "locked").mkdir()
    (tmp_path / "file").write_text("x")
    (found,) = find([tmp_path / "file"])

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(sources.os, "open", refuse)
    assert load(found) == Skipped(found.path, "file", "permission denied")
    scandir = os.scandir
    monkeypatch.setattr(sources.os, "scandir", lambda p: refuse() if p.endswith(b"locked") else scandir(p))
    assert reasons(find([tmp_path])) == {f"{tmp_path.name}/locked": "folder: permission denied"}


def test_too_large_files_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_BYTES", 100)
    (tmp_path / "big.txt").write_text("x" * 101)
    assert reasons(find([tmp_path / "big.txt"])) == {"big.txt": "too large: 101 bytes, the limit is 100; split it"}
    (tmp_path / "grows.txt").write_text("x")
    (found,) = find([tmp_path / "grows.txt"])
    (tmp_path / "grows.txt").write_text("x" * 200)
    assert isinstance(load(found), Skipped)


def test_a_file_that_vanishes_or_becomes_a_pipe_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x")
    (found,) = find([path])
    path.unlink()
    assert load(found) == Skipped(found.path, "a.txt", "no such file or directory")
    os.mkfifo(path)
    assert load(found) == Skipped(found.path, "a.txt", "no longer a regular file")


def test_a_file_that_keeps_changing_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text("x" * 1_000_000)
    (found,) = find([path])
    stop = threading.Event()

    def overwrite() -> None:
        with path.open("r+") as file:
            while not stop.is_set():
                file.seek(0)
                file.write("y" * 4096)
                file.flush()

    thread = threading.Thread(target=overwrite)
    thread.start()
    try:
        time.sleep(0.05)
        seen = [load(found) for _ in range(5)]
    finally:
        stop.set()
        thread.join()
    for loaded in seen:
        if isinstance(loaded, Skipped):
            assert loaded.reason == "changed while it was read, three times"
        else:
            assert set(loaded.text) <= {"x", "y"}
            assert loaded.stat == "", "it was just written, so its stat proves nothing"
    assert isinstance(load(found), Source)


@pytest.mark.parametrize("times", [1, 99])
def test_a_file_that_grows_while_it_is_read_is_read_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    path = tmp_path / "log.txt"
    path.write_text("line\n")
    (found,) = find([path])
    is_binary, grown = sources.is_binary, 0

    def grow(data: bytes) -> bool:
        nonlocal grown
        if grown < times:
            grown += 1
            with path.open("a") as file:
                file.write("line\n")
        return is_binary(data)

    monkeypatch.setattr(sources, "is_binary", grow)
    loaded = load(found)
    if times == 1:
        assert isinstance(loaded, Source) and loaded.text == "line\n" * 2
    else:
        assert loaded == Skipped(found.path, "log.txt", "changed while it was read, three times")


def test_times_in_the_future_prove_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that was set back lets a file change and keep its time."""
    path = tmp_path / "a.txt"
    path.write_text("x")
    os.utime(path, (4e9, 4e9))
    (found,) = find([path])
    assert isinstance(loaded := load(found), Source) and loaded.stat == ""
    os.utime(path, (1e9, 1e9))
    back = time.time_ns() - 86_400_000_000_000
    monkeypatch.setattr(sources, "time", type("Time", (), {"time_ns": staticmethod(lambda: back)}))
    assert isinstance(loaded := load(*find([path])), Source) and loaded.stat == "", "its ctime is a day ahead"


def test_a_stat_is_only_remembered_when_it_can_prove_something(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x")
    (found,) = find([path])
    fresh = load(found)
    assert isinstance(fresh, Source) and fresh.stat == "", "written within the clock's grain"
    now = time.time_ns()
    old = type("Time", (), {"time_ns": staticmethod(lambda: now + 10_000_000_000)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "time", old)
        later = load(found)
    assert isinstance(later, Source) and later.stat == found.stat != ""


def test_odd_names_are_shown_on_one_line(tmp_path: Path) -> None:
    root = os.fsencode(tmp_path / "r")
    os.mkdir(root)
    for name in (b"new\nline", b"esc\x1b[31m", b"\xff\xfe", "größe".encode(), b"a" * 255, b" ", b"-", b"$(x)"):
        with open(os.path.join(root, name), "w") as file:
            file.write("x")
    shown = names(find([tmp_path / "r"]))
    assert len(set(shown)) == 8 and all(name.isprintable() for name in shown)
    assert "r/new\\nline" in shown and "r/\\xff\\xfe" in shown and "r/größe" in shown
    assert display(b"\x1b]0;title\x07") == "\\x1b]0;title\\x07"


def test_very_deep_folders_do_not_exhaust_the_stack(tmp_path: Path) -> None:
    here, depth = os.getcwd(), 1100
    try:
        os.chdir(tmp_path)
        for _ in range(depth):
            os.mkdir("d")
            os.chdir("d")
        Path("f.txt").write_text("x")
    finally:
        os.chdir(here)
    entries = find([tmp_path])
    assert names(entries)[0].endswith("d/f.txt")
    subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)


def test_a_context_inside_the_folder_is_not_read(tmp_path: Path) -> None:
    inner = tmp_path / "ctx"
    inner.mkdir()
    (inner / "manifest.sqlite").write_text("")
    (inner / "lock").write_text("")
    assert reasons(find([tmp_path])) == {f"{tmp_path.name}/ctx": "a context folder"}


def test_of_a_binary_only_the_head_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.bin").write_bytes(b"\0" * 200_000)
    read = []
    monkeypatch.setattr(sources, "to_text", lambda data, name: read.append(len(data)) or "")
    load(*find([tmp_path / "a.bin"]))
    assert read == [64 << 10]
