"""/v1/contexts: uploads are read, and chats answered from them as Context.ask answers."""

import io
import zipfile
from pathlib import Path
from typing import Any

import pytest

import herd
from tests.server.served import Served, user

GATE = "The code of the north gate is 4711.\n"
QUESTION = "What is the code of the north gate?"


def upload(served: Served, id: str, files: dict[str, bytes], status: int = 200, **query: Any) -> dict[str, Any]:
    named = [("files", (name, io.BytesIO(data), "text/plain")) for name, data in files.items()]
    reply = served.http.post(f"/v1/contexts/{id}/sources", files=named, params=query)
    assert reply.status_code == status, reply.text
    return reply.json()


@pytest.fixture
def context(served: Served) -> str:
    """A context with two files."""
    made = served.ask("/v1/contexts", status=201, name="notes")
    assert made["object"] == "context" and made["tokens"] == 0
    report = upload(served, made["id"], {"gate.txt": GATE.encode(), "src/port.py": b"PORT = 8080\n"})
    assert report["sources"] == 2 and report["read_tokens"] == report["tokens"] > 0
    return str(made["id"])


def from_python(served: Served, id: str) -> herd.Context:
    server = served.app.state.server
    return herd.Context.open(server.library.context_folder(id) / "kv", served.model)


def test_answers_are_those_of_python(served: Served, context: str) -> None:
    answer = from_python(served, context).ask(QUESTION, max_tokens=80)
    body = {"messages": [user(QUESTION)], "context": context, "max_tokens": 80}
    message = served.ask(**body)["choices"][0]["message"]
    assert message["content"] == answer.text
    cited = [(c["source"], tuple(c["lines"]), c["weight"], c["context"]) for c in message["citations"]]
    assert cited == [(c.source, c.lines, c.weight, context) for c in answer.citations] and cited
    chunks = [chunk["choices"][0] for chunk in served.events(**body)]
    assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == answer.text
    assert chunks[-1]["delta"]["citations"] == message["citations"] and chunks[-1]["finish_reason"] == "stop"


def test_the_models_own_words(served: Served, context: str) -> None:
    answer = from_python(served, context).ask(QUESTION, max_tokens=12, quote=False)
    body = {"messages": [user(QUESTION)], "context": [context], "max_tokens": 12, "quote": False}
    said = served.ask(**body)
    ids = served.model.tokenizer.chat([user(QUESTION)])
    assert said["usage"]["prompt_tokens"] == len(ids)
    assert said["choices"][0]["message"]["content"] == answer.text
    assert said["choices"][0]["message"]["citations"]
    two = [user(QUESTION), {"role": "assistant", "content": "4711"}, user("And the south gate?")]
    more = served.ask(messages=two, context=context, max_tokens=12)
    assert more["usage"]["prompt_tokens"] == len(served.model.tokenizer.chat(two)), "the whole conversation is seen"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 0.5}, "temperature"),
        ({"stop": "x"}, "stop"),
        ({"n": 2}, "n"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"quote": True, "messages": [user("a"), {"role": "assistant", "content": "b"}, user("c")]}, "quote"),
    ],
)
def test_what_quotes_cannot_heed_is_refused(served: Served, context: str, fields: dict[str, Any], param: str) -> None:
    error = served.ask(**{"messages": [user(QUESTION)], "context": context, **fields}, status=400)["error"]
    assert error["param"] == param


def test_what_is_in_a_context(served: Served, context: str) -> None:
    shown = served.http.get(f"/v1/contexts/{context}").json()
    assert [file["name"] for file in shown["files"]] == ["gate.txt", "src/port.py"]
    assert sum(file["tokens"] for file in shown["files"]) == shown["tokens"]
    assert context in [its["id"] for its in served.http.get("/v1/contexts").json()["data"]]
    text = served.http.get(f"/v1/contexts/{context}/sources/src/port.py")
    assert text.text == "PORT = 8080\n"
    assert text.headers["content-type"].startswith("text/plain") and text.headers["content-disposition"] == "attachment"


def test_changes_are_seen_and_deletions(served: Served, context: str) -> None:
    report = upload(served, context, {"gate.txt": GATE.replace("4711", "4712").encode()})
    assert report["sources"] == 2 and report["reused_tokens"] > 0
    body = {"messages": [user(QUESTION)], "context": context, "max_tokens": 80}
    assert served.ask(**body)["choices"][0]["message"]["content"].endswith("4712.")
    assert served.http.delete(f"/v1/contexts/{context}/sources/gate.txt").json()["sources"] == 1
    assert served.http.delete(f"/v1/contexts/{context}/sources/gate.txt").status_code == 404
    assert served.http.delete(f"/v1/contexts/{context}").json()["deleted"] is True
    for reply in (
        served.http.get(f"/v1/contexts/{context}"),
        served.http.delete(f"/v1/contexts/{context}"),
        served.http.get(f"/v1/contexts/{context}/sources/gate.txt"),
        served.http.post("/v1/chat/completions", json=body),
    ):
        assert reply.status_code == 404 and reply.json()["error"]["code"] == "not_found"
    served.alive()


