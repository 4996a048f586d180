"""Runs the command in this process and looks at what it printed."""

import json

import pytest

from herd.cli.main import run


def run_json(capsys: pytest.CaptureFixture[str], *args: object) -> dict:  # type: ignore[type-arg]
    assert run([str(a) for a in args]) == 0
    return json.loads(capsys.readouterr().out)


def fails(capsys: pytest.CaptureFixture[str], *args: object, code: int = 2) -> str:
    """Runs a command that must fail with one line on stderr and nothing on stdout; returns the line."""
    assert run([str(a) for a in args]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1 and "Traceback" not in err, err
    return err
