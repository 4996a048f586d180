"""The house rules: public names, size caps, import order, light imports."""

import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import herd
from herd import errors

ROOT = Path(__file__).resolve().parent.parent


def load_tool(name: str):  # type: ignore[no-untyped-def]
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_public_names() -> None:
    for name in herd.__all__:
        assert getattr(herd, name) is not None
    tree = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.HerdError)]
    assert {c.__name__ for c in tree} <= set(herd.__all__)
    assert all(f"{c.__name__}" in (errors.__doc__ or "") for c in tree)
    with pytest.raises(AttributeError, match="no attribute 'lord'"):
        _ = herd.lord


def test_every_public_name_is_documented() -> None:
    for name in herd.__all__:
        value = getattr(herd, name)
        assert value.__doc__, name
        for member in vars(value) if isinstance(value, type) else ():
            if not member.startswith("_") and callable(getattr(value, member)):
                assert getattr(value, member).__doc__, f"{name}.{member}"


def test_caps_tool_finds_what_is_too_long(tmp_path: Path) -> None:
    caps = load_tool("caps")
    (tmp_path / "herd").mkdir()
    (tmp_path / "herd/long.py").write_text("x = 1\n" * 401)
    (tmp_path / "herd/ok.py").write_text("x = 1\n" * 400)
    (tmp_path / "herd/kernel.cpp").write_text("\n" * 501)
    (tmp_path / "herd/function.py").write_text("def f():\n" + "    pass\n" * 60 + "def g():\n" + "    pass\n" * 59)
    assert caps.complaints(tmp_path) == [
        "herd/function.py:1: f has 61 lines, at most 60",
        "herd/kernel.cpp: 501 lines, at most 500",
        "herd/long.py: 401 lines, at most 400",
    ]


def test_import_contract_names_every_package() -> None:
    """A new package must take its place in the layers, or nothing checks its imports."""
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    named = {word.strip("() ") for layer in contract["layers"] for word in layer.replace(":", "|").split("|")}
    found = {p.stem for p in (ROOT / "herd").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert found - {"__init__", "__main__"} <= named


def test_import_contract_fails_on_an_upward_import(tmp_path: Path) -> None:
    """The tool itself is tried on a copy with one forbidden import."""
    subprocess.run(["cp", "-r", str(ROOT / "herd"), str(ROOT / "pyproject.toml"), str(tmp_path)], check=True)
    with (tmp_path / "herd/kernels/reference.py").open("a") as file:
        file.write("\nimport herd.engine\n")
    # Without the hook of an editable install, which would find the installed package first.
    lint = "import sys; sys.meta_path = [f for f in sys.meta_path if 'ScikitBuild' not in type(f).__name__]\n"
    lint += "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command, env = [sys.executable, "-c", lint], {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 1
    assert "herd.kernels.reference -> herd.engine" in done.stdout


def test_import_of_herd_is_light() -> None:
    code = "import sys, herd, herd.cli.main; print([m for m in ('torch', 'numpy', 'tokenizers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
