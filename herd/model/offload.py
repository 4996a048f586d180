"""Experts of a packed model that are read from its files as tokens want them, for models bigger than memory.

Which experts a layer needs is known only when its router has spoken. Those that are not in memory are then read by
threads, past the page cache, while the others compute. What the next layer may need, by its router's look at the states
as they are now, is read whenever nothing else is. What was used longest ago makes room.

Shape suffixes: N tokens, D hidden, E experts.
"""

import io
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from herd.errors import CheckpointError
from herd.kernels import native
from herd.kernels.layers import PAGE, Layer, Mlp, MlpForm

Key = tuple[int, int]  # layer, expert
READERS = 2
PIECE = 1 << 20  # bytes that are read at a time; after so many, a guess gives way to what is wanted
_LOOKS = 32  # tokens that guesses are made from


class Place(NamedTuple):
    """Where an expert stands: in which of the files, and from which byte on."""

    file: int
    offset: int


class Counts(NamedTuple):
    """Experts that layers wanted; of these, those that were in memory and those that had been guessed, at least a part
    of which was; and bytes that were read."""

    wanted: int = 0
    there: int = 0
    guessed: int = 0
    read: int = 0


class ExpertCache:
    """See `herd.kernels.layers.Source`. Its threads end with it."""

    def __init__(
        self, files: Sequence[Path], places: Mapping[Key, Place], form: MlpForm, layers: Sequence[Layer], slots: int
    ) -> None:
        """form: of every expert. slots: how many there may be in memory. CheckpointError if a file cannot be read."""
        assert slots > 0
        # A layer's norm scales each state, which leaves the order of the router's logits as it is.
        routers = {at: x.router_ED * x.mlp_norm_D for at, x in enumerate(layers) if x.router_ED is not None}
        self._routers, self._top_k = routers, [layer.top_k for layer in layers]
        self._next = dict(zip(list(routers), list(routers)[1:], strict=False))
        self._shelf = shelf = _Shelf([_File(path) for path in files], places, form, min(slots, len(places)))
        for i in range(READERS):
            threading.Thread(target=shelf.serve, name=f"experts {i}", daemon=True).start()
        weakref.finalize(self, shelf.stop)

    @property
    def counts(self) -> Counts:
        """Since it was made."""
        return self._shelf.counts

    def load(self, layer: int, wanted: Sequence[int], x_ND: Tensor) -> Generator[Mapping[int, Mlp], None, None]:
        """See `Source`. CheckpointError if a file ended early or changed."""
        shelf, left = self._shelf, set(wanted)
        try:
            shelf.want([(layer, e) for e in wanted])
            found = shelf.take(wait=False)
            shelf.guess(self._guess(layer, x_ND))
            while True:
                yield {e: mlp for (_, e), mlp in found.items()}
                left -= {e for _, e in found}
                if not left:
                    return
                found = shelf.take(wait=True)
        finally:
            shelf.want([])

    def _guess(self, layer: int, x_ND: Tensor) -> list[Key]:
        """What the next layer with experts may want, most tokens first."""
        after = self._next.get(layer)
        if after is None:
            return []
        logits_NE = x_ND[:: -(-len(x_ND) // _LOOKS)] @ self._routers[after].T
        experts, counts = logits_NE.topk(self._top_k[after]).indices.unique(return_counts=True)
        return [(after, e) for e in experts[counts.argsort(descending=True)].tolist()]


class _Slot:
    """Room for one expert. key: whose it is. given: bytes that readers took on or have read, in `flying` pieces now.
    guessed: nothing has wanted it yet."""

    def __init__(self, at: Tensor, form: MlpForm) -> None:
        self.mlp, self.bytes = form.placed(at), at.numpy().data
        self.key: Key | None = None
        self.given = self.flying = 0
        self.guessed = False
        self.error: Exception | None = None

    @property
    def complete(self) -> bool:
        return self.given == len(self.bytes) and not self.flying and self.error is None


class _Shelf:
    """The slots, and what is to be read into them: shared by the readers and the thread that computes.

    What is wanted or in use is never given up, and neither is what is being read. A slot that was wanted no more before
    it was complete is read on when it is wanted again.
    """

    def __init__(self, files: "Sequence[_File]", places: Mapping[Key, Place], form: MlpForm, slots: int) -> None:
        self._files, self._places = files, places
        room = native.room(slots * form.nbytes + PAGE)
        room = room[-room.data_ptr() % PAGE :][: slots * form.nbytes]
        self._free = [_Slot(part, form) for part in room.split(form.nbytes)]
        self._slots: OrderedDict[Key, _Slot] = OrderedDict()  # what was used longest ago first
        self._wanted: list[Key] = []
        self._in_use: set[Key] = set()
        self._readers, self._stopped = READERS, False
        lock = threading.RLock()  # the end of another model may interrupt a thread that has it
        self._work, self._landed = threading.Condition(lock), threading.Condition(lock)
        self.counts = Counts()

    def want(self, keys: Sequence[Key]) -> None:
        """These, which are of one layer, are wanted from now on; nothing is in use."""
        with self._work:
            there = [self._slots[key] for key in keys if key in self._slots]
            guessed = sum(slot.guessed for slot in there)
            hits = sum(slot.complete and not slot.guessed for slot in there)
            wanted, hit, right, read = self.counts
            self.counts = Counts(wanted + len(keys), hit + hits, right + guessed, read)
            self._wanted, self._in_use = list(keys), set()
            if keys:
                self._judge_guesses()
                self._place_wanted()

    def take(self, *, wait: bool) -> dict[Key, Mlp]:
        """Of those that are wanted what is there, with `wait` at least one. It is in use until the next call."""
        with self._landed:
            self._in_use = set()
            while True:
                self._place_wanted()
                there = {key: self._slots[key] for key in self._wanted if key in self._slots}
                for key, slot in there.items():
                    if slot.error is not None:
                        self._give_up(key)
                        raise slot.error
                found = {key: slot.mlp for key, slot in there.items() if slot.complete}
                if found or not wait:
                    break
                self._landed.wait()
            self._in_use = set(found)
            self._wanted = [key for key in self._wanted if key not in found]
            return found

    def guess(self, keys: Sequence[Key]) -> None:
        """Read these when nothing else is to be read, as far as there is room."""
        with self._work:
            for key in keys:
                if key not in self._slots and (slot := self._place(key)) is not None:
                    slot.guessed = True
            self._work.notify_all()

    def _place_wanted(self) -> None:
        for key in self._wanted:
            slot = self._slots.get(key) or self._place(key)
            if slot is None:
                break
            slot.guessed = False
            self._slots.move_to_end(key)
        self._work.notify_all()

    def _judge_guesses(self) -> None:
        """Right ones are wanted now. Wrong ones make room first, at once if they are not complete."""
        for key in [key for key, slot in self._slots.items() if slot.guessed and key not in self._wanted]:
            if self._slots[key].complete:
                self._slots[key].guessed = False
                self._slots.move_to_end(key, last=False)
            else:
                self._give_up(key)

    def _place(self, key: Key) -> _Slot | None:
        """A slot for it, if there is room."""
        if not self._free:
            busy = self._in_use.union(self._wanted)
            old = (old for old, slot in self._slots.items() if old not in busy and not slot.flying)
            if (oldest := next(old, None)) is None:
                return None
            self._give_up(oldest)
        slot = self._free.pop()
        slot.key, slot.given, slot.guessed, slot.error = key, 0, False, None
        self._slots[key] = slot
        return slot

    def _give_up(self, key: Key) -> None:
        slot = self._slots.pop(key)
        slot.key = None
        if not slot.flying:
            self._free.append(slot)

    def stop(self) -> None:
        """Let the readers end."""
        with self._work:
            self._stopped = True
            self._work.notify_all()

    def serve(self) -> None:
        """Read what is to be read, until the end: what a reader does."""
        with self._work:
            while not self._stopped:
                slot = self._next()
                if slot is None or slot.key is None:
                    self._work.wait()
                    continue
                place, start = self._places[slot.key], slot.given
                slot.given, slot.flying = min(start + PIECE, len(slot.bytes)), slot.flying + 1
                self._read(slot, place, start, slot.given)
            self._readers -= 1
            if not self._readers:
                for file in self._files:
                    file.close()

    def _next(self) -> _Slot | None:
        """A slot that has something to read: wanted, or else guessed."""
        wanted = (self._slots[key] for key in self._wanted if key in self._slots)
        guessed = (slot for slot in self._slots.values() if slot.guessed)
        return next((s for some in (wanted, guessed) for s in some if s.given < len(s.bytes)), None)

    def _read(self, slot: _Slot, place: Place, start: int, end: int) -> None:
        """One piece. The lock, which is held, is free meanwhile."""
        error: Exception | None = None
        self._work.release()
        try:
            self._files[place.file].read(slot.bytes[start:end], place.offset + start)
        except (OSError, CheckpointError) as failed:
            error = failed
        finally:
            self._work.acquire()
        slot.flying -= 1
        self.counts = self.counts._replace(read=self.counts.read + end - start)
        if slot.key is None and not slot.flying:
            self._free.append(slot)
        elif error is not None:
            slot.error, slot.given = error, len(slot.bytes)
        if not slot.flying:
            self._landed.notify_all()


class _File:
    """A file that is read past the page cache, which would hold a second copy of what it holds for others."""

    def __init__(self, path: Path) -> None:
        self._path, self._direct = path, hasattr(os, "O_DIRECT")
        try:
            self._file = self._open(os.O_DIRECT if self._direct else 0)
        except OSError:  # not every file system can
            self._direct = False
            self._file = self._open(0)
        self._state = self._seen()

    def _open(self, flags: int) -> io.FileIO:
        try:
            return io.FileIO(self._path, opener=lambda path, mode: os.open(path, mode | flags))
        except OSError as error:
            if flags:
                raise
            raise CheckpointError(f"cannot read {self._path}: {error}") from error

    def _seen(self) -> tuple[int, int]:
        stat = os.fstat(self._file.fileno())
        return stat.st_size, stat.st_mtime_ns

    def read(self, into: memoryview, offset: int) -> None:
        """Fill memory from a byte on. CheckpointError if the file is not what it was, or cannot be read."""
        done = 0
        try:
            while done < len(into):
                count = os.preadv(self._file.fileno(), [into[done:]], offset + done)
                if not count:
                    break
                done += count
        except OSError as error:
            raise CheckpointError(f"cannot read {self._path}: {error}") from error
        if done < len(into) or self._seen() != self._state:
            raise CheckpointError(f"{self._path} was changed while the model was in use; load it again")
        if not self._direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), offset, len(into), os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        self._file.close()
