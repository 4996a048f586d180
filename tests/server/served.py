"""A server of a tiny model on a free port, in this process."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

import herd
from herd.server.app import create_app
from herd.server.library import Library
from herd.server.service import Service
from herd.server.state import Settings


@dataclass(frozen=True)
class Served:
    """Where a server is, and what it runs."""

    url: str
    port: int
    model: herd.Model
    app: FastAPI
    service: Service
    http: httpx.Client

    def ask(self, path: str = "/v1/chat/completions", status: int = 200, **body: Any) -> dict[str, Any]:
        """The JSON of the reply to a JSON body; the status must be this one."""
        reply = self.http.post(path, json=body)
        assert reply.status_code == status, reply.text
        return reply.json()

    def events(self, path: str = "/v1/chat/completions", **body: Any) -> list[dict[str, Any]]:
        """What a stream says, which must end as OpenAI's do."""
        with self.http.stream("POST", path, json={**body, "stream": True}) as reply:
            assert reply.status_code == 200, reply.read()
            assert reply.headers["content-type"].startswith("text/event-stream")
            lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]

    def alone(self, text: str, max_tokens: int) -> str:
        """What the model says greedily to one message, asked from Python."""
        ids = self.model.tokenizer.chat([{"role": "user", "content": text}])
        return self.model.generate(ids, max_tokens=max_tokens).text

    def alive(self) -> None:
        """Fails unless it answers as ever."""
        said = self.ask(messages=[user("Still there?")], max_tokens=3, temperature=0)
        assert said["choices"][0]["message"]["content"] == self.alone("Still there?", 3)


def user(content: Any) -> dict[str, Any]:
    """A message of the user."""
    return {"role": "user", "content": content}


@contextmanager
def serving(
    model: herd.Model, data: Path, *, keys: tuple[str, ...] = (), service: Service | None = None, **limits: Any
) -> Iterator[Served]:
    """A server while the block runs. service: what answers, which somebody else closes; limits: those of `Service` if
    there is none, and max_body and max_upload of `Settings`."""
    sizes = {name: limits.pop(name) for name in ("max_body", "max_upload") if name in limits}
    mine = service is None
    service = service or Service(model, memory=limits.pop("memory", 1 << 26), **limits)
    library = Library(data)
    app = create_app(service, library, Settings("tiny", api_keys=keys, **sizes))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        config = uvicorn.Config(
            app, log_level="error", loop="asyncio", http="h11", ws="none", timeout_graceful_shutdown=5
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.005)
        url = f"http://127.0.0.1:{port}"
        headers = {"Authorization": f"Bearer {keys[0]}"} if keys else {}
        try:
            with httpx.Client(base_url=url, headers=headers, timeout=60) as http:
                yield Served(url, port, model, app, service, http)
        finally:
            server.should_exit = True
            thread.join()
            if mine:
                service.close()
            library.close()
