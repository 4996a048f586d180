"""Sources of a few chunks each, a context into which they are read in sequence, and what it then holds."""

import shutil
from pathlib import Path

from herd.context import maintain, manifest
from herd.context.store import Store
from tests.context.tiny_context import CHUNK, MadeSequence, read_paths, several


def write(path: Path, text: str, lines: int = 3) -> None:
    """Each line fills a chunk, beside the header (`# src/a:1`)."""
    path.write_text("".join(f"{text} line {i}\n".rjust(CHUNK // 2) for i in range(lines)))


def state(folder: Path) -> list[tuple[str, bytes, int, int]]:
    """The sequence: source, token ids, checksum of the K/V and first line of each chunk, after checking all of it."""
    assert maintain.verify(folder).problems == []
    with manifest.connect(folder) as db:
        pairs, names = manifest.source_chunks(db), {row.id: row.name for row in manifest.sources(db)}
    opened = Store.open(folder)
    index = {chunk.id: place for place, chunk in enumerate(opened.chunks)}
    found = []
    for source, chunk in pairs:
        row = opened.chunks[index[chunk]]
        found.append((names[source], bytes(opened.ids(index[chunk])), row.crc, row.first_line))
    return found


def order(folder: Path) -> list[str]:
    return list(dict.fromkeys(name for name, *_ in state(folder)))


def from_scratch(folder: Path, like: Path) -> list[tuple[str, bytes, int, int]]:
    """The state of a context into which copies of the sources of another one are read one by one, in their order."""
    with manifest.connect(like) as db:
        rows = sorted(manifest.sources(db), key=lambda row: row.id)
    opened, copies = Store.open(folder / "ctx", several()), folder / "src"
    copies.mkdir()
    for row in rows:
        assert row.path is not None
        shutil.copy(row.path.decode(), copies)
        read_paths(opened, copies, model=MadeSequence())
    return state(folder / "ctx")


def read_rows(opened: Store, *paths: Path) -> int:
    """How many chunks a read ran through the model."""
    model = MadeSequence()
    read_paths(opened, *paths, model=model)
    return model.rows


def late_first(opened: Store, folder: Path) -> None:
    """Read c and d, and then a and b as well."""
    for name in "ab":
        (folder / name).unlink()
    assert read_rows(opened, folder) == 6
    for name in "ab":
        write(folder / name, name)
    assert read_rows(opened, folder) == 6
