"""`herd serve` in a process of its own, which can be killed."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx


class ServerProcess:
    """One data folder, served at one address from start to start."""

    def __init__(self, model: Path, data: Path, *more: object) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=60)
        arguments = ["serve", model, "--data", data, "--port", port, *more]
        self._command = [sys.executable, "-m", "herd", *map(str, arguments)]
        self.start()

    def start(self) -> None:
        """Returns when requests are answered."""
        self.process = subprocess.Popen(self._command, env={**os.environ, "OMP_NUM_THREADS": "1"})
        while True:
            assert self.process.poll() is None, "the server ended"
            try:
                httpx.get(f"{self.url}/health")
                return
            except httpx.TransportError:
                time.sleep(0.1)

    def kill(self) -> None:
        """Without any chance to end well."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """By SIGTERM; its exit code."""
        self.process.terminate()
        return self.process.wait(30)


def new_chat(url: str, context: str | None = None) -> str:
    """The id of a new chat."""
    return str(httpx.post(f"{url}/api/chats", json={"context": context}).json()["id"])


def messages(url: str, chat: str) -> list[dict[str, Any]]:
    """The newest messages of a chat."""
    return list(httpx.get(f"{url}/api/chats/{chat}").json()["messages"])


def answer(url: str, chat: str) -> dict[str, Any]:
    """The last message of a chat, once it is written."""
    while (last := messages(url, chat)[-1])["state"] == "writing":
        time.sleep(0.02)
    return last


def ask(url: str, chat: str, content: str) -> dict[str, Any]:
    """What a chat is answered."""
    asked = httpx.post(f"{url}/api/chats/{chat}/messages", json={"content": content}, timeout=60)
    assert asked.status_code == 201, asked.text
    return answer(url, chat)
