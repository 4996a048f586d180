"""The keys and values of conversations, in files: a chat goes on after a restart where it was, bit for bit.

One file per chat, a row of records. Each holds what one more turn added: token ids, and keys and values of every layer;
of local layers those in the chunk of the token that comes next. A record is signed with a hash over itself, the record
before it and the model, so what is damaged, cut or another model's ends the row there, and the rest is computed again.
Where a chunk begins, the file is written anew, as one record without the keys and values that no layer sees any more.

Shape suffixes: G key/value heads, S tokens, d head_dim.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from herd.api import Model
from herd.model import KVCache, KVRow

LIMIT = 8 << 30  # bytes of all files; the conversations that went on longest ago are then given up
_MAGIC = b"HERDCV01"
_MAX_HEADER = 1 << 28  # bytes; ten million token ids take less
_SIGN_BYTES = 32


@dataclass(frozen=True)
class _Record:
    """ids: of tokens up to before position `stop`. data: place of the keys and values in the file; end: of it all."""

    ids: list[int]
    stop: int
    shapes: list[list[int]]
    data: int
    end: int
    sign: bytes


@dataclass(frozen=True)
class Turn:
    """What is to be written: all token ids, and keys and values of those from `first` on."""

    chat: str
    ids: list[int]
    first: int
    parts: list[Tensor]


class Conversations:
    """Of one model, in one folder. One thread at a time works on a chat."""

    def __init__(self, folder: Path, model: Model, limit: int = LIMIT) -> None:
        """limit: bytes that all files may take."""
        self._folder, self._limit, self._cfg = folder, limit, model.config
        self._dtype, self._packed = model.transformer.memory_dtype, model.transformer.packed is not None
        kind = f"{model.fingerprint} {self._dtype} {self._packed}"
        self._seed = hashlib.blake2b(kind.encode(), digest_size=_SIGN_BYTES).digest()
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("*.part"):
            left.unlink(missing_ok=True)

    # What a prompt goes on from

    def load(self, chat: str, prompt: Sequence[int], tokens: int) -> tuple[list[int], KVRow] | None:
        """What is kept of a prompt: memory for so many tokens, and those it holds with the one that comes next.

        None if nothing is. From the first record that is not sound on, the file is cut off.
        """
        row, ids, wanted = KVCache(self._cfg, self._dtype).open(tokens), list[int](), len(prompt) - 2
        with suppress(FileNotFoundError), self._file(chat).open("r+b") as file:
            sound = len(_MAGIC)
            for record, data in self._sound(file):
                sound = record.end
                if record.stop > tokens:
                    return self._cut(ids, row, prompt) if ids else None
                row.give(_tensors(data, record.shapes, self._dtype), record.stop, packed=self._packed)
                ids += record.ids
                if len(ids) >= wanted or ids != list(prompt[: len(ids)]):
                    return self._cut(ids, row, prompt)
            file.truncate(sound)
        return self._cut(ids, row, prompt)

    def fit(self, ids: Sequence[int], row: KVRow, prompt: Sequence[int], tokens: int) -> tuple[list[int], KVRow] | None:
        """The same of memory at hand, which remembers these ids; it may be another one, with more room."""
        if row.tokens < tokens:
            old, row = row, KVCache(self._cfg, self._dtype).open(tokens)
            row.give(old.take(0, len(ids)), len(ids), packed=self._packed)
        return self._cut(ids, row, prompt)

    def _cut(self, ids: Sequence[int], row: KVRow, prompt: Sequence[int]) -> tuple[list[int], KVRow] | None:
        """Of what a row remembers, as much as a prompt begins with and the row can go back to."""
        same = next(
            (n for n, (a, b) in enumerate(zip(ids, prompt, strict=False)) if a != b), min(len(ids), len(prompt))
        )
        keep, chunk = min(same, len(prompt) - 2), self._cfg.attention_chunk_size
        # Local layers hold nothing of earlier chunks, but need nothing where one begins.
        if chunk is not None and keep != len(ids) and keep // chunk != len(ids) // chunk:
            keep = keep // chunk * chunk
        if keep < 1:
            return None
        row.cut(keep)
        return list(prompt[: keep + 1]), row

    # What an answer leaves

    def take(self, chat: str, ids: Sequence[int], row: KVRow) -> Turn:
        """A copy of what a row remembers, these ids, and the chat's file does not hold. To be written by `write`."""
        stop, chunk = len(ids), self._cfg.attention_chunk_size
        kept = self._common(chat, ids)
        first = kept[-1].stop if kept else 0
        if chunk is not None and first // chunk != stop // chunk:
            first = 0
        return Turn(chat, list(ids), first, row.take(first, stop))

    def write(self, turn: Turn) -> None:
        """Put a turn behind the others of its chat, in place of what does not belong there. It is then on disk."""
        path, kept = self._file(turn.chat), self._common(turn.chat, turn.ids)
        before = [record for record in kept if record.stop <= turn.first]
        if turn.first and before and before[-1].stop == turn.first:
            with path.open("r+b") as file:
                file.truncate(before[-1].end)
                file.seek(before[-1].end)
                self._append(file, before[-1].sign, turn)
        elif not turn.first:
            partial = path.with_suffix(".part")
            with partial.open("wb") as file:
                file.write(_MAGIC)
                self._append(file, self._seed, turn)
            partial.replace(path)
        self._make_room(path)

    def forget(self, chat: str) -> None:
        """Delete what is kept of a chat."""
        self._file(chat).unlink(missing_ok=True)

    # Files

    def _file(self, chat: str) -> Path:
        assert chat.isalnum(), chat
        return self._folder / f"{chat}.kv"

    def _append(self, file: BinaryIO, before: bytes, turn: Turn) -> None:
        shapes = [list(part.shape) for part in turn.parts]
        header = json.dumps({"ids": turn.ids[turn.first :], "stop": len(turn.ids), "shapes": shapes}).encode()
        header += b" " * (-len(header) % 64)  # so that numbers are aligned
        sign = hashlib.blake2b(before, digest_size=_SIGN_BYTES)
        blobs = [part.contiguous().view(torch.uint8).numpy().tobytes() for part in turn.parts if part.numel()]
        for data in (len(header).to_bytes(8, "little"), header, *blobs):
            sign.update(data)
            file.write(data)
        file.write(sign.digest())
        file.flush()
        os.fsync(file.fileno())

    def _records(self, file: BinaryIO) -> Iterator[_Record]:
        """What the headers of a file say, as far as they make sense; whether it is true, `_sound` finds out."""
        size, at, stop = os.fstat(file.fileno()).st_size, len(_MAGIC), 0
        if file.read(at) != _MAGIC:
            return
        while at + 8 <= size:
            file.seek(at)
            length = int.from_bytes(file.read(8), "little")
            if length > min(_MAX_HEADER, size - at - 8) or (header := _header(file.read(length))) is None:
                return
            ids, after, shapes = header["ids"], header["stop"], header["shapes"]
            data = at + 8 + length
            end = data + sum(map(prod, shapes)) * self._dtype.itemsize + _SIGN_BYTES
            if after != stop + len(ids) or not self._fits(shapes, stop, after) or end > size:
                return
            file.seek(end - _SIGN_BYTES)
            yield _Record(ids, after, shapes, data, end, file.read(_SIGN_BYTES))
            at, stop = end, after

    def _fits(self, shapes: list[list[int]], first: int, stop: int) -> bool:
        """Whether shapes are those of keys and values of these tokens."""
        cfg, chunk = self._cfg, self._cfg.attention_chunk_size
        begins = [
            max(first, stop // chunk * chunk) if chunk is not None and cfg.is_local(layer) else first
            for layer in range(cfg.num_hidden_layers)
        ]
        return shapes == [[2, cfg.num_key_value_heads, stop - begin, cfg.head_dim] for begin in begins]

    def _sound(self, file: BinaryIO) -> Iterator[tuple[_Record, memoryview]]:
        """Records with their data, up to the first that is not as it was written, or by another model."""
        before, at = self._seed, len(_MAGIC)
        for record in self._records(file):
            data = bytearray(record.end - at)
            file.seek(at)
            file.readinto(data)  # type: ignore[attr-defined]
            body = memoryview(data)[:-_SIGN_BYTES]
            sign = hashlib.blake2b(before, digest_size=_SIGN_BYTES)
            sign.update(body)
            if sign.digest() != record.sign:
                return
            yield record, body[record.data - at :]
            before, at = record.sign, record.end

    def _common(self, chat: str, ids: Sequence[int]) -> list[_Record]:
        """The records of a chat that these ids begin with."""
        kept = list[_Record]()
        with suppress(FileNotFoundError), self._file(chat).open("rb") as file:
            for record in self._records(file):
                if record.ids != list(ids[record.stop - len(record.ids) : record.stop]):
                    break
                kept.append(record)
        return kept

    def _make_room(self, newest: Path) -> None:
        """Delete the files that were written longest ago where all are more than they may be."""
        sizes: dict[Path, tuple[float, int]] = {}
        for path in self._folder.glob("*.kv"):
            with suppress(FileNotFoundError):
                sizes[path] = (path.stat().st_mtime, path.stat().st_size)
        total = sum(size for _, size in sizes.values())
        for path in sorted(sizes, key=lambda path: sizes[path]):
            if total > self._limit and path != newest:
                path.unlink(missing_ok=True)
                total -= sizes[path][1]


def _header(data: bytes) -> dict[str, Any] | None:
    """A record's header; None if it is none."""
    try:
        header = json.loads(data)
        ids, stop, shapes = header["ids"], header["stop"], header["shapes"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    numbers = [stop, *ids, *(n for shape in shapes for n in shape)] if _lists(ids, shapes) else [None]
    return header if all(type(n) is int and n >= 0 for n in numbers) else None


def _lists(ids: Any, shapes: Any) -> bool:
    return isinstance(ids, list) and isinstance(shapes, list) and all(isinstance(shape, list) for shape in shapes)


def _tensors(data: memoryview, shapes: list[list[int]], dtype: torch.dtype) -> list[Tensor]:
    counts = [prod(shape) for shape in shapes]
    all_numbers = torch.frombuffer(data, dtype=dtype, count=sum(counts)) if sum(counts) else torch.empty(0, dtype=dtype)
    return [part.view(shape) for part, shape in zip(all_numbers.split(counts), shapes, strict=True)]
