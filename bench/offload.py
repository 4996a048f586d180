"""A model bigger than memory: Herd beside llama.cpp, with the same weights under the same hard limit of memory.

    python -m bench.offload [--rounds 3] [--share 4] [--build build/bench] [--out FILE]

The limit is a control group's (Linux, as root), a quarter of the GGUF file by default; it counts the page cache, too.
Before each run no part of the files is in memory. llama.cpp maps its file. It is run with several numbers of threads,
since those that wait for the disk do not compute, and while it runs the disk's readahead is Linux's usual 128 KiB: with
the 8 MiB of some virtual machines it is several times slower. Herd reads past both. The checkpoint takes 27 GB of disk
in the build folder; it is there until you remove it.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.offload_model import SCOUT_LIKE, write
from bench.peers import Refused, Runner, python_of, versions
from bench.side_by_side import machine, say
from herd.checkpoint import fingerprint

PROMPT, NEW, LONG = 16, 24, 512  # tokens: of a short prompt, made after it, and of a long prompt
LENGTH, LIMIT_S, READAHEAD_KIB = 1024, 1800, 128
PARITY = [(7 * i * i + 11 * i) % SCOUT_LIKE.vocab_size for i in range(40)]
MAPPED = {"mapped": True}
SUBJECTS: dict[str, tuple[str, int, dict[str, Any]]] = {  # peer, threads, settings
    "herd": ("herd", 2, {}),
    "llama.cpp": ("llama.cpp", 2, MAPPED),
    "llama.cpp 8 threads": ("llama.cpp", 8, MAPPED),
}


class Group:
    """A control group inside that of this process, with a limit of memory. Of version 1 or 2."""

    def __init__(self, limit: int) -> None:
        self._parent, new = _own_group()
        self.path = self._parent / f"herd-bench-{os.getpid()}"
        names = ("memory.max", "memory.peak") if new else ("memory.limit_in_bytes", "memory.max_usage_in_bytes")
        try:
            self.path.mkdir()
            (self.path / names[0]).write_text(str(limit))
        except OSError as error:
            sys.exit(f"cannot limit memory: {error}; this needs the right to make control groups in {self._parent}")
        self._peak = self.path / names[1]

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Processes that are started here belong to it."""
        (self.path / "cgroup.procs").write_text(str(os.getpid()))
        try:
            yield
        finally:
            (self._parent / "cgroup.procs").write_text(str(os.getpid()))

    @property
    def peak_gb(self) -> float:
        """The most memory that was counted, page cache included."""
        return int(self._peak.read_text()) / 1e9

    def remove(self) -> None:
        for _ in range(50):
            try:
                self.path.rmdir()
                return
            except OSError:  # its processes are just ending
                time.sleep(0.1)


def _own_group() -> tuple[Path, bool]:
    """Where this process's group stands, and whether it is of version 2."""
    root = Path("/sys/fs/cgroup")
    lines = (line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines())
    groups = {controllers: path.strip("/") for _, controllers, path in lines}
    if (root / "memory").is_dir() and "memory" in groups:
        return root / "memory" / groups["memory"], False
    return root / groups.get("", ""), True


def forget(paths: Sequence[Path]) -> None:
    """Drop files from the page cache, which would be free memory for whoever reads them next."""
    for path in paths:
        with path.open("rb+") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def readahead(path: Path, kib: int) -> Iterator[None]:
    """Of the disk that a file is on."""
    device = os.stat(path).st_dev
    node = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    setting = next(place / "queue" / "read_ahead_kb" for place in (node, node.parent) if (place / "queue").is_dir())
    usual = setting.read_text()
    try:
        setting.write_text(str(kib))
        yield
    except PermissionError as error:
        sys.exit(f"cannot set the readahead of the disk: {error}; this needs to be root")
    finally:
        setting.write_text(usual)


