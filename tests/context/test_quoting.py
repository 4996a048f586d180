"""The guide of an answer: what was looked at can be quoted, and nothing else is left to choose."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from herd.context.cache import ContextCache, ContextRow
from herd.context.quoting import Quoting
from herd.context.segment import pack
from herd.context.store import NewChunk, NewSource, Store, chunk_hash
from herd.prompt.quotes import Worth
from tests.context.tiny_context import CONFIG, Bytes, spec

GLOBAL_LAYER = 2
TEXTS = [b"# s0:1\nPORT = 80\n", b"# s1:1\nPORT = 9000\n", b"# s2:1\nTIME = 5\n"]
END = 0


class Pieces(Bytes):
    """One token per byte; 0 ends."""

    def __init__(self) -> None:
        self.eos_ids = [END]

    def raw(self, ids: Sequence[int]) -> bytes:
        return bytes(ids)

    def prefixes(self, data: bytes) -> list[int]:
        return [data[0]]


@pytest.fixture
def row(tmp_path: Path) -> tuple[ContextCache, ContextRow]:
    """Sources of one chunk each; the keys of chunk n point along axis n."""
    store = Store.open(tmp_path / "ctx", spec())
    with store.writer() as writer:
        batch = []
        for n, text in enumerate(TEXTS):
            k_TGd = torch.zeros(len(text), 2, 8)
            k_TGd[:, :, n] = 10.0
            batch.append((NewChunk(chunk_hash("tiny", list(text)), list(text), 1, 1), pack(k_TGd, k_TGd, store.spec)))
        writer.commit(batch, [NewSource(f"s{n}", None, "", [batch[n][0].hash]) for n in range(len(TEXTS))])
    store.refresh()
    cache = ContextCache([store], CONFIG)
    return cache, cache.open(64)


def look(cache: ContextCache, row: ContextRow, axis: int, at: int) -> None:
    q, kv = torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 2, 8)
    q[..., axis] = 6.0
    cache.rows([row]).attend(GLOBAL_LAYER, q, kv, kv, torch.tensor([[cache.start_position + at]]))


def say(guide: Quoting, row: ContextRow, likes: bytes, said: bytes = b"") -> bytes:
    """Go on with the likeliest token until the end, by a model that likes some bytes, in their order."""
    logits_V = torch.zeros(256)
    for rank, byte in enumerate(likes):
        logits_V[byte] = 9.0 - rank
    while True:
        guided_V = guide(list(said), logits_V, row)
        left = guided_V[guided_V > -math.inf]
        assert 0 < len(left) < 20, "some tokens are left, and few"
        choice = int(guided_V.argmax())
        if choice == END:
            return said
        said += bytes([choice])


def test_what_was_looked_at_is_quoted(row: tuple[ContextCache, ContextRow]) -> None:
    cache, its = row
    look(cache, its, 1, 0)
    assert say(Quoting("What is PORT?", Pieces()), its, b"P8") == b"PORT = 9000", "80 was not looked at"


def test_what_can_be_quoted_grows_with_the_looks(row: tuple[ContextCache, ContextRow]) -> None:
    cache, its = row
    look(cache, its, 1, 0)
    guide = Quoting("What is PORT?", Pieces())
    guide([], torch.zeros(256), its)
    look(cache, its, 0, 1)
    assert say(guide, its, b"8", b"PORT") == b"PORT = 80"


def test_absence_has_to_be_likelier_than_a_quote(row: tuple[ContextCache, ContextRow]) -> None:
    cache, its = row
    look(cache, its, 1, 0)
    slightly, clearly = torch.zeros(256), torch.zeros(256)
    slightly[ord("i")], clearly[ord("i")] = 3.0, 5.0
    guide = Quoting("What is PORT?", Pieces())
    assert int(guide(list(b"PORT "), slightly, its).argmax()) == ord("=")
    assert int(guide(list(b"PORT "), clearly, its).argmax()) == ord("i")


def test_what_is_not_there_is_said(row: tuple[ContextCache, ContextRow]) -> None:
    cache, its = row
    look(cache, its, 1, 0)
    assert say(Quoting("What is HOST?", Pieces()), its, b"") == b"HOST is not in the context."


def test_a_second_try_says_what_the_first_one_saw_too_late(row: tuple[ContextCache, ContextRow]) -> None:
    cache, its = row
    guide = Quoting("What is PORT?", Pieces())
    look(cache, its, 2, 0)
    said = say(guide, its, b"")
    assert said == b"PORT is not in the context." and guide.worth(said) < Worth.SURE and not guide.quotes(said)
    assert guide.again(b"", doubtful=False) is None, "nothing that answers was seen"
    look(cache, its, 1, 1)
    guide(list(said), torch.zeros(256), its)
    again = guide.again(b"PORT", doubtful=False)
    assert again is not None
    said = say(again, its, b"i", b"PORT")
    assert said == b"PORT = 9000" and again.worth(said) is Worth.SURE and again.quotes(said)
    assert guide.again(b"PORT is", doubtful=False) is None, "what begins so is no quote"


def test_a_second_try_names_no_ordinary_word(row: tuple[ContextCache, ContextRow]) -> None:
    cache, its = row
    look(cache, its, 2, 0)
    guide = Quoting("What is the size of PORT?", Pieces())
    said = say(guide, its, b"s")
    assert said == b"size is not in the context." and guide.again(b"", doubtful=False) is None
    again = guide.again(b"", doubtful=True)
    assert again is not None and say(again, its, b"s") == b"PORT is not in the context."
