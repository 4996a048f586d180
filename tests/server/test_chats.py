"""What the page asks of a server: chats that outlive it, one answer at a time, errors that change nothing."""

import json
import threading
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import herd
from herd.server.library import Library
from tests.server.process import ServerProcess, answer, ask, messages, new_chat
from tests.server.served import Served, serving


@pytest.fixture(scope="module")
def server(model: herd.Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(model, tmp_path_factory.mktemp("chats")) as it:
        it.http.put("/api/settings", json={"max_tokens": 30})
        yield it


def test_a_killed_server_goes_on_as_one_that_never_stopped(server: Served, tiny_model: Path, tmp_path: Path) -> None:
    first, then = ("one", "two"), ("three", "four")
    chat = new_chat(server.url)
    expected = [ask(server.url, chat, text) for text in (*first, *then)]
    other = ServerProcess(tiny_model, tmp_path)
    try:
        httpx.put(f"{other.url}/api/settings", json={"max_tokens": 30})
        chat = new_chat(other.url)
        said = [ask(other.url, chat, text) for text in first]
        time.sleep(0.3)  # for what was seen to be on disk
        other.kill()
        other.start()
        assert [m["content"] for m in messages(other.url, chat)[1::2]] == [m["content"] for m in said]
        said += [ask(other.url, chat, text) for text in then]
        assert other.stop() == 0
    finally:
        other.kill()
    assert [m["content"] for m in said] == [m["content"] for m in expected]
    seen = [m["detail"]["cached_tokens"] for m in said]
    assert seen == [m["detail"]["cached_tokens"] for m in expected] and 0 == seen[0] < seen[1] < seen[2] < seen[3]


def test_answers_are_those_of_the_model_alone(server: Served) -> None:
    chat = new_chat(server.url)
    assert ask(server.url, chat, "Good day")["content"] == server.alone("Good day", 30)


def test_one_answer_at_a_time_which_can_be_stopped(server: Served) -> None:
    server.http.put("/api/settings", json={"max_tokens": 100_000})
    try:
        chat = new_chat(server.url)
        assert server.http.post(f"/api/chats/{chat}/messages", json={"content": "Again and again"}).status_code == 201
        again = server.http.post(f"/api/chats/{chat}/messages", json={"content": "and"})
        assert again.status_code == 409 and "stop it, or wait for its end" in again.json()["error"]["message"]
        while not messages(server.url, chat)[-1]["content"]:
            time.sleep(0.02)
        assert server.http.post(f"/api/chats/{chat}/stop").status_code == 204
        stopped = messages(server.url, chat)[-1]
        assert stopped["state"] == "stopped" and stopped["content"]
        assert [m["content"] for m in messages(server.url, chat)] == ["Again and again", stopped["content"]]
    finally:
        server.http.put("/api/settings", json={"max_tokens": 30})


def test_again_and_edit(server: Served) -> None:
    chat = new_chat(server.url)
    first, second = ask(server.url, chat, "first"), ask(server.url, chat, "second")
    assert server.http.post(f"/api/chats/{chat}/again").status_code == 201
    again = answer(server.url, chat)
    assert again["id"] > second["id"] and again["content"] == second["content"]
    question = messages(server.url, chat)[0]
    server.http.post(f"/api/chats/{chat}/messages", json={"content": "first", "before": question["id"]})
    assert answer(server.url, chat)["content"] == first["content"]
    assert len(messages(server.url, chat)) == 2
    server.http.delete(f"/api/chats/{chat}/messages/{answer(server.url, chat)['id']}")
    assert [m["content"] for m in messages(server.url, chat)] == ["first"]
    assert server.http.post(f"/api/chats/{chat}/again").status_code == 201
    assert answer(server.url, chat)["content"] == first["content"]


def test_events_tell_all_of_an_answer_in_order(server: Served) -> None:
    chat, pieces, ends = new_chat(server.url), [[], []], list[str]()  # type: ignore[var-annotated]

    def look(into: list[Any]) -> None:
        with httpx.stream("GET", f"{server.url}/api/events", timeout=30) as reply:
            for line in reply.iter_lines():
                event = json.loads(line.removeprefix("data: ") or "{}")
                if event.get("type") == "hello":
                    ready.release()
                if event.get("type") == "piece" and event["chat"] == chat:
                    into.append(event)
                if event.get("type") == "message" and event["message"]["state"] == "done" and into:
                    ends.append(event["message"]["content"])
                    return

    ready = threading.Semaphore(0)
    lookers = [threading.Thread(target=look, args=[into]) for into in pieces]
    for looker in lookers:
        looker.start()
        ready.acquire()
    said = ask(server.url, chat, "say something")
    for looker in lookers:
        looker.join()
    for seen in pieces:
        assert [event["piece"] for event in seen] == list(range(1, len(seen) + 1))
        assert "".join(event["text"] for event in seen) == said["content"]
    assert ends == [said["content"]] * 2


def read(server: Served, *files: tuple[str, bytes]) -> dict[str, Any]:
    """A context that has read these files."""
    id = server.http.post("/api/contexts", json={"name": "files"}).json()["id"]
    body = [("files", ("file", data)) for _, data in files]
    reply = server.http.post(f"/api/contexts/{id}/files", files=body, data={"names": [name for name, _ in files]})
    assert reply.status_code == 202, reply.text
    while (now := server.http.get(f"/api/contexts/{id}").json())["reading"]:
        time.sleep(0.02)
    return dict(now)


def test_files_are_read_shown_and_taken_out(server: Served) -> None:
    text = "PORT = 8080\nHOST = 'north'\n"
    now = read(server, ("src/port.py", text.encode()), ("src/image.png", b"\x89PNG\r\n\x1a\n\0\0"))
    assert [file["name"] for file in now["files"]] == ["src/port.py"]
    assert [skipped["name"] for skipped in now["skipped"]] == ["src/image.png"]
    shown = server.http.get(f"/api/contexts/{now['id']}/source", params={"name": "src/port.py", "line": 2}).json()
    assert shown == {"name": "src/port.py", "first": 1, "lines": text.splitlines(), "last": 2}
    said = ask(server.url, new_chat(server.url, now["id"]), "What is PORT?")
    assert said["detail"]["quoted"] and said["detail"]["citations"][0]["source"] == "src/port.py"
    server.http.delete(f"/api/contexts/{now['id']}/files", params={"name": "src/port.py"})
    while (now := server.http.get(f"/api/contexts/{now['id']}").json())["reading"]:
        time.sleep(0.02)
    assert now["files"] == [] and now["tokens"] == 0


def test_names_cannot_leave_their_folder(server: Served, tmp_path: Path) -> None:
    for name in ("../../out.txt", "/etc/out.txt", "a/../../out.txt", "a\x00b", "x" * 2000):
        now = read(server, (name, b"text"))
        assert "cannot be a source's name" in now["last"]["error"] and now["files"] == []
    assert not list(server.app.state.server.library.folder.rglob("out.txt"))


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "told"),
    [
        ("GET", "/api/chats/none", None, 404, "there is no chat 'none'; it may have been deleted"),
        ("GET", "/api/chats/..%2f..", None, 404, ""),
        ("POST", "/api/chats", {"context": "none"}, 404, "there is no context 'none'"),
        ("POST", "/api/chats", {"unknown": 1}, 400, "Unknown field: unknown"),
        ("POST", "/api/chats/CHAT/messages", {"content": "  "}, 400, "at least one character"),
        ("POST", "/api/chats/CHAT/messages", {"content": "a", "before": 999}, 404, "there is no message 999"),
        ("POST", "/api/chats/CHAT/messages", {"content": 1}, 400, "content"),
        ("POST", "/api/chats/CHAT/again", None, 400, "ends with no question"),
        ("DELETE", "/api/chats/CHAT/messages/999", None, 404, "there is no message 999"),
        ("PUT", "/api/settings", {"temperature": -1}, 400, "temperature"),
        ("PUT", "/api/settings", {"temperature": "1"}, 400, "temperature"),
        ("GET", "/api/contexts/none/source?name=a", None, 404, "there is no context"),
        ("GET", "/page/..%2f__init__.py", None, 404, ""),
        ("GET", "/page/app.py", None, 404, "there is no page 'app.py'"),
    ],
)
def test_errors_are_clear_and_change_nothing(
    server: Served, method: str, path: str, body: Any, status: int, told: str
) -> None:
    chat = new_chat(server.url)
    reply = server.http.request(method, path.replace("CHAT", chat), json=body)
    assert reply.status_code == status, reply.text
    assert told in reply.json()["error"]["message"]
    assert messages(server.url, chat) == []


