"""Files whose layout is known before their content: written piece by piece, and gone on with after a kill.

Finished pieces are noted in a journal once they are on the disk. A run that finds the journal of the same job cuts each
file off behind its last finished piece and goes on from there. What later pieces are made of, but no file holds, is put
aside on the disk, too.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, uint8

from herd.checkpoint.files import write_json
from herd.errors import CheckpointError
from herd.lock import hold

_JOURNAL, _LOCK, _RESULT = "journal.json", "lock", "result"
_SYNC_BYTES = 256 << 20  # of pieces, that may have to be made again

Progress = Callable[[int, int], None]  # bytes that are done, and of all


@dataclass(frozen=True)
class Piece:
    """Bytes of a file; `make` gives them in parts, `size` in all."""

    size: int
    make: Callable[[], Iterable[Tensor]]


@dataclass(frozen=True)
class Layout:
    """A file: its name, what it begins with, and its pieces in order."""

    name: str
    header: bytes
    pieces: Sequence[Piece]

    @property
    def size(self) -> int:
        return len(self.header) + sum(piece.size for piece in self.pieces)


class Job:
    """A folder in the making, beside its final place."""

    def __init__(self, folder: Path, description: Mapping[str, Any]) -> None:
        self._scratch = folder
        self.result = folder / _RESULT
        self._description, self._done = dict(description), dict[str, int]()
        journal = folder / _JOURNAL
        try:
            found = json.loads(journal.read_text("utf-8"))
            if found["job"] == self._description:
                self._done = {str(name): int(size) for name, size in found["done"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # no journal, or one of a torn disk
            pass
        if not self._done:
            shutil.rmtree(self.result, ignore_errors=True)
        self.result.mkdir(exist_ok=True)

    @property
    def begun(self) -> bool:
        """Whether there is anything to go on with."""
        return bool(self._done)

    def take_back(self, final: Path) -> None:
        """Have a file again that a killed run had moved to its final place, before another one could follow."""
        size, path = self._done.get(final.name), self.result / final.name
        if size and not path.exists() and final.is_file() and final.stat().st_size == size:
            final.replace(path)

    def write(self, layouts: Sequence[Layout], progress: Progress | None = None) -> None:
        """Write all files, from where an earlier run of the same job stopped."""
        for layout in layouts:
            path, size = self.result / layout.name, self._done.get(layout.name, 0)
            if size and (not path.is_file() or path.stat().st_size < size):
                self._done.clear()  # what was put aside may be of later pieces
        done, total = sum(self._done.get(layout.name, 0) for layout in layouts), sum(layout.size for layout in layouts)
        for layout in layouts:
            for size in self._write(layout):
                done += size
                if progress is not None:
                    progress(done, total)
        if progress is not None:
            progress(total, total)

    def put_aside(self, name: str, tensor: Tensor) -> None:
        """Keep a tensor, in place of the one of this name, until the job is done; a kill leaves the old or the new."""
        scratch = self._scratch / f"{name}.new"
        save_file({name: tensor.contiguous()}, scratch)
        with scratch.open("r+b") as file:
            os.fsync(file.fileno())
        scratch.replace(self._scratch / name)

    def aside(self, name: str) -> Tensor:
        """What was put aside. CheckpointError if it is gone."""
        try:
            return load_file(self._scratch / name)[name]
        except (OSError, SafetensorError, KeyError) as error:
            raise CheckpointError(
                f"{self._scratch} cannot be gone on with: {error}; remove it to begin anew"
            ) from error

    def _write(self, layout: Layout) -> Iterator[int]:
        """Write what is left of a file; gives the size of each piece when it is written."""
        path, at = self.result / layout.name, self._done.get(layout.name, 0)
        with path.open("r+b" if at else "wb") as file:
            file.truncate(at)
            file.seek(at)
            synced = at
            for end, parts in _ends(layout):
                if end <= at:
                    continue
                for part in parts():
                    file.write(part)
                assert file.tell() == end, f"{layout.name} is at {file.tell()}, planned {end}"
                if end - synced >= _SYNC_BYTES or end == layout.size:
                    file.flush()
                    os.fsync(file.fileno())
                    self._note(layout.name, end)
                    synced = end
                yield end - at
                at = end

    def _note(self, name: str, size: int) -> None:
        self._done[name] = size
        scratch = self._scratch / f"{_JOURNAL}.new"
        write_json(scratch, {"job": self._description, "done": self._done})
        scratch.replace(self._scratch / _JOURNAL)


def _ends(layout: Layout) -> Iterator[tuple[int, Callable[[], Iterable[Any]]]]:
    """Where each piece ends, and what gives its bytes; the header is the first."""
    end = len(layout.header)
    yield end, lambda: [layout.header]
    for piece in layout.pieces:
        end += piece.size
        yield end, lambda piece=piece: (as_bytes(part) for part in piece.make())  # type: ignore[misc]


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, which are not copied if it is contiguous."""
    return tensor.contiguous().view(-1).view(uint8).numpy().data


@contextmanager
def job(out: Path, description: Mapping[str, Any], files: Sequence[str] = ()) -> Iterator[Job]:
    """A job that makes `out`, which is there, whole, only if the block ends well; else what is done is kept.

    description: what determines every byte of the result; work that another job left is thrown away. files: of these
    names are made, beside each other, the last of them is `out`; none: `out` is a folder. CheckpointError if something
    of the name exists, or another process is making it.
    """
    out = out.absolute()
    finals = [out.parent / name for name in files] or [out]
    scratch = out.with_name(f".{out.name}.making")
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        with hold(scratch / _LOCK, partial(_making, out)):
            made = Job(scratch, description)
            try:
                for final in finals:
                    if files:
                        made.take_back(final)
                    if final.exists() and (files or not final.is_dir() or any(final.iterdir())):
                        raise CheckpointError(f"{final} exists already; remove it or choose another name")
                yield made
                for final in finals:
                    (made.result / final.name if files else made.result).replace(final)
                shutil.rmtree(scratch)
            finally:
                if not made.begun:
                    shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"cannot write {out}: {error}; repeat the command to go on") from error


def _making(out: Path, owner: str) -> CheckpointError:
    return CheckpointError(f"{out} is being made by process {owner}; wait for it to finish")
