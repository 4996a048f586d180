"""Each class of hostile request gets a clear 4xx, and the server answers as ever afterwards."""

import base64
import io
import json
import socket
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image

import herd
from herd.server import security
from tests.server.served import Served, serving, user

TURN = [user("What is a herd?")]


@pytest.fixture(scope="module")
def locked(model: herd.Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with two keys."""
    with serving(model, tmp_path_factory.mktemp("locked"), keys=("first-key", "second-key")) as it:
        yield it


def refused(reply: httpx.Response, status: int) -> str:
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return str(error["message"])


def test_every_route_needs_the_key(locked: Served) -> None:
    with httpx.Client(base_url=locked.url) as nobody:
        paths = httpx.get(f"{locked.url}/openapi.json", headers=locked.http.headers).json()["paths"]
        assert len(paths) >= 12
        paths |= {path: ["get"] for path in ("/openapi.json", "/", "/nothing")}
        for path, methods in paths.items():
            for method in methods:
                reply = nobody.request(method, path.replace("{id}", "x").replace("{name}", "x"))
                assert "API key" in refused(reply, 401), (method, path)
        for wrong in ("Bearer first-ke", "Bearer first-keyy", "Bearer", "first-key", "Basic !", "Bearer ü"):
            refused(nobody.get("/v1/models", headers={"Authorization": wrong.encode()}), 401)
        for right in ("Bearer second-key", "Basic " + base64.b64encode(b"me:first-key").decode()):
            assert nobody.get("/v1/models", headers={"Authorization": right}).status_code == 200
    locked.alive()


def test_keys_do_not_share_what_was_seen(locked: Served) -> None:
    """Nobody learns by the time or the count whether another one asked the same."""
    said = locked.ask(messages=[user("Count the goats.")], max_tokens=12, temperature=0)
    text = said["choices"][0]["message"]["content"]
    turns = [user("Count the goats."), {"role": "assistant", "content": text}, user("b")]
    other = {"Authorization": "Bearer second-key"}
    body = {"messages": turns, "max_tokens": 3, "temperature": 0}
    theirs = locked.http.post("/v1/chat/completions", json=body, headers=other).json()
    assert theirs["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    mine = locked.ask(**body)
    assert mine["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert mine["choices"][0]["message"] == theirs["choices"][0]["message"]


def test_other_names_and_origins_are_refused(served: Served) -> None:
    others = ("evil.example", "127.0.0.1.evil.example", "localhost@evil.example", "10.0.0.1", "0.0.0.0", "[::2]:1")
    for host in (*others, "a b"):
        reply = served.http.get("/v1/models", headers={"Host": host})
        assert reply.status_code in (400, 403), host
    for host in ("localhost", "LOCALHOST:99", "127.0.0.1:1", "[::1]:8000"):
        assert served.http.get("/v1/models", headers={"Host": host}).status_code == 200
    for origin in ("http://evil.example", "null", "http://localhost.evil.example", f"http://localhost:{served.port}"):
        message = refused(served.http.post("/v1/chat/completions", json={}, headers={"Origin": origin}), 403)
        assert "may not ask" in message
    own = served.http.get("/v1/models", headers={"Origin": served.url})
    assert own.status_code == 200
    assert not any(name.startswith("access-control") for name in own.headers), "no CORS"
    assert own.headers["x-content-type-options"] == "nosniff" and "content-security-policy" in own.headers
    preflight = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    refused(served.http.options("/v1/chat/completions", headers=preflight), 403)
    served.alive()


def test_large_and_deep_bodies(served: Served) -> None:
    big = json.dumps({"messages": [user("x" * (1 << 20))]})
    refused(served.http.post("/v1/chat/completions", content=big), 413)
    # In pieces, without a length.
    refused(served.http.post("/v1/chat/completions", content=iter([b"[" * 1000] * 2000)), 413)
    for deep in ("[" * 100_000, '{"a":' * 1000 + "1" + "}" * 1000, '{"messages": ' + "[" * 70 + "]" * 70 + "}"):
        reply = served.http.post("/v1/chat/completions", content=deep, headers={"Content-Type": "application/json"})
        assert "nested" in refused(reply, 400)
    # Brackets in texts are no nesting.
    text = served.ask(messages=[user("[" * 1000 + '"\\"[')], max_tokens=1)
    assert text["usage"]["completion_tokens"] == 1
    served.alive()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"null",
        b"[]",
        b'"x"',
        b"1" * 5000,
        b'{"messages": 1}',
        b'{"messages": [{}]}',
        b"{'a': 1}",
    ],
)
def test_bodies_that_are_none(served: Served, body: bytes) -> None:
    reply = served.http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    refused(reply, 400)
    served.alive()


def test_half_a_surrogate_pair_is_text(served: Served) -> None:
    body = b'{"messages": [{"role": "user", "content": "\\ud800"}], "max_tokens": 2, "stop": ["\\udfff"]}'
    reply = served.http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code in (200, 400), reply.text
    served.alive()


def data_url(data: bytes, kind: str = "png") -> dict[str, object]:
    url = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def png(width: int, height: int) -> bytes:
    """A picture of one colour, whose file is small whatever its size."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = zlib.compress(b"\0" * 1000)
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/meta-data",
        "https://example.com/a.png",
        "file:///etc/passwd",
        "/etc/passwd",
        "data:text/html;base64,AAAA",
        "data:image/png;base64,!!!",
        "data:image/png;base64,AAAA",
        "",
    ],
)
def test_nothing_is_fetched(served: Served, url: str) -> None:
    part = {"type": "image_url", "image_url": {"url": url}}
    refused(served.http.post("/v1/chat/completions", json={"messages": [user([part])]}), 400)
    served.alive()


