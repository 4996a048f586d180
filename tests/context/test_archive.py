"""Export and import: a whole context in one file, and nothing believed that does not prove sound."""

import hashlib
import io
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from herd.context import archive, maintain
from herd.context.manifest import SkippedRow
from herd.context.store import Store
from herd.errors import ContextError
from tests.context.tiny_context import contents, put, spec

Members = list[tuple[tarfile.TarInfo, bytes]]


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    opened = Store.open(tmp_path / "ctx", spec())
    put(opened, "dir/a.py", [b"one", b"two"])
    put(opened, "dir/b.py", [b"two", b"three"])
    with opened.writer() as writer:
        writer.commit(skipped=[SkippedRow(b"/home/me/x.bin", "dir/x.bin", "binary file")])
    archive.export(tmp_path / "ctx", tmp_path / "ctx.tar")
    return tmp_path / "ctx.tar"


def test_a_round_trip_brings_everything_back(exported: Path, tmp_path: Path) -> None:
    imported = archive.import_(exported, tmp_path / "new")
    assert contents(imported) == contents(Store.open(tmp_path / "ctx"))
    assert [(s.name, s.path, s.tokens) for s in imported.sources] == [("dir/a.py", None, 6), ("dir/b.py", None, 8)]
    assert imported.skipped == [("dir/x.bin", "binary file")]
    assert maintain.verify(tmp_path / "new").problems == []
    assert b"/home/me" not in exported.read_bytes(), "paths of this machine stay here"
    put(imported, "dir/c.py", [b"three", b"four"])


def test_a_round_trip_keeps_the_format(exported: Path, tmp_path: Path) -> None:
    maintain.compact(tmp_path / "ctx", "int4")
    archive.export(tmp_path / "ctx", tmp_path / "int4.tar")
    imported = archive.import_(tmp_path / "int4.tar", tmp_path / "new")
    assert imported.spec.dtype == "int4" and contents(imported) == contents(Store.open(tmp_path / "ctx"))
    rewrite(tmp_path / "int4.tar", tmp_path / "lie.tar", set_at(["spec", "dtype"], "int8"))
    refuse(tmp_path / "lie.tar", tmp_path)


def test_nothing_is_overwritten(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(ContextError, match="exists"):
        archive.export(tmp_path / "ctx", exported)
    with pytest.raises(ContextError, match="not empty"):
        archive.import_(exported, tmp_path / "ctx")
    (tmp_path / "empty").mkdir()
    archive.import_(exported, tmp_path / "empty")


def refuse(path: Path, tmp_path: Path, match: str | None = "not a sound context archive") -> None:
    before = {p.name for p in tmp_path.iterdir()}
    with pytest.raises(ContextError, match=match):
        archive.import_(path, tmp_path / "bad")
    assert {p.name for p in tmp_path.iterdir()} == before, "a refused archive leaves nothing behind"


def rewrite(source: Path, target: Path, change: Callable[[dict[str, Any], Members], None]) -> None:
    """The archive with its index and members changed, and the index's checksum made right again."""
    with tarfile.open(source) as tar:
        members = [(info, tar.extractfile(info).read()) for info in tar]
    index = json.loads(members[0][1])
    change(index, members)
    raw = json.dumps(index).encode()
    members[0] = (members[0][0], raw)
    members[1] = (members[1][0], hashlib.blake2b(raw).hexdigest().encode())
    with tarfile.open(target, "w") as tar:
        for info, data in members:
            info.size = len(data) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(data))


def set_at(path: list[Any], value: Any) -> Callable[[dict[str, Any], Members], None]:
    def change(index: dict[str, Any], members: Members) -> None:
        place: Any = index
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return change


def rename_segment(name: str) -> Callable[[dict[str, Any], Members], None]:
    def change(index: dict[str, Any], members: Members) -> None:
        members[2][0].name = name

    return change


