"""Files to be read."""

from pathlib import Path

import pytest


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "gate.txt").write_text("The code of the north gate is 4711.\n" * 3)
    (folder / "port.py").write_text("PORT = 8080\n")
    (folder / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0")
    return folder
