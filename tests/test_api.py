"""Herd from Python: what a model's name stands for, and which contexts can be asked together."""

from pathlib import Path

import pytest

from herd import api


@pytest.mark.parametrize(
    ("name", "folder", "weights"),
    [
        ("cria", "built", None),
        ("cria@int8", "built", (8, 64)),
        ("cria@int4:32", "built", (4, 32)),
        ("models/other", "models/other", None),
        ("models/other@int4", "models/other", (4, 64)),
        ("other@int5", "other@int5", None),
    ],
)
def test_a_name_stands_for_a_folder_and_a_format_of_weights(
    name: str, folder: str, weights: tuple[int, int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(api, "cria_path", lambda: Path("built"))
    assert api.find_model(name) == (Path(folder), weights)
    Path(name).mkdir(parents=True)
    assert api.find_model(name) == (Path(name), None), "a folder of this name wins"
