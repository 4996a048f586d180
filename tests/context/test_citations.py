"""Citations name the lines that the attention went to."""

from pathlib import Path

import pytest
import torch

from herd.context.cache import ContextCache, ContextRow
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


def look(cache: ContextCache, rows: list[ContextRow], axes: list[int | None], tokens: int = 1, at: int = 0) -> None:
    """Each sequence's last token asks for the key along an axis; None: the sequence is padding."""
    q = torch.zeros(len(axes), tokens, 4, 8)
    positions = torch.full((len(axes), tokens), -1)
    for row, axis in enumerate(axes):
        if axis is not None:
            q[row, -1, :, axis] = 6.0
            positions[row] = cache.start_position + at + torch.arange(tokens)
    kv = torch.zeros(len(axes), tokens, 2, 8)
    cache.rows(rows).attend(GLOBAL_LAYER, q, kv, kv, positions)


def test_the_line_that_was_looked_at_is_cited(opened: Store) -> None:
    cache = ContextCache([opened], CONFIG)
    rows = [cache.open(4) for _ in range(2)]
    look(cache, rows, [2, 0], tokens=3)
    look(cache, rows, [2, None], at=3)
    (first,), (second,) = (cite(row, Bytes()) for row in rows)
    assert (first.source, first.lines) == ("s2", (11, 11)) and first.weight > 0.9
    assert (second.source, second.lines) == ("s0", (11, 11))
    assert cite(rows[0], Bytes()) == [first], "asking changes nothing"
    rows[0].close()
    assert cite(rows[0], Bytes()) == [first], "nor does an end"


def test_only_looks_from_the_end_of_the_prompt_on_count(opened: Store) -> None:
    """In whatever pieces the prompt came."""
    cache = ContextCache([opened], CONFIG)
    row = cache.open(6, prompt=5)
    look(cache, [row], [1], tokens=2)
    look(cache, [row], [1], tokens=2, at=2)
    assert row.mass == 0 and cite(row, Bytes()) == []
    look(cache, [row], [3], at=4)
    look(cache, [row], [3], at=5)
    (only,) = cite(row, Bytes())
    assert only.source == "s3" and row.mass > 1.5


def test_two_sources_are_cited_by_weight(opened: Store) -> None:
    cache = ContextCache([opened], CONFIG)
    row = cache.open(3)
    for at, axis in enumerate((1, 1, 3)):
        look(cache, [row], [axis], at=at)
    first, second = cite(row, Bytes())
    assert [first.source, second.source] == ["s1", "s3"]
    assert first.weight == pytest.approx(2 / 3, abs=0.01) and second.weight == pytest.approx(1 / 3, abs=0.01)


def test_a_header_stands_for_its_whole_chunk(opened: Store) -> None:
    cache = ContextCache([opened], CONFIG)
    row = cache.open(1)
    look(cache, [row], [4])
    (only,) = cite(row, Bytes())
    assert (only.source, only.lines) == ("s0", (10, 12))


def test_mass_of_tokens_chunks_and_context_agree(opened: Store) -> None:
    cache = ContextCache([opened], CONFIG)
    row = cache.open(2)
    look(cache, [row], [1], tokens=2)
    masses = row.chunk_mass(0.0)
    assert set(masses) == {(opened, chunk) for chunk in range(4)}
    assert sum(masses.values()) == pytest.approx(row.mass, rel=1e-3)
    assert row.mass <= 1.0


def test_an_empty_context_has_no_citations(tmp_path: Path) -> None:
    cache = ContextCache([Store.open(tmp_path / "ctx", spec())], CONFIG)
    assert cite(cache.open(1), Bytes()) == []