class Bench:
    def __init__(self, build: Path) -> None:
        self.folder, self.gguf = build / "models" / "offload", build / "models" / "offload-Q4_0.gguf"
        self._build = build
        self.pythons = {peer: python_of(peer, build / "venvs") for peer in ("herd", "llama.cpp")}

    @property
    def files(self) -> list[Path]:
        return [*self.folder.glob("*.safetensors"), self.gguf]

    def start(self, name: str, **more: Any) -> Runner:
        """With the model loaded."""
        peer, threads, settings = SUBJECTS[name]
        path = self.folder if peer == "herd" else self.gguf
        runner = Runner(
            peer, self.pythons[peer], self._build / "logs" / f"offload-{name.replace(' ', '-')}.log", threads
        )
        shape = {"length": LENGTH, "sequences": 1, "threads": threads}
        runner.ask(LIMIT_S, "load", path=str(path), **shape, **settings, **more)
        return runner

    def limited(self, name: str, limit: int) -> dict[str, Any]:
        """One subject's run under the limit, from loading to its end."""
        with readahead(self.gguf, READAHEAD_KIB):
            return self._limited(name, limit)

    def _limited(self, name: str, limit: int) -> dict[str, Any]:
        forget(self.files)
        group, runner, found = Group(limit), None, dict[str, Any]()
        try:
            begun = time.perf_counter()
            with group.inside():
                runner = self.start(name)
            found["load_s"] = time.perf_counter() - begun
            runner.ask(LIMIT_S, "run", sequences=1, prompt=PROMPT, new=4)
            before = runner.ask(LIMIT_S, "experts") if name == "herd" else {}
            found["short"] = runner.ask(LIMIT_S, "run", sequences=1, prompt=PROMPT, new=NEW)
            after = runner.ask(LIMIT_S, "experts") if name == "herd" else {}
            found["experts"] = {key: after[key] - before[key] for key in after if key != "peak_gb"}
            found["long"] = runner.ask(LIMIT_S, "run", sequences=1, prompt=LONG, new=1)
            found["logprobs"] = runner.ask(LIMIT_S, "logprobs", ids=PARITY)["logprobs"]
            found["group_peak_gb"] = group.peak_gb
        finally:
            if runner is not None:
                runner.stop()
            group.remove()
        short, long = found["short"], found["long"]
        rates = {"decode": NEW / short["decode_s"], "prefill": LONG / long["prefill_s"]}
        say(f"{name}: {rates['decode']:.2f} tokens/s, prefill {rates['prefill']:.1f}, {found['group_peak_gb']:.2f} GB")
        return {**found, **{f"{key}_tokens_per_s": rate for key, rate in rates.items()}}

    def in_memory(self) -> list[float]:
        """Log-probabilities by Herd with all of the model in memory."""
        runner = self.start("herd", memory="1T")
        found: list[float] = runner.ask(LIMIT_S, "logprobs", ids=PARITY)["logprobs"]
        runner.stop()
        return found


def summary(runs: dict[str, list[dict[str, Any]]], whole: list[float]) -> dict[str, Any]:
    """Medians, how much faster Herd is than the fastest other, and whether it computes the same as in memory."""
    keys = ("decode_tokens_per_s", "prefill_tokens_per_s", "group_peak_gb", "load_s")
    medians = {name: {key: statistics.median(run[key] for run in some) for key in keys} for name, some in runs.items()}
    others = [name for name in runs if name != "herd"]
    times = {
        key: medians["herd"][key] / max(medians[name][key] for name in others)
        for key in ("decode_tokens_per_s", "prefill_tokens_per_s")
    }
    off = [abs(a - b) for a, b in zip(whole, runs[others[0]][0]["logprobs"], strict=True)]
    return {
        "medians": medians,
        "times_as_fast": times,
        "same_as_in_memory": all(run["logprobs"] == whole for run in runs["herd"]),
        "logprobs_off_llama_cpp": {"median": statistics.median(off), "largest": max(off)},
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--share", type=float, default=4, help="of the GGUF file that the limit is")
    parser.add_argument("--build", type=Path, default=Path("build/bench"), help="checkpoint, environments, logs")
    parser.add_argument("--out", type=Path, default=Path("bench/results/offload.json"))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    bench = Bench(options.build)
    bench.folder.parent.mkdir(parents=True, exist_ok=True)
    write(SCOUT_LIKE, bench.folder, bench.gguf)
    fingerprint(bench.folder)  # is kept beside it, so that no run has to read all of it for that
    sizes = {"herd": sum(path.stat().st_size for path in bench.files[:-1]), "gguf": bench.gguf.stat().st_size}
    limit = int(sizes["gguf"] / options.share)
    parameters, active = SCOUT_LIKE.num_parameters(), SCOUT_LIKE.num_parameters(active=True)
    say(f"{parameters:,} parameters, {active:,} active; bytes {sizes}, limit {limit:,}")
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in SUBJECTS}
    for _ in range(options.rounds):
        for name in SUBJECTS:
            try:
                runs[name].append(bench.limited(name, limit))
            except Refused as reason:
                sys.exit(f"{name} does not run under {limit:,} bytes: {reason}")
    found = {
        "command": "python -m bench.offload " + " ".join(sys.argv[1:] if arguments is None else arguments),
        "machine": machine(2),
        "versions": {peer: versions(peer, python) for peer, python in bench.pythons.items()},
        "parameters": parameters,
        "active": active,
        "bytes": sizes,
        "limit": limit,
        "readahead_kib": READAHEAD_KIB,
        "summary": summary(runs, bench.in_memory()),
        "runs": runs,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    say(json.dumps(found["summary"], indent=1))


if __name__ == "__main__":
    main()
