"""The Python examples of the README and of docs/ run as they are printed, with a tiny model in Cria's place."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from herd.checkpoint import names

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXAMPLES = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in PAGES
    for number, block in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")), 1)
]


@pytest.fixture
def here(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files the examples name, where "cria" is the tiny model and answers end after a few tokens."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "gate.txt").write_text("The access code of the north gate is 4711. Ada keeps the gate.\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(names, "cria_path", lambda: tiny_model)
    return tmp_path


@pytest.mark.parametrize("code", EXAMPLES)
def test_python_example_runs(code: str, here: Path) -> None:
    exec(compile(code, "example", "exec"), {})


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 4


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_make_targets_that_are_named_exist() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for page in PAGES:
        named = re.findall(r"`?make ([a-z]+)`", page.read_text(encoding="utf-8"))
        assert set(named) <= set(targets), page.name


def test_the_tree_of_the_readme_is_the_tree() -> None:
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("## The tree")[1].split("```")[1]
    listed = {line.split()[0].rstrip("/") for line in tree.splitlines() if line.startswith("  ")}
    found = {p.name for p in (ROOT / "herd").iterdir() if p.is_dir() or p.suffix == ".py"}
    found -= {"__pycache__", "__init__.py", "__main__.py", "py.typed", "models"}
    assert found <= listed, found - listed
    assert listed - {"models/cria"} <= found, listed - found


def test_measured_figures_are_those_of_the_committed_results() -> None:
    done = subprocess.run([sys.executable, ROOT / "tools/readme.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