def test_images_that_are_bombs(served: Served) -> None:
    for bomb in (png(100_000, 100_000), png(60_000, 60_000)[:60], png(1 << 30, 1 << 30)):
        refused(served.http.post("/v1/chat/completions", json={"messages": [user([data_url(bomb)])]}), 400)
    large = {"messages": [user([data_url(png(9000, 9000))])]}
    assert "9,000 × 9,000" in refused(served.http.post("/v1/chat/completions", json=large), 400)
    out = io.BytesIO()
    Image.new("RGB", (4, 4)).save(out, "PNG")
    many = [data_url(out.getvalue())] * 17
    assert "17" in refused(served.http.post("/v1/chat/completions", json={"messages": [user(many)]}), 400)
    # This model has no image encoder, so a good one is refused, too, but for that.
    assert "no image encoder" in refused(
        served.http.post("/v1/chat/completions", json={"messages": [user([data_url(out.getvalue())])]}), 400
    )
    served.alive()


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "(a+)+$" * 50},
        {"type": "string", "pattern": "(?=a)b"},
        {"$ref": "#"},
        {"$ref": "http://169.254.169.254/schema"},
        {"$ref": "file:///etc/passwd"},
        {"allOf": [{"anyOf": [{"const": i} for i in range(300)]}] * 12},
        {"enum": ["x" * 100_000, "y" * 100_000]},
        {"type": "goat"},
        {"type": "string", "minLength": 5, "maxLength": 2},
        False,
    ],
)
def test_schemas_that_are_bombs(served: Served, schema: object) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = {"messages": TURN, "response_format": form, "max_tokens": 4}
    refused(served.http.post("/v1/chat/completions", json=body), 400)
    served.alive()


def talk(port: int, said: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
        raw.sendall(said)
        heard = b""
        while piece := raw.recv(65536):
            heard += piece
            if b"\r\n\r\n" in heard:
                break
        return heard


@pytest.mark.parametrize(
    "head",
    [
        b"Host: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n{}",
        b"Host: localhost\r\nContent-Length: -1\r\n\r\n{}",
        b"Host: localhost\r\nContent-Length: 1e3\r\n\r\n{}",
        b"Host: localhost\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        b"Host: localhost\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"Host: localhost\r\nHost: evil.example\r\nContent-Length: 0\r\n\r\n",
        b"Host : localhost\r\nContent-Length: 0\r\n\r\n",
        b"Content-Length: 0\r\n\r\n",
        b"Host: localhost\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
    ],
)
def test_requests_that_are_two(served: Served, head: bytes) -> None:
    heard = talk(served.port, b"POST /v1/chat/completions HTTP/1.1\r\n" + head)
    assert heard.startswith(b"HTTP/1.1 4"), heard
    served.alive()


def test_bodies_that_never_end(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(security, "PIECE_S", 0.2)
    for kind in (b"application/json", b"multipart/form-data; boundary=x"):
        head = b"Host: localhost\r\nContent-Type: " + kind + b"\r\nContent-Length: 100\r\n\r\n-"
        heard = talk(served.port, b"POST /v1/contexts/x/sources HTTP/1.1\r\n" + head)
        assert heard.startswith(b"HTTP/1.1 408"), heard
    served.alive()


def test_paths_lead_nowhere_else(served: Served, tmp_path: Path) -> None:
    paths = ("/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd", "/v1/contexts/..%2f..%2fherd.sqlite")
    for path in paths:
        heard = talk(served.port, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        assert heard.startswith(b"HTTP/1.1 404"), heard
    served.alive()
