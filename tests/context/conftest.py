"""What is read in sequence."""

from pathlib import Path

import pytest

from herd.context import sources
from herd.context.store import Store
from tests.context.tiny_context import several
from tests.context.tiny_sequence import write


@pytest.fixture
def old_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files written by these tests count as old enough for their stat to be trusted."""
    monkeypatch.setattr(sources, "_RACY_NS", -(10**18))


@pytest.fixture
def letters(tmp_path: Path) -> Path:
    """Sources of three chunks each."""
    root = tmp_path / "src"
    root.mkdir()
    for name in "abcd":
        write(root / name, name)
    return root


@pytest.fixture
def in_sequence(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "ctx", several())
