"""How much memory there is: what this process may still take."""

import os
from collections.abc import Iterator
from pathlib import Path

from herd.units import parse_number

_GROUPS = Path("/sys/fs/cgroup")


def parse_bytes(text: str | int) -> int:
    """Bytes of memory or files, such as 3G or 2Gi (`herd.units`). ConfigError for anything else."""
    return parse_number(text, "memory")


def available_memory() -> int:
    """Bytes that this process may still take: of the machine's memory, and of that of its control groups (Linux)."""
    try:
        text = Path("/proc/meminfo").read_text()
        free = int(text.split("MemAvailable:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):  # not Linux
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(0, min([free, *_left_in_groups()]))


def _left_in_groups() -> Iterator[int]:
    """Of the process's group and of all that it is in. What is only cached counts as free."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers not in ("", "memory"):
            continue
        root = _GROUPS / controllers
        names = ("memory.max", "memory.current", "file") if not controllers else (
            "memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache")  # fmt: skip
        group = root / path.strip("/")
        for folder in (group, *group.parents):
            if folder == root.parent:
                break
            try:
                limit, used = ((folder / name).read_text().strip() for name in names[:2])
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except OSError:  # the topmost group has no limit
                continue
            if limit.isdigit():
                yield int(limit) - int(used) + int(stat.get(names[2], 0))
