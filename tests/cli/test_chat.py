"""`herd chat` on the store of `herd serve`."""

from pathlib import Path

import pytest

import herd
from herd.cli.main import run
from herd.media import open_image
from herd.server.library import Library
from tests.cli.running import fails, run_json
from tests.test_images import folder, pictures  # noqa: F401


def chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lines: list[str], *args: object) -> list:  # type: ignore[type-arg]
    """The turns after these lines."""
    left = iter(lines)

    def line(prompt: str) -> str:
        if (said := next(left, None)) is None:
            raise EOFError
        return said

    monkeypatch.setattr("builtins.input", line)
    turns = run_json(capsys, "chat", "--max-tokens", 12, "--json", *args)
    assert isinstance(turns, list)
    return turns


def test_a_kept_chat_goes_on_where_it_was(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tmp_path: Path
) -> None:
    once = ("--model", tiny_model, "--data", tmp_path / "once")
    expected = chat(monkeypatch, capsys, ["one", "two", "three"], *once)
    twice = ("--model", tiny_model, "--data", tmp_path / "twice")
    chat(monkeypatch, capsys, ["one", "two"], *twice)
    files = [path.stat().st_size for path in (tmp_path / "twice/conversations").iterdir()]
    assert len(files) == 1 and files[0] > 0
    assert chat(monkeypatch, capsys, ["three"], *twice, "--continue") == expected
    library = Library(tmp_path / "twice")
    (only,) = library.chats()
    assert only.title == "one"
    assert [(m.role, m.content) for m in library.messages(only.id)] == [(t["role"], t["content"]) for t in expected]


def test_instructions_of_the_page_stand_before_kept_chats(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tmp_path: Path
) -> None:
    library, system = Library(tmp_path), "Speak of goats."
    library.set({"system": system})
    turns = chat(monkeypatch, capsys, ["one", "two"], "--model", tiny_model, "--data", tmp_path)
    model, said = herd.load(tiny_model), [{"role": "system", "content": system}]
    for turn in turns:
        if turn["role"] == "assistant":
            assert turn["content"] == model.generate(model.tokenizer.chat(said), max_tokens=12).text
        said.append(turn)
    assert [m.role for m in library.messages(library.chats()[0].id)] == ["user", "assistant"] * 2
    assert chat(monkeypatch, capsys, ["one"], "--model", tiny_model)[1] != turns[1], "what is not kept has none"
    library.close()


def test_images_are_attached_kept_and_seen_again(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,  # noqa: F811
    pictures: list[Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    small, wide = pictures
    tiff = tmp_path / "wide.tiff"
    open_image(wide).save(tiff)
    once = ("--model", folder, "--data", tmp_path / "once", "--image", small)
    expected = chat(monkeypatch, capsys, ["What?", f"/attach {tiff}", "And this?", "So?"], *once)
    twice = ("--model", folder, "--data", tmp_path / "twice")
    chat(monkeypatch, capsys, ["What?", f"/attach {tiff}", "And this?"], *twice, "--image", small)
    again = chat(monkeypatch, capsys, ["So?"], *twice, "--continue")
    assert [turn["content"] for turn in again] == [turn["content"] for turn in expected]
    assert [turn.get("images") for turn in again] == [["small.png"], None, ["wide.tiff"], None, None, None]
    unkept = ("--model", folder, "--image", small)
    assert chat(monkeypatch, capsys, ["What?"], *unkept)[1] == expected[1]
    library = Library(tmp_path / "twice")
    first, _, third, *_ = library.messages(library.chats()[0].id)
    assert library.image(first.images[0]) == ("image/png", small.read_bytes())
    assert library.image(third.images[0])[0] == "image/png", "browsers show no TIFF"


def test_images_that_cannot_be_shown(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tiny_model: Path,
    folder: Path,  # noqa: F811
    pictures: list[Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("builtins.input", lambda prompt: f"/attach {tmp_path}/none.png")
    data = ("--data", tmp_path / "data")
    assert "tiny reads no images" in fails(capsys, "chat", "--model", tiny_model, "--image", pictures[0])
    assert "none.png" in fails(capsys, "chat", "--model", folder, *data)


def test_files_are_attached_listed_and_the_talk_is_saved(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny_model: Path, notes: Path, tmp_path: Path
) -> None:
    data = ("--model", tiny_model, "--data", tmp_path / "data")
    said = tmp_path / "talk.md"
    turns = chat(monkeypatch, capsys, [f"/attach {notes}", "What is PORT?", "/sources", f"/save {said}"], *data)
    assert "PORT" in turns[1]["content"] and turns[1]["citations"]
    assert said.read_text("utf-8").startswith("## You\n\nWhat is PORT?\n\n## Herd\n\n")
    assert "- notes/port.py:1-1" in said.read_text("utf-8")
    library = Library(tmp_path / "data")
    (entry,) = library.contexts()
    assert entry.name == "notes" and library.chats()[0].context == entry.id
    opened = herd.Context.open(library.context_folder(entry.id) / "kv", herd.load(tiny_model))
    assert [source.name for source in opened.sources] == ["notes/gate.txt", "notes/port.py"]
    assert library.messages(library.chats()[0].id)[-1].detail["context"] == entry.id
    again = chat(monkeypatch, capsys, ["What is PORT?"], *data, "--continue")
    assert again[-1]["citations"] == turns[1]["citations"]


def test_commands_that_cannot_be_followed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "there.md").write_text("mine")
    data = ("--model", tiny_model, "--data", tmp_path / "data")
    for line, told in (
        ("/none", "/none is no command; there are /attach PATH..., "),
        ("/save 'a", "quotes come in pairs"),
        (f"/save {tmp_path}/there.md", "exists; name a new file"),
        ("/sources", "nothing was read"),
        (f"/attach {tmp_path}/none", "nothing was read"),
    ):
        monkeypatch.setattr("builtins.input", lambda prompt, line=line: line)
        assert told in fails(capsys, "chat", *data)
    assert (tmp_path / "there.md").read_text() == "mine"
    assert "leave --continue out" in fails(
        capsys, "chat", "--model", tiny_model, "--data", tmp_path / "new", "--continue"
    )
    assert run(["chat", "--help"]) == 0
