"""`herd serve` in a process of its own, for measurements: started, watched and stopped."""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

START_S, STOP_S = 600, 90
_FIELDS = {"VmRSS": "resident", "RssAnon": "own", "VmHWM": "peak"}


@dataclass(frozen=True)
class Process:
    """A server that answers at `url`; log: what it says on stderr."""

    url: str
    log: Path
    popen: subprocess.Popen[bytes]

    @property
    def exit_code(self) -> int | None:
        """None while it lives."""
        return self.popen.poll()

    def memory(self) -> dict[str, int]:
        """Bytes: in memory, of these not backed by files, and the most that ever were in memory; none if it is gone."""
        try:
            lines = Path(f"/proc/{self.popen.pid}/status").read_text().splitlines()
        except OSError:
            return {}
        values = dict(line.split(":", 1) for line in lines)
        return {ours: int(values[name].split()[0]) * 1024 for name, ours in _FIELDS.items() if name in values}


@contextmanager
def serving(*arguments: str, keys: Sequence[str] = ()) -> Iterator[Process]:
    """A server at a free port with a data folder of its own, from when it answers to the end of the block.

    SystemExit if it does not start. arguments: of `herd serve`.
    """
    with tempfile.TemporaryDirectory(prefix="herd-bench-") as folder:
        log, more = Path(folder) / "log", list(arguments)
        if keys:
            (Path(folder) / "keys").write_text("\n".join(keys))
            more += ["--api-key-file", f"{folder}/keys"]
        command = [sys.executable, "-m", "herd", "serve", *more, "--port", "0", "--data", f"{folder}/data"]
        environment = {name: value for name, value in os.environ.items() if name != "HERD_API_KEY"}
        with log.open("wb") as said:
            popen = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said, env=environment)
        try:
            yield Process(_url(popen, log), log, popen)
        finally:
            _stop(popen)


def _url(popen: subprocess.Popen[bytes], log: Path) -> str:
    for _ in range(START_S * 10):
        found = re.search(r"http://\S+", log.read_text())
        if found:
            return found[0]
        if popen.poll() is not None:
            break
        time.sleep(0.1)
    sys.exit(f"herd serve did not start: {log.read_text()[-2000:]}")


def _stop(popen: subprocess.Popen[bytes]) -> None:
    """By SIGTERM, or at last without asking."""
    popen.terminate()
    try:
        popen.wait(STOP_S)
    except subprocess.TimeoutExpired:
        popen.kill()
        popen.wait()
