"""Ctrl-C at any moment ends the command with one line that says what is kept, and exit code 130."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import herd
from herd.cli.main import run
from tests.cli.running import fails


def test_interrupted_read_is_kept(notes: Path, tiny_model: Path) -> None:
    for i in range(48):
        (notes / f"{i}.txt").write_text(f"Line {i} of a long note that nobody reads twice.\n" * 150)
    context = notes.parent / "ctx"
    command = [sys.executable, "-m", "herd", "read", str(notes), "--context", str(context), "--model", str(tiny_model)]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for _ in range(6000):
        if len(list(context.glob("*.kv"))) > 1 or child.poll() is not None:
            break
        time.sleep(0.005)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert err == "interrupted: what was read so far is kept; the same command goes on from there\n"
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)["context"]
    assert 0 < result["read_tokens"] < result["tokens"]


def breaks_off(*args: object, on_text: Callable[[str], None], **options: object) -> None:
    on_text("The co")
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("command", "kept"),
    [
        ("ask q --context CTX", "the context is kept; ask again any time"),
        ("chat --context CTX", "the conversation is not kept; a context is left as it was"),
        ("chat", "the conversation is not kept; a context is left as it was"),
    ],
)
def test_an_interrupted_answer_ends_its_line(
    command: str,
    kept: str,
    capsys: pytest.CaptureFixture[str],
    notes: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context, model = str(notes.parent / "ctx"), ("--model", str(tiny_model))
    assert run(["read", str(notes), "--context", context, *model]) == 0
    capsys.readouterr()
    monkeypatch.setattr(herd.Context, "ask", breaks_off)
    monkeypatch.setattr(herd.Model, "generate", breaks_off)
    monkeypatch.setattr("builtins.input", lambda prompt: "Hello")
    assert run([*command.replace("CTX", context).split(), *model]) == 130
    assert capsys.readouterr() == ("The co\n", f"interrupted: {kept}\n")


def test_interrupt_elsewhere_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("herd.cli.info.installation", interrupted)
    assert "nothing was changed" in fails(capsys, "info", code=130)


@pytest.mark.parametrize("moment", ["typer", "torch"])
@pytest.mark.parametrize("command", [[sys.executable, "-m", "herd"], [str(Path(sys.executable).with_name("herd"))]])
def test_an_interrupt_at_start_up_is_one_line(command: list[str], moment: str, tmp_path: Path) -> None:
    """The module that is imported at this moment is replaced by one that Ctrl-C hits."""
    (tmp_path / f"{moment}.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([*command, "info"], capture_output=True, text=True, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted: nothing was changed\n")


def test_an_interrupt_at_the_prompt_of_a_chat_ends_its_line(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(prompt: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    assert run(["chat", "--model", str(tiny_model)]) == 130
    assert capsys.readouterr().err.startswith("\ninterrupted: ")
