"""Citations name the lines that the attention went to."""

from pathlib import Path

import pytest
import torch

from herd.context.cache import ContextCache
from herd.context.citations import cite
from herd.context.segment import pack
from herd.context.store import NewChunk, NewSource, Store, chunk_hash
from tests.context.tiny_context import CONFIG, Bytes, spec

GLOBAL_LAYER = 2
HEADER = b"# s:10\n"


@pytest.fixture(params=["int8", "int4"])
def opened(tmp_path: Path, request: pytest.FixtureRequest) -> Store:
    """Source n has one chunk of three lines, 10 to 12; the key of its second line's `=` points along axis n."""
    opened = Store.open(tmp_path / "ctx", spec(dtype=request.param))
    with opened.writer() as writer:
        batch, sources = [], []
        for n in range(4):
            ids = list(HEADER + b"a\nkey=%d\nzz\n" % n)
            k_TGd = torch.zeros(len(ids), 2, 8)
            k_TGd[ids.index(ord("=")), :, n] = 10.0
            k_TGd[2, :, 4 + n] = 10.0  # a token of the header
            batch.append((NewChunk(chunk_hash("tiny", ids), ids, 10, 12), pack(k_TGd, k_TGd, opened.spec)))
            sources.append(NewSource(f"s{n}", None, "", [batch[-1][0].hash]))
        writer.commit(batch, sources)
    opened.refresh()
    return opened


def look(cache: ContextCache, axes: list[int | None], tokens: int = 1) -> None:
    """Each sequence's last token asks for the key along an axis; None: the sequence is padding."""
    q = torch.zeros(len(axes), tokens, 4, 8)
    positions = torch.full((len(axes), tokens), -1)
    for row, axis in enumerate(axes):
        if axis is not None:
            q[row, -1, :, axis] = 6.0
            positions[row] = cache.start_position + torch.arange(tokens)
    kv = torch.zeros(len(axes), tokens, 2, 8)
    cache.attend(GLOBAL_LAYER, q, kv, kv, positions)


def test_the_line_that_was_looked_at_is_cited(opened: Store) -> None:
    cache = ContextCache([opened], CONFIG, 2)
    look(cache, [2, 0], tokens=3)
    look(cache, [2, None])
    (first,), (second,) = cite(cache, 0, Bytes()), cite(cache, 1, Bytes())
    assert (first.source, first.lines) == ("s2", (11, 11)) and first.weight > 0.9
    assert (second.source, second.lines) == ("s0", (11, 11))
    assert cite(cache, 0, Bytes()) == [first], "asking changes nothing"


def test_two_sources_are_cited_by_weight(opened: Store) -> None:
    cache = ContextCache([opened], CONFIG, 1)
    for axis in (1, 1, 3):
        look(cache, [axis])
    first, second = cite(cache, 0, Bytes())
    assert [first.source, second.source] == ["s1", "s3"]
    assert first.weight == pytest.approx(2 / 3, abs=0.01) and second.weight == pytest.approx(1 / 3, abs=0.01)


def test_a_header_stands_for_its_whole_chunk(opened: Store) -> None:
    cache = ContextCache([opened], CONFIG, 1)
    look(cache, [4])
    (only,) = cite(cache, 0, Bytes())
    assert (only.source, only.lines) == ("s0", (10, 12))


def test_mass_of_tokens_chunks_and_context_agree(opened: Store) -> None:
    cache = ContextCache([opened], CONFIG, 1)
    look(cache, [1], tokens=2)
    masses = cache.chunk_mass(0, 0.0)
    assert set(masses) == {(opened, chunk) for chunk in range(4)}
    assert sum(masses.values()) == pytest.approx(float(cache.mass_B[0]), rel=1e-3)
    assert float(cache.mass_B[0]) <= 1.0


def test_an_empty_context_has_no_citations(tmp_path: Path) -> None:
    cache = ContextCache([Store.open(tmp_path / "ctx", spec())], CONFIG, 1)
    assert cite(cache, 0, Bytes()) == []