def test_what_does_not_fit_is_refused_with_the_numbers(server: Served) -> None:
    chat = new_chat(server.url)
    server.http.put("/api/settings", json={"max_tokens": 1 << 20})
    reply = server.http.post(f"/api/chats/{chat}/messages", json={"content": "long"})
    server.http.put("/api/settings", json={"max_tokens": 30})
    assert reply.status_code == 400 and "1,048,576" in reply.json()["error"]["message"]
    assert messages(server.url, chat) == []


def test_everything_is_exported_and_imported(server: Served) -> None:
    chat = new_chat(server.url)
    said = ask(server.url, chat, "to be exported")
    copy = server.http.get("/api/export")
    assert copy.headers["content-disposition"] == 'attachment; filename="herd.zip"'
    before = {c["id"] for c in server.http.get("/api/state").json()["chats"]}
    assert server.http.post("/api/import", files={"file": copy.content}).status_code == 201
    after = {c["id"] for c in server.http.get("/api/state").json()["chats"]}
    assert len(after) == 2 * len(before)
    assert any(
        messages(server.url, id)[-1:] and messages(server.url, id)[-1]["content"] == said["content"]
        for id in after - before
    )
    reply = server.http.post("/api/import", files={"file": b"no zip"})
    assert reply.status_code == 400 and "nothing was imported" in reply.json()["error"]["message"]
    assert not list(server.app.state.server.library.folder.glob("export*"))


def test_a_deleted_chat_leaves_nothing(server: Served) -> None:
    chat = new_chat(server.url)
    ask(server.url, chat, "a secret")
    library: Library = server.app.state.server.library
    file = library.folder / "conversations" / "kv.sqlite"
    secret = array("q", server.model.tokenizer.encode("a secret")).tobytes()
    while secret not in file.read_bytes():
        time.sleep(0.02)
    assert server.http.delete(f"/api/chats/{chat}").status_code == 204
    assert secret not in file.read_bytes() and server.http.get(f"/api/chats/{chat}").status_code == 404
