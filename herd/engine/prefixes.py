"""What the model has seen, for sequences that begin the same: keys and values of each beginning, held once.

Beginnings are a tree. A block is the keys and values of some tokens behind those of the block before it, whole ones of
64 tokens, so that what many requests begin with stands there once, however they go on; a request that begins so gets a
copy. Global layers keep all of their tokens. Local layers need nothing of earlier chunks, so theirs are kept where
others may part from a sequence: in its first chunk, and in the one that it ends in.

Shape suffixes: L layers, G key/value heads, S tokens, d head_dim, N tokens of an image, D hidden.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from herd.config import TextConfig
from herd.model import KVRow

BLOCK = 64  # tokens; a chunk's end ends a block, too

Names = tuple[int, ...]
# Given layers, the first position and the one behind the last: keys and values [L, 2, G, S, d], or None.
Take = Callable[[Sequence[int], int, int], Tensor | None]


def named(ids: Sequence[int], images: Sequence[Tensor], patch: int | None) -> Names:
    """What tells the tokens of a prompt apart: their ids, and for patches (of this id) of images what the images show.

    images: features [N, D]. All tokens of an image together are named by a hash of it, each by 63 bits.
    """
    if not images:
        return tuple(ids)
    names, at = list(ids), [place for place, id in enumerate(ids) if id == patch]
    hashes = [bits for image in images for bits in _hashes(image)]
    for place, bits in zip(at, hashes, strict=False):  # the engine refuses what is not as many
        names[place] = -1 - (bits >> 1)
    return tuple(names)


def _hashes(image_ND: Tensor) -> Sequence[int]:
    data = image_ND.detach().cpu().contiguous().view(torch.uint8).numpy()
    return array("Q", hashlib.shake_256(data.tobytes()).digest(8 * len(image_ND)))


@dataclass(eq=False)
class Block:
    """Keys and values [L, 2, G, S, d] of the tokens from position `start` on, of global and of local layers.

    local_kv None: they were not kept. before None: of the empty beginning, or outside of a tree.
    """

    names: Names
    start: int
    global_kv: Tensor
    local_kv: Tensor | None
    before: "Block | None" = None
    after: "dict[Names, Block]" = field(default_factory=dict)

    @property
    def stop(self) -> int:
        """Position behind its last token."""
        return self.start + len(self.names)

    @property
    def nbytes(self) -> int:
        """Of its keys and values."""
        return self.global_kv.nbytes + (0 if self.local_kv is None else self.local_kv.nbytes)


class Prefixes:
    """The beginnings of one model. Those that were used longest ago are given up first, from their ends."""

    def __init__(self, cfg: TextConfig, dtype: torch.dtype, *, packed: bool) -> None:
        """packed: rows are memory of a packed model (`KVRow.packed`)."""
        self._packed, self._chunk = packed, cfg.attention_chunk_size
        self._local = [n for n in range(cfg.num_hidden_layers) if self._chunk is not None and cfg.is_local(n)]
        self._global = [n for n in range(cfg.num_hidden_layers) if n not in self._local]
        self._bytes = 2 * cfg.num_key_value_heads * cfg.head_dim * dtype.itemsize  # of a token in a layer
        self._roots: dict[str, Block] = {}  # by scope
        self._order: OrderedDict[Block, None] = OrderedDict()  # by use; a block stands before those that it follows
        self.layers = [len(self._global), len(self._local)]
        self.nbytes = 0

    def end(self, start: int) -> int:
        """Where a whole block ends that begins at a position."""
        ends = start // BLOCK * BLOCK + BLOCK
        return ends if self._chunk is None else min(ends, start // self._chunk * self._chunk + self._chunk)

    def begin(self, position: int) -> int:
        """From where on local layers look where this position comes next."""
        return position // self._chunk * self._chunk if self._chunk is not None and self._local else 0

    # What is gone on from

    def find(self, scope: str, names: Sequence[int]) -> tuple[list[Block], int]:
        """The blocks that these tokens begin with, and how many of the tokens they share."""
        block, found, at = self._roots.get(scope), list[Block](), 0
        while block is not None and at < len(names):
            wanted = tuple(names[at : self.end(at)])
            block = block.after.get(wanted) or max(
                block.after.values(), key=lambda its: common(its.names, wanted), default=None
            )
            same = 0 if block is None else common(block.names, wanted)
            if block is not None and same:
                found.append(block)
            at += same
            if same < self.end(at - same) - (at - same):
                break
        self._use(found)
        return found, at

    def blocks(self, scope: str, names: Sequence[int]) -> list[Block]:
        """Blocks of these tokens and no others, to be kept elsewhere."""
        found, same = self.find(scope, names)
        if found and found[-1].stop > same:
            last, tokens = found[-1], same - found[-1].start
            local_kv = None if last.local_kv is None else last.local_kv[..., :tokens, :]
            found[-1] = Block(last.names[:tokens], last.start, last.global_kv[..., :tokens, :], local_kv)
        return found

    def reach(self, blocks: Sequence[Block], stop: int) -> int:
        """How far blocks lead, at most to `stop`: in its chunk, they must have what local layers look at."""
        begin = self.begin(stop)
        return next((b.start for b in blocks if begin <= b.start < stop and b.local_kv is None), stop)

    def known(self, scope: str, names: Sequence[int]) -> int:
        """How many of these tokens need not be computed."""
        return self.reach(*self.find(scope, names))

    def fits(self, tokens: int, most: int | None) -> bool:
        """Whether so many bytes (None: any) hold what is kept of a sequence of so many tokens, all else given up."""
        held = tokens if self._chunk is None else min(tokens, 2 * self._chunk)
        return most is None or (len(self._global) * tokens + len(self._local) * held) * self._bytes <= most

    def fill(self, scope: str, names: Sequence[int], row: KVRow) -> int:
        """Copy into an empty row what is kept of these tokens: of how many. The last one is left to be computed."""
        blocks, same = self.find(scope, names)
        stop = self.reach(blocks, min(same, len(names) - 1))
        for block in blocks:
            tokens = min(stop - block.start, len(block.names))
            if tokens <= 0:
                break
            row.give(self._global, block.start, block.global_kv[..., :tokens, :], packed=self._packed)
            if block.start >= self.begin(stop) and block.local_kv is not None:
                row.give(self._local, block.start, block.local_kv[..., :tokens, :], packed=self._packed)
        if stop:
            row.go_on(stop)
        return stop

    # What is kept

    def keep(self, scope: str, names: Sequence[int], row: KVRow, most: int | None) -> None:
        """Keep a copy of what a row remembers, these tokens, as far as all takes at most so many bytes (None: any)."""
        self._put(scope, names, row.take, most)

    def add(self, scope: str, names: Sequence[int], blocks: Sequence[Block], most: int | None) -> None:
        """The same of blocks of these tokens that are not kept yet."""
        parts = {block.start: block for block in blocks}

        def take(layers: Sequence[int], first: int, stop: int) -> Tensor | None:
            block = parts.get(first)
            return None if block is None else block.global_kv if layers is self._global else block.local_kv

        self._put(scope, names, take, most)

    def shrink(self, most: int) -> bool:
        """Give up what was used longest ago until no more than so many bytes are left; False if that cannot be."""
        while self.nbytes > most >= 0:
            self._remove(next(iter(self._order)))
        return most >= 0

    def _put(self, scope: str, names: Sequence[int], take: Take, most: int | None) -> None:
        self.find(scope, names)  # so that others are given up first
        block: Block | None = self._roots.setdefault(scope, Block((), 0, torch.empty(0), None))
        path, at, held = list[Block](), 0, self.begin(len(names) - 1)
        while block is not None and at < len(names):
            wanted = tuple(names[at : self.end(at)])
            block = self._known(block, wanted) or self._new(block, wanted, at, take, most)
            if block is not None:
                path.append(block)
                if at >= held and block.local_kv is None and len(block.names) == len(wanted):
                    self._complete(block, take, most)
            at += len(wanted)
        self._use(path)
        self._thin(path)

    def _known(self, before: Block, names: Names) -> Block | None:
        """The block behind another one that holds these tokens."""
        its = before.after.get(names)
        return its or next((its for its in before.after.values() if its.names[: len(names)] == names), None)

    def _new(self, before: Block, names: Names, start: int, take: Take, most: int | None) -> Block | None:
        """Another block, without what local layers look at; in place of those with fewer of its tokens."""
        for other in [its for its in before.after.values() if names[: len(its.names)] == its.names]:
            self._remove(other)
        if not self._fits(self._global, len(names), before, most):
            return None
        kv = take(self._global, start, start + len(names))
        if kv is None:
            return None
        before.after[names] = block = Block(names, start, kv, None, before)
        self._order[block] = None
        self.nbytes += block.nbytes
        return block

    def _complete(self, block: Block, take: Take, most: int | None) -> None:
        if self._fits(self._local, len(block.names), block, most):
            block.local_kv = take(self._local, block.start, block.stop)
            self.nbytes += 0 if block.local_kv is None else block.local_kv.nbytes

    def _fits(self, layers: Sequence[int], tokens: int, last: Block, most: int | None) -> bool:
        """Whether there is room for tokens of some layers behind the last block, others being given up for it."""
        needed = len(layers) * tokens * self._bytes
        while most is not None and self.nbytes + needed > most:
            oldest = next(iter(self._order), last)
            if oldest is last or oldest.after:  # nothing is left but what the last one follows
                return False
            self._remove(oldest)
        return True

    def _thin(self, path: Sequence[Block]) -> None:
        """Drop what local layers looked at in chunks, other than the first, that a sequence has left behind, as far as
        no other one goes on from there."""
        if not path or self._chunk is None:
            return
        begin = self.begin(path[-1].start)
        for block in reversed(path[:-1]):
            if len(block.after) > 1 or block.start < self._chunk:
                break
            if block.start < begin and block.local_kv is not None:
                self.nbytes -= block.local_kv.nbytes
                block.local_kv = None

    def _use(self, path: Sequence[Block]) -> None:
        for block in reversed(path):
            self._order.move_to_end(block)

    def _remove(self, block: Block) -> None:
        assert block.before is not None and not block.after, "a block goes before those that it follows"
        del block.before.after[block.names], self._order[block]
        self.nbytes -= block.nbytes


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many items two sequences begin with both."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