def test_reading_goes_on_while_nobody_waits(served: Served, context: str) -> None:
    info = upload(served, context, {"more.txt": b"More.\n" * 50}, wait=False)
    assert info["id"] == context
    for _ in range(1000):
        shown = served.http.get(f"/v1/contexts/{context}").json()
        if len(shown["files"]) == 3:
            break
        served.alive()
    assert [file["name"] for file in shown["files"]] == ["gate.txt", "more.txt", "src/port.py"]


@pytest.mark.parametrize(
    "name",
    [
        "../evil.txt",
        "a/../../evil.txt",
        "/etc/evil.txt",
        "..\\evil.txt",
        "a/\u200b.txt",
        "x" * 300,
        "/".join("a" * 40),
        "..",
    ],
)
def test_files_lie_nowhere_else(served: Served, context: str, name: str, tmp_path: Path) -> None:
    data = served.app.state.server.library.folder
    before = {path for path in data.rglob("*") if "kv" not in path.parts}
    error = upload(served, context, {name: b"evil\n"}, status=400)["error"]
    assert error["message"]
    assert {path for path in data.rglob("*") if "kv" not in path.parts} == before
    served.alive()


def test_files_that_are_not_read_are_listed(served: Served, context: str) -> None:
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("zeros", b"\0" * (1 << 24))
    loop = b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n2 0 obj<</Type/Pages/Kids[2 0 R]/Count 9>>endobj\n"
    loop += b"trailer<</Root 1 0 R/Prev 0>>\n%%EOF"
    report = upload(served, context, {"zip.bin": bomb.getvalue(), "loop.pdf": loop, "half.pdf": loop[:30]})
    assert {skip["name"] for skip in report["skipped"]} == {"zip.bin", "loop.pdf", "half.pdf"}
    assert all(skip["reason"] for skip in report["skipped"])
    served.alive()


def test_uploads_that_are_none(served: Served, context: str) -> None:
    path = f"/v1/contexts/{context}/sources"
    assert served.http.post(path, files=[("files", ("big", io.BytesIO(b"x" * (5 << 20))))]).status_code == 413
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="big"\r\n\r\n'
    pieces = iter([head, *[b"x" * (1 << 16)] * 80])  # without a length
    assert served.http.post(path, content=pieces, headers=form).status_code == 413
    for headers, body in (
        ({"Content-Type": "multipart/form-data"}, b"x"),
        ({"Content-Type": "multipart/form-data; boundary=x"}, b"--x\r\nContent-Disposition: form-data\r\n"),
        ({"Content-Type": "multipart/form-data; boundary=" + "x" * 1000}, b"--x"),
        ({"Content-Type": "application/json"}, b"{}"),
    ):
        reply = served.http.post(path, content=body, headers=headers)
        assert reply.status_code == 400, reply.text
    many = [("files", (f"{n}.txt", io.BytesIO(b"x"))) for n in range(1100)]
    error = served.http.post(path, files=many)
    assert error.status_code == 400 and "1000" in error.json()["error"]["message"]
    assert served.http.post("/v1/contexts/no/sources", files=many[:1]).status_code == 404
    served.alive()


@pytest.mark.parametrize(
    "body", [{}, {"name": ""}, {"name": "x" * 201}, {"name": "x", "kv": "int2"}, {"name": "x", "a": 1}]
)
def test_contexts_that_cannot_be_made(served: Served, body: dict[str, Any]) -> None:
    before = len(served.http.get("/v1/contexts").json()["data"])
    assert served.http.post("/v1/contexts", json=body).status_code == 400
    assert len(served.http.get("/v1/contexts").json()["data"]) == before


def test_names_are_text_whatever_they_hold(served: Served) -> None:
    """Stored as they are, and never sent as HTML."""
    name = "<img src=x onerror=alert(1)>.txt"
    made = served.ask("/v1/contexts", status=201, name=name)
    upload(served, made["id"], {name: GATE.encode()})
    shown = served.http.get(f"/v1/contexts/{made['id']}")
    assert shown.headers["content-type"] == "application/json" and shown.json()["files"][0]["name"] == name
    assert shown.headers["x-content-type-options"] == "nosniff"
