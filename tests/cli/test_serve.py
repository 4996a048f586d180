"""`herd serve`: what it refuses before anything loads."""

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
