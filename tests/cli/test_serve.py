"""`herd serve`: what it refuses before anything loads."""

import subprocess
import sys
from pathlib import Path

import pytest

from herd.cli import serve
from tests.cli.running import fails


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "herd.example"])
def test_others_need_a_key(capsys: pytest.CaptureFixture[str], host: str, tmp_path: Path) -> None:
    args = ("serve", "no-such-model", "--host", host, "--data", tmp_path)
    assert "--api-key" in fails(capsys, *args)
    # With one, or forced, the model is looked for; and the data folder is free again each time.
    for more in (["--api-key", "k"], ["--force"]):
        assert "no-such-model" in fails(capsys, *args, *more)


def test_without_its_extra_it_says_how_to_install_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name == "llguidance" else object())
    assert "pip install 'herd-llm[serve]'" in fails(capsys, "serve")


@pytest.mark.parametrize("text", ["", " \n", "ü", "good\nschlüssel"])
def test_keys_that_cannot_be(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    assert "key" in fails(capsys, "serve", "no-such-model", "--api-key-file", file)
    assert "missing" in fails(capsys, "serve", "no-such-model", "--api-key-file", tmp_path / "missing")


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--port", "99999", "--port"),
        ("--rows", "0", "--rows"),
        ("--memory", "much", "'much'"),
        ("--max-upload", "x", "'x'"),
    ],
)
def test_options_out_of_range(capsys: pytest.CaptureFixture[str], option: str, value: str, said: str) -> None:
    assert said in fails(capsys, "serve", "no-such-model", option, value)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--replicas", "0"], "--replicas"),
        (["--replicas", "two"], "--replicas"),
        (["--ray", "auto"], "say with --replicas how many"),
    ],
)
def test_what_cannot_be_is_refused(
    capsys: pytest.CaptureFixture[str], more: list[str], said: str, tmp_path: Path
) -> None:
    assert said in fails(capsys, "serve", "no-such-model", "--data", tmp_path, *more)


def test_no_cluster_is_an_error(capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path) -> None:
    command = ("serve", tiny_model, "--data", tmp_path, "--replicas", 1, "--ray", "127.0.0.1:1")
    assert "there is no Ray cluster to be used at 127.0.0.1:1: " in fails(capsys, *command)


def test_one_machine_needs_no_ray_and_for_more_the_error_names_the_extra(tmp_path: Path) -> None:
    code = "import sys; sys.modules['ray'] = None; import herd.server.app; from herd.cli.main import run; "
    code += "raise SystemExit(run(sys.argv[1:]))"
    command = ["serve", "no-such-model", "--data", str(tmp_path), "--replicas", "2"]
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.endswith("pip install 'herd-llm[ray]'\n")
