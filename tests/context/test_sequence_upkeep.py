"""A sequence that is killed, damaged, packed or merged: nothing is lost, and nothing wrong is believed."""

import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from herd.context import archive, maintain, manifest, read, sources
from herd.context.forward import ReadingCache
from herd.context.segment import INDEPENDENT
from herd.context.store import Store
from herd.errors import ContextError
from tests.context.test_archive import rewrite
from tests.context.test_crash import flipped_copies, kill_at, lines_of
from tests.context.tiny_context import MadeSequence, put, read_paths, several, spec
from tests.context.tiny_sequence import late_first, read_rows, state, write

pytestmark = pytest.mark.usefixtures("old_files")


@pytest.mark.parametrize("edited", [False, True], ids=["from nothing", "after an edit"])
def test_kill_9_at_20_moments_of_a_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edited: bool) -> None:
    """Each read goes on where the one before was killed, and the last ends where a read in peace does."""
    monkeypatch.setattr(read, "SEGMENT_TOKENS", 100)
    # Files count as just written: every read looks into them, and is long enough to kill.
    monkeypatch.setattr(sources, "_RACY_NS", 10**18)
    source = tmp_path / "src"
    source.mkdir()
    for name in "abcdef":
        write(source / name, name, 4)
    peace, ctx = tmp_path / "peace", tmp_path / "ctx"

    def work(folder: Path) -> None:
        read_paths(Store.open(folder, several()), source, model=MadeSequence())

    for place in (peace, ctx):
        Store.open(place, several())
        if edited:
            work(place)
    before = state(ctx)
    if edited:
        write(source / "b", "B", 5)
        (source / "d").unlink()
        write(source / "g", "g", 4)
    total = lines_of(lambda: work(peace))
    after = state(peace)
    # A read that goes on is shorter than one from the start.
    rng, kept, killed = random.Random(0), set[bytes](), 0
    for _ in range(20):
        killed += kill_at(rng.randrange(1, total // 2), lambda: work(ctx)) == -signal.SIGKILL
        now = state(ctx)
        if edited and now != before:
            assert len({name for name, *_ in now}) >= 5 and now == after[: len(now)], "the old part came at once"
        elif not edited:
            assert now == after[: len(now)]
        with manifest.connect(ctx) as db:
            known = set(manifest.known_hashes(db))
        assert kept <= known, "what was committed stays"
        kept = known
    assert killed > 10
    work(ctx)
    assert state(ctx) == after


def damage(opened: Store, place: int) -> None:
    """Flip a bit of the K/V of a chunk of the sequence."""
    with manifest.connect(opened.folder) as db:
        chunk = manifest.chunk(db, manifest.source_chunks(db)[place][1])
        path = opened.folder / manifest.segment(db, chunk.segment).file
    data = bytearray(path.read_bytes())
    data[128 + chunk.start * 8] ^= 1  # the first key, of 8 bytes per token
    path.write_bytes(data)


@pytest.mark.parametrize("segment_tokens", [60, 1 << 16])
def test_what_came_after_damage_is_dropped_with_it(
    letters: Path, in_sequence: Store, tmp_path: Path, segment_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "SEGMENT_TOKENS", segment_tokens)
    read_rows(in_sequence, letters)
    before = state(in_sequence.folder)
    damage(in_sequence, 4)
    assert len(maintain.verify(in_sequence.folder).problems) == 1
    done = maintain.compact(in_sequence.folder)
    assert done.damaged_sources == ["src/b", "src/c", "src/d"] and done.dropped_chunks == 8
    assert state(in_sequence.folder) == before[:3]
    assert [(name, "damaged" in reason) for name, reason in Store.open(in_sequence.folder).skipped] == [
        (name, True) for name in done.damaged_sources
    ]
    assert "was read after one" in Store.open(in_sequence.folder).skipped[1][1]
    assert read_rows(in_sequence, letters) == 8
    assert state(in_sequence.folder) == before and in_sequence.skipped == []


def test_nothing_is_read_after_damage(letters: Path, in_sequence: Store) -> None:
    """It would be read from the damage, and look sound."""
    read_rows(in_sequence, letters)
    damage(in_sequence, 4)
    write(letters / "e", "e")
    with pytest.raises(ContextError, match=r"its checksum does not match; run `herd context compact"):
        read_rows(in_sequence, letters)
    in_sequence.refresh()
    assert len(in_sequence.chunks) == 12
    maintain.compact(in_sequence.folder)
    assert read_rows(in_sequence, letters) == 11 and len(state(in_sequence.folder)) == 15


def test_a_segment_cut_under_a_read_is_an_error(letters: Path, in_sequence: Store) -> None:
    read_rows(in_sequence, letters)
    (path,) = in_sequence.folder.glob("*.kv")
    write(letters / "e", "e")

    class Cutting(MadeSequence):
        def read(self, ids_BT: torch.Tensor, first: int, cache: ReadingCache) -> tuple[torch.Tensor, torch.Tensor]:
            path.write_bytes(path.read_bytes()[:-1])
            return super().read(ids_BT, first, cache)

    with pytest.raises(ContextError, match="bytes instead of"):
        read_paths(in_sequence, letters, model=Cutting())


def test_a_sequence_goes_on_after_it_is_narrowed(letters: Path, in_sequence: Store) -> None:
    read_rows(in_sequence, letters)
    maintain.compact(in_sequence.folder, "int4")
    in_sequence.refresh()
    assert in_sequence.spec == several(dtype="int4")
    write(letters / "e", "e")
    assert read_rows(in_sequence, letters) == 3 and len(state(in_sequence.folder)) == 15


def test_verify_finds_a_sequence_that_is_none(letters: Path, in_sequence: Store) -> None:
    read_rows(in_sequence, letters)
    with manifest.connect(in_sequence.folder) as db, manifest.transaction(db):
        db.execute("PRAGMA defer_foreign_keys = ON")
        db.execute("UPDATE source_chunk SET ordinal = 9 WHERE source = 2 AND ordinal = 0")
    (problem,) = maintain.verify(in_sequence.folder).problems
    assert "number 4 of the sequence, was not read after the one before it" in problem and "\n" not in problem


def test_a_flipped_bit_of_the_manifest_is_found_or_harmless(letters: Path, in_sequence: Store) -> None:
    read_rows(in_sequence, letters)
    before, silent = state(in_sequence.folder), 0
    for copy in flipped_copies(in_sequence.folder, manifest.FILE):
        try:
            if not maintain.verify(copy).problems:
                silent += 1
                assert state(copy) == before
            Store.open(copy, several())
        except ContextError as error:
            assert "\n" not in str(error) and str(copy) in str(error)
    assert silent < 190, "some of them hit something"


def test_an_archive_keeps_the_sequence(letters: Path, in_sequence: Store, tmp_path: Path) -> None:
    late_first(in_sequence, letters)
    before = state(in_sequence.folder)
    archive.export(in_sequence.folder, tmp_path / "ctx.tar")
    imported = archive.import_(tmp_path / "ctx.tar", tmp_path / "new")
    assert state(tmp_path / "new") == before and imported.spec == several()
    assert read_rows(imported, letters) == 0, "the files it was read from take their places"
    assert state(tmp_path / "new") == before


LIES: dict[str, Callable[[dict[str, Any], Any], None]] = {
    "another order": lambda index, members: index["sources"].reverse(),
    "a source less": lambda index, members: index["sources"].pop(1),
    "no reading": lambda index, members: index["spec"].pop("reading"),
    "more layers": lambda index, members: index["spec"].update(layers=4),
    "one layer": lambda index, members: index["spec"].update(layers=1, kv_heads=6, reading=INDEPENDENT),
    "another reading": lambda index, members: index["spec"].update(reading="backwards"),
}


@pytest.mark.parametrize("lie", LIES)
def test_an_archive_that_is_no_sequence_is_refused(letters: Path, in_sequence: Store, tmp_path: Path, lie: str) -> None:
    read_rows(in_sequence, letters)
    archive.export(in_sequence.folder, tmp_path / "ctx.tar")
    rewrite(tmp_path / "ctx.tar", tmp_path / "lie.tar", LIES[lie])
    with pytest.raises(ContextError):
        archive.import_(tmp_path / "lie.tar", tmp_path / "new")
        # What is only called otherwise can be no other context of this model.
        Store.open(tmp_path / "new", several())
    assert lie in ("no reading", "one layer") or not (tmp_path / "new").exists()


def test_sequences_are_not_merged(letters: Path, in_sequence: Store, tmp_path: Path) -> None:
    read_rows(in_sequence, letters)
    other = Store.open(tmp_path / "other", several())
    read_rows(other, letters / "a")
    with pytest.raises(ContextError, match=r"was read in sequence, .* cannot be merged; read the sources of both into"):
        maintain.merge(in_sequence.folder, other.folder)
    alone = [Store.open(tmp_path / name, several(INDEPENDENT)) for name in "xy"]
    for store, name in zip(alone, "ab", strict=True):
        read_paths(store, letters / name, model=MadeSequence())
    assert maintain.merge(alone[0].folder, alone[1].folder) == alone[1].tokens
    put(Store.open(tmp_path / "one", spec()), "a", [b"x"])
    with pytest.raises(ContextError, match="in sequence"):
        maintain.merge(tmp_path / "one", in_sequence.folder)
