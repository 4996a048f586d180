"""What names of models stand for."""

from pathlib import Path

import pytest

from herd.checkpoint import names
from herd.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "folder", "weights"),
    [
        ("cria", "built", "int8:64"),
        ("cria@bf16", "built", None),
        ("cria@int8:256", "built", "int8:256"),
        ("cria@int4:32", "built", "int4:32"),
        ("cria@experts=int4,head=int8", "built", "experts=int4:64,head=int8:64"),
        ("models/other", "models/other", None),
        ("models/other@int4", "models/other", "int4:64"),
        ("models/other@bf16", "models/other", None),
        ("me@home/other", "me@home/other", None),
    ],
)
def test_a_name_stands_for_a_folder_and_formats_of_weights(
    name: str, folder: str, weights: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(names, "cria_path", lambda: Path("built"))
    found = names.find_model(name)
    assert found.folder == Path(folder) and (found.weights and str(found.weights)) == weights
    Path(name).mkdir(parents=True)
    assert names.find_model(name) == (Path(name), None), "a folder of this name wins"


@pytest.mark.parametrize("name", ["other@int5", "cria@", "other@experts=int8,norms=bf16"])
def test_a_name_with_an_unknown_format_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"weights cannot be 'int5'; use bf16|cannot be ''|its parts: experts, "):
        names.find_model(name)
