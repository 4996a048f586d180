"""What every result says about itself: command, versions, machine. No paths, no host names."""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import herd

Result = dict[str, Any]
_PACKAGES = ("torch", "tokenizers", "numpy", "sympy", "networkx", "rank-bm25")


def about(command: str, model_name: str, fingerprint: str, seed: int) -> Result:
    """The head of a result."""
    return {
        "command": command,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "model": {"name": model_name, "fingerprint": fingerprint},
        "seed": seed,
        "versions": {"herd": herd.__version__, "python": platform.python_version(), **_versions()},
        "machine": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_gb": memory_gb(),
        },
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def cpu_name() -> str:
    """The processor's name as Linux gives it, else the platform's word for it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def memory_gb() -> float:
    """Installed memory in 10^9 bytes."""
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)


def write_json(result: Result, out: Path) -> None:
    """Write a result so that it is either the old file or the whole new one."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    partial.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(out)
