"""`.gitignore`: what lies above a folder that was named."""

from pathlib import Path

from herd.context.sources import Found, find


def names(*paths: Path) -> list[str]:
    return [entry.name() for entry in find(paths) if isinstance(entry, Found)]


def test_rules_above_reach_into_a_named_folder(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / ".gitignore").write_text("*.log\n/build/\n")
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.txt").write_text("a")
    (tmp_path / "src" / "b.log").write_text("b")
    assert names(tmp_path / "src") == ["src/a.txt"]


def test_an_ignored_folder_that_is_named_is_read(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / ".gitignore").write_text("/build/\n")
    (tmp_path / "build" / "lib").mkdir(parents=True)
    (tmp_path / "build" / "lib" / "a.txt").write_text("a")
    assert names(tmp_path) == [f"{tmp_path.name}/.gitignore"]
    assert names(tmp_path / "build") == ["build/lib/a.txt"]
    assert names(tmp_path / "build" / "lib") == ["lib/a.txt"]
