"""A source as the model read it: its text stands in the context itself, whatever became of the file."""

import re
from typing import Protocol

from herd.context import manifest
from herd.context.store import Store, unpack_ids
from herd.errors import ContextError

_LINE_END = re.compile(r"\r\n|\n|\r")


class Decoder(Protocol):
    def decode(self, ids: list[int]) -> str: ...


def text(store: Store, name: str, tokenizer: Decoder) -> str:
    """All of a source. ContextError if there is no such source."""
    return _text(_chunks(store, name), tokenizer)


def lines(store: Store, name: str, first: int, stop: int, tokenizer: Decoder) -> tuple[list[str], int]:
    """Lines first..stop-1 of a source, counted from 1, as far as it has them, and the number of its last line.

    ContextError if there is no such source.
    """
    chunks = _chunks(store, name)
    near = [chunk for chunk in chunks if chunk.last_line >= first and chunk.first_line < stop]
    found = _LINE_END.split(_text(near, tokenizer))
    before = first - near[0].first_line if near else 0
    wanted = found[max(before, 0) : max(before, 0) + stop - first]
    last = chunks[-1].last_line
    return wanted[: last - first + 1], last


def _chunks(store: Store, name: str) -> list[manifest.ChunkRow]:
    with manifest.connect(store.folder) as db, manifest.snapshot(db):
        chunks = manifest.chunks_of(db, name)
    if not chunks:
        raise ContextError(f"{store.folder} has no source {name[:200]!r}; it may have been taken out")
    return chunks


def _text(chunks: list[manifest.ChunkRow], tokenizer: Decoder) -> str:
    """What chunks that follow each other hold, without their headers."""
    return "".join(tokenizer.decode(unpack_ids(chunk.ids, chunk.tokens)).partition("\n")[2] for chunk in chunks)