def link_segment(index: dict[str, Any], members: Members) -> None:
    members[2][0].type, members[2][0].linkname = tarfile.SYMTYPE, "/etc/passwd"


def drop_segment(index: dict[str, Any], members: Members) -> None:
    members.pop()


LIES: dict[str, Callable[[dict[str, Any], Members], None]] = {
    "format": set_at(["format"], 99),
    "no spec": set_at(["spec"], {}),
    "negative heads": set_at(["spec", "kv_heads"], -1),
    "no heads": set_at(["spec", "kv_heads"], 0),
    "huge heads": set_at(["spec", "head_dim"], 1 << 23),
    "dtype": set_at(["spec", "dtype"], "float7"),
    "another fingerprint": set_at(["spec", "fingerprint"], "other"),
    "tokens": set_at(["segments", 0, "tokens"], 1 << 31),
    "text for a number": set_at(["segments", 0, "tokens"], "5"),
    "segment checksum": set_at(["segments", 0, "blake2b"], "00"),
    "path in the index": set_at(["segments", 0, "file"], "../../evil.kv"),
    "path in the tar": rename_segment("segments/../../evil.kv"),
    "absolute path": rename_segment("/tmp/evil.kv"),
    "symbolic link": link_segment,
    "missing segment": drop_segment,
    "chunk before the start": set_at(["chunks", 0, 1], -1),
    "chunk beyond the end": set_at(["chunks", 0, 1], 10_000),
    "chunk too long": set_at(["chunks", 0, 2], 10_000),
    "chunk elsewhere": set_at(["chunks", 0, 0], 7),
    "chunk checksum": set_at(["chunks", 0, 5], 1),
    "chunk hash": set_at(["chunks", 0, 6], "00" * 32),
    "no hex": set_at(["chunks", 0, 6], "zz"),
    "no base64": set_at(["chunks", 0, 7], "***"),
    "other ids": set_at(["chunks", 0, 7], "eJxjYAAAAAIAAQ=="),
    "short chunk": set_at(["chunks", 0], [0]),
    "source of no chunk": set_at(["sources", 0, "chunks"], [99]),
    "negative chunk": set_at(["sources", 0, "chunks"], [-1]),
    "name of two lines": set_at(["sources", 0, "name"], "a\nb"),
    "escape in a name": set_at(["sources", 0, "name"], "\x1b[31m"),
    "endless name": set_at(["sources", 0, "name"], "x" * 10_000),
    "list for a dictionary": set_at(["sources"], {"a": 1}),
    "nothing skipped": set_at(["skipped"], None),
}


@pytest.mark.parametrize("lie", LIES)
def test_an_archive_that_lies_is_refused(exported: Path, tmp_path: Path, lie: str) -> None:
    rewrite(exported, tmp_path / "lie.tar", LIES[lie])
    refuse(tmp_path / "lie.tar", tmp_path, None)


def test_what_is_no_archive_is_refused(exported: Path, tmp_path: Path) -> None:
    data = exported.read_bytes()
    other = tmp_path / "other.tar"
    for content in (b"", b"PK\x03\x04" * 200, data[:600], data[: len(data) // 2], json.dumps({}).encode()):
        other.write_bytes(content)
        refuse(other, tmp_path, None)
    with pytest.raises(ContextError, match="No such file"):
        archive.import_(tmp_path / "nothing.tar", tmp_path / "bad")


def test_a_flipped_bit_is_refused_or_changes_nothing(exported: Path, tmp_path: Path) -> None:
    sound, expected = exported.read_bytes(), contents(Store.open(tmp_path / "ctx"))
    flipped_file = tmp_path / "flipped.tar"
    for number, position in enumerate(random.Random(0).sample(range(len(sound)), 40)):
        flipped = bytearray(sound)
        flipped[position] ^= 1 << (position % 8)
        flipped_file.write_bytes(flipped)
        try:
            imported = archive.import_(flipped_file, tmp_path / f"new{number}")
        except ContextError:
            continue
        assert contents(imported) == expected
