"""Files to be read, and a model to be converted."""

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


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.checkpoint import tiny_llama4  # imports transformers, which takes long

    folder = tmp_path_factory.mktemp("plain") / "hf"
    tiny_llama4.tiny_llama4().save_pretrained(folder)
    tiny_llama4.write_tokenizer(folder)
    return folder
