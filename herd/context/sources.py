"""Paths → sources: which files there are, in a fixed order, and the text of each. Nothing is left out silently.

Folders are walked in the order of their names; `.gitignore` is honoured as git does; symbolic links inside a folder are
not followed. Everything that is not read is returned as Skipped with its reason.
"""

import os
import stat as mode
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from herd.context.ignore import Ignore
from herd.context.limits import MAX_BYTES
from herd.context.text import NotText, is_binary, to_text
from herd.errors import SourceError

STDIN = b"-"
_HEAD_BYTES = 64 << 10
# A file whose times are this close to the moment of reading may change again within the clock's grain and look the
# same (git calls this racily clean), so its stat is not remembered and the next read looks inside again.
_RACY_NS = 2_000_000_000
_CONTROL_FOLDERS = {b".git", b".hg", b".svn"}


@dataclass(frozen=True)
class Found:
    """A regular file. `root` is the path that was asked for; `size` in bytes."""

    path: bytes
    root: bytes
    size: int
    stat: str

    def name(self, parents: int = 1) -> str:
        """How the file is shown: its path from the `parents`-th folder above the path that was asked for."""
        if self.path == STDIN:
            return "stdin"
        base = self.root
        for _ in range(parents):
            base = os.path.dirname(base)
        return display(os.path.relpath(self.path, base))


@dataclass(frozen=True)
class Skipped:
    """Something that was not read, and why. `stat` is the state of the file for which that holds, "" if unknown."""

    path: bytes
    name: str
    reason: str
    stat: str = ""


@dataclass(frozen=True)
class Source:
    """The text of one file. `stat` is "" if it cannot prove that the file is unchanged."""

    path: bytes
    text: str
    stat: str


def display(path: bytes | str) -> str:
    """A path as one printable line: control characters and bytes that are no text are shown escaped."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def absolute(path: str | Path) -> bytes:
    """The path as the manifest knows it: absolute, links not resolved (the user named it so)."""
    return STDIN if os.fspath(path) == "-" else os.fsencode(os.path.abspath(path))


def find(paths: Iterable[str | Path]) -> list[Found | Skipped]:
    """All files under the given paths, each once. SourceError for a path that does not exist."""
    seen: dict[bytes, Found | Skipped] = {}
    for given in paths:
        root = absolute(given)
        if root == STDIN:
            seen[STDIN] = Found(STDIN, STDIN, 0, "")
            continue
        try:
            info = os.stat(root)
        except (OSError, ValueError) as error:
            raise SourceError(f"{display(os.fspath(given))}: {_reason(error)}; nothing was read") from error
        entries = _walk(root) if mode.S_ISDIR(info.st_mode) else [_entry(root, root, info)]
        for entry in entries:
            seen.setdefault(entry.path, entry)
    return list(seen.values())


def load(found: Found) -> Source | Skipped:
    """The text of a file that was found, or why it has none. Never raises for what the file is or does."""
    proof = ""
    try:
        data, proof = _stdin() if found.path == STDIN else _read_stable(found.path)
        return Source(found.path, to_text(data, os.fsdecode(found.path)), proof)
    except NotText as error:
        reason = str(error)
    except OSError as error:
        reason = _reason(error)
    return Skipped(found.path, found.name(), reason, proof)


def identity(info: os.stat_result) -> str:
    """What must be equal for a file to count as unchanged."""
    return f"{info.st_size}:{info.st_mtime_ns}:{info.st_ctime_ns}:{info.st_ino}:{info.st_dev}"


def _walk(root: bytes) -> Iterator[Found | Skipped]:
    """Entries below a folder. An explicit stack: folders can be nested deeper than Python recurses."""
    stack: list[tuple[bytes, Ignore]] = [(root, Ignore.above(root))]
    while stack:
        folder, ignore = stack.pop()
        try:
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            yield Skipped(folder, _name(folder, root), f"folder: {_reason(error)}")
            continue
        if folder != root and {b"manifest.sqlite", b"lock"} <= {entry.name for entry in entries}:
            yield Skipped(folder, _name(folder, root), "a context folder")
            continue
        ignore = ignore.enter(folder)
        folders = []
        for entry in entries:
            path = os.path.join(folder, entry.name)
            try:
                is_folder = entry.is_dir(follow_symlinks=False)
                if is_folder and entry.name in _CONTROL_FOLDERS:
                    continue
                if ignore.ignores(path, is_folder):
                    yield Skipped(path, _name(path, root), "ignored by .gitignore")
                elif is_folder:
                    folders.append((path, ignore))
                else:
                    yield _entry(path, root, entry.stat(follow_symlinks=False))
            except OSError as error:
                yield Skipped(path, _name(path, root), _reason(error))
        stack += reversed(folders)


def _entry(path: bytes, root: bytes, info: os.stat_result) -> Found | Skipped:
    kinds = {
        mode.S_IFLNK: "symbolic link; name its target to read it",
        mode.S_IFIFO: "named pipe",
        mode.S_IFSOCK: "socket",
        mode.S_IFCHR: "device",
        mode.S_IFBLK: "device",
    }
    kind = mode.S_IFMT(info.st_mode)
    if kind != mode.S_IFREG:
        return Skipped(path, _name(path, root), kinds.get(kind, "not a regular file"))
    if info.st_size > MAX_BYTES:
        reason = f"too large: {info.st_size:,} bytes, the limit is {MAX_BYTES:,}; split it"
        return Skipped(path, _name(path, root), reason)
    return Found(path, root, info.st_size, identity(info))


def _name(path: bytes, root: bytes) -> str:
    return Found(path, root, 0, "").name()


def _read_stable(path: bytes) -> tuple[bytes, str]:
    """All bytes of a file that did not change while they were read, and its identity ("" if it may still change)."""
    for _ in range(3):
        # Without O_NONBLOCK, a pipe that took the file's place would block for ever.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            started = time.time_ns()
            before = os.fstat(fd)
            if not mode.S_ISREG(before.st_mode):
                raise NotText("no longer a regular file")
            data = file.read(min(_HEAD_BYTES, MAX_BYTES + 1))
            # The rest of an obvious binary is not worth reading.
            data += b"" if is_binary(data) else file.read(MAX_BYTES + 1 - len(data))
            after = os.fstat(fd)
        if len(data) > MAX_BYTES:
            raise NotText(f"too large: more than {MAX_BYTES:,} bytes; split it")
        if identity(before) == identity(after) and (len(data) == after.st_size or is_binary(data)):
            racy = max(after.st_mtime_ns, after.st_ctime_ns) > started - _RACY_NS
            return data, "" if racy else identity(after)
    raise NotText("changed while it was read, three times")


def _stdin() -> tuple[bytes, str]:
    data = sys.stdin.buffer.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise NotText(f"too large: more than {MAX_BYTES:,} bytes; split it")
    return data, ""


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[0].lower() + error.strerror[1:]
    return str(error)
