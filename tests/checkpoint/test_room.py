"""How much memory there is, as a machine's files say it."""

from pathlib import Path

import pytest

from herd.checkpoint import room
from herd.checkpoint.room import available_memory


def test_there_is_some_memory() -> None:
    assert 0 < available_memory() < 1 << 50


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_control_group_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int) -> None:
    """What it caches of files is free; so is a group without a limit."""
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache", "memory", "4:memory:/a/b\n1:cpu:/x\n"),
        2: ("memory.max", "memory.current", "file", "", "0::/a/b\n"),
    }
    limit, used, cached, root, said = names[version]
    for folder, values in (("a/b", ("max" if version == 2 else str(1 << 62), "900", 0)), ("a", ("1000", "700", 500))):
        group = tmp_path / root / folder
        group.mkdir(parents=True, exist_ok=True)
        (group / limit).write_text(f"{values[0]}\n")
        (group / used).write_text(f"{values[1]}\n")
        (group / "memory.stat").write_text(f"anon 3\n{cached} {values[2]}\n")
    monkeypatch.setattr(room, "_GROUPS", tmp_path)
    usual = Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda path, *a: said if str(path) == "/proc/self/cgroup" else usual(path, *a)
    )
    assert available_memory() == 800
