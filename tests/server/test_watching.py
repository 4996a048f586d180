"""Contexts that follow folders."""

import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from herd.errors import ConfigError
from herd.server import watching
from tests.server.process import ServerProcess


def settled(url: str, tokens: int) -> dict[str, Any]:
    """The one context, once nothing is read and it no longer has so many tokens."""
    while True:
        found = httpx.get(f"{url}/api/state").json()["contexts"]
        if found and not found[0]["reading"] and found[0]["tokens"] != tokens:
            assert len(found) == 1
            return dict(httpx.get(f"{url}/api/contexts/{found[0]['id']}").json())
        time.sleep(0.1)


def test_what_changes_in_a_folder_is_read_again_and_nothing_else(tiny_model: Path, tmp_path: Path) -> None:
    (folder := tmp_path / "notes").mkdir()
    for name in "abc":
        (folder / f"{name}.txt").write_text(f"{name} is 1\n" * 20)
    server = ServerProcess(tiny_model, tmp_path / "data", "--watch", folder)
    try:
        first = settled(server.url, 0)
        assert first["watches"] == str(folder) and len(first["files"]) == 3
        (folder / "b.txt").write_text("b is 2\n" * 25)
        second = settled(server.url, first["tokens"])
        tokens = {file["name"]: file["tokens"] for file in second["files"]}
        assert second["last"]["read_tokens"] == tokens["notes/b.txt"]
        shown = httpx.get(f"{server.url}/api/contexts/{second['id']}/source", params={"name": "notes/b.txt"}).json()
        assert shown["lines"] == ["b is 2"] * 25
        (folder / "a.txt").unlink()
        third = settled(server.url, second["tokens"])
        assert [file["name"] for file in third["files"]] == ["notes/b.txt", "notes/c.txt"]
        assert third["last"]["read_tokens"] == 0
    finally:
        server.kill()


def test_folders_that_cannot_be_watched(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no folder that could be watched"):
        watching.check([tmp_path / "none"], tmp_path)
    with pytest.raises(ConfigError, match="name another folder as --data"):
        watching.check([tmp_path], tmp_path / "data")
    assert watching.check([tmp_path / "."], tmp_path.parent) == (tmp_path,)
