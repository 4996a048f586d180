"""Herd beside llama.cpp, vLLM and transformers: same weights, same machine, alternating runs.

    python -m bench.side_by_side [--cases small-512,mid-4K] [--rounds 5] [--build build/bench] [--out FILE]

Nothing is measured if a peer that runs gives other log-probabilities than Herd for a tiny checkpoint. Finished cases
are kept in the build folder; a run that was interrupted goes on with the next one.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench import checkpoints, limits
from bench.peers import PEERS, SUBJECTS, Refused, Runner, python_of, versions
from bench.table import table
from herd.checkpoint.cria import cria_path

BITS8_AND_4 = ("herd int8", "llama.cpp Q8_0", "herd int4", "llama.cpp Q4_0")
ALL = ("herd bf16", "vllm bf16", "vllm bf16 eager", "transformers bf16", *BITS8_AND_4)
WARM_TOKENS = 1024
# Of log-probabilities in float32, where sums have another order. At a few positions two experts have all but the same
# score, and another one is chosen: of a thousand one may differ by more. All after the first chunk are thirteen.
AGREE, ODD = 2e-3, 1e-3
# vLLM switches the temperature of global layers off where its context length is shorter; that is no use here.
PARITY_TOKENS, PARITY_LENGTH = 8300, 33024
PARITY = {"vllm": {"dtype": "float32", "enforce_eager": True}, "llama.cpp": {"kv": "F32"}}


@dataclass(frozen=True)
class Case:
    """`sequences` prompts of `prompt` tokens are read, then `new` more tokens of each are made.

    alone: no other subject is loaded while one runs, so that each has all of the memory.
    """

    model: str
    sequences: int
    prompt: int
    new: int
    subjects: tuple[str, ...]
    alone: bool = False


CASES = {
    "small-512": Case("small", 1, 512, 64, ALL),
    "small-4K": Case("small", 1, 4096, 64, ALL),
    "small-16x": Case("small", 16, 128, 64, ALL),
    "mid-512": Case("mid", 1, 512, 64, BITS8_AND_4),
    "mid-4K": Case("mid", 1, 4096, 64, BITS8_AND_4),
    "mid-16K": Case("mid", 1, 16384, 32, BITS8_AND_4),
    "mid-16x": Case("mid", 16, 128, 64, ("vllm bf16", "vllm bf16 eager", *BITS8_AND_4)),
    "small-128K": Case("small", 1, 131072, 32, (*ALL, "herd context int8"), alone=True),
}


class Bench:
    """Where everything is, and how long a single run may take."""

    def __init__(self, build: Path, threads: int, limit: float) -> None:
        self.build, self.threads, self.limit = build, threads, limit
        self.pythons: dict[str, Path] = {}
        self.missing: dict[str, str] = {}

    def install(self, peers: Sequence[str]) -> None:
        for peer in peers:
            try:
                self.pythons[peer] = python_of(peer, self.build / "venvs")
            except Refused as reason:
                self.missing[peer] = f"not installed ({reason})"

    def start(self, peer: str, name: str) -> Runner:
        """Refused if the peer is not installed."""
        if peer in self.missing:
            raise Refused(self.missing[peer])
        return Runner(peer, self.pythons[peer], self.build / "logs" / f"{name.replace(' ', '-')}.log", self.threads)

    def model(self, name: str) -> str:
        return str(self.build / "models" / name)


def write_models(bench: Bench, names: Sequence[str]) -> None:
    root = bench.build / "models"
    root.mkdir(parents=True, exist_ok=True)
    for name in names:
        cfg = checkpoints.MODELS[name]
        plain = name == "tiny"
        dtype, kinds = (torch.float32, ("F32",)) if plain else (torch.bfloat16, ("Q8_0", "Q4_0"))
        companions = None if plain else cria_path()
        say(f"model {name}: {cfg.num_parameters():,} parameters, {cfg.num_parameters(active=True):,} active")
        folder = checkpoints.write_folder(cfg, root / name, companions=companions, dtype=dtype)
        for kind in kinds:
            checkpoints.write_gguf(folder, root / f"{name}-{kind}.gguf", kind)


def check_parity(bench: Bench) -> dict[str, Any]:
    """How each peer's log-probabilities of a text differ from Herd's. SystemExit if they do by too much."""
    ids = random.Random(0).choices(range(64, checkpoints.TINY.vocab_size), k=PARITY_TOKENS)
    found: dict[str, Any] = {}
    for peer in PEERS:
        settings = {"dtype": "float32", **PARITY.get(peer, {})} if peer != "llama.cpp" else PARITY[peer]
        path = bench.model("tiny-F32.gguf" if peer == "llama.cpp" else "tiny")
        runner = None
        try:
            runner = bench.start(peer, f"parity {peer}")
            runner.ask(
                bench.limit, "load", path=path, threads=bench.threads, length=PARITY_LENGTH, sequences=1, **settings
            )
            found[peer] = runner.ask(bench.limit, "logprobs", ids=ids)["logprobs"]
        except Refused as reason:
            found[peer] = str(reason)
        finally:
            if runner is not None:
                runner.stop()
    herd = found.pop("herd")
    return {peer: _difference(peer, herd, other) for peer, other in found.items()}


def _difference(peer: str, herd: list[float], other: list[float] | str) -> dict[str, float] | str:
    if isinstance(other, str):
        say(f"{peer} gives no log-probabilities: {other}")
        return other
    differences = [abs(a - b) for a, b in zip(herd, other, strict=True)]
    odd = sum(not x < AGREE for x in differences) / len(differences)
    typical = statistics.median(differences)
    say(f"{peer} agrees with Herd: median difference {typical:.1e}, above {AGREE} at {odd:.2%} of positions")
    if odd > ODD:
        sys.exit(f"{peer} computes something else than Herd: {odd:.1%} of log-probabilities differ by over {AGREE}")
    return {"median": typical, "share_above": odd, "above": AGREE}


def measure(bench: Bench, title: str, case: Case, rounds: int) -> dict[str, Any]:
    """All runs of a case: one of each subject in turn, `rounds` times. Who refuses is known from then on by the reason.

    A subject is loaded and warmed up before its first run or, alone, before each. What the machine can do at most
    changes from hour to hour, so it is measured in each round, too.
    """
    found: dict[str, dict[str, Any]] = {name: {"runs": []} for name in case.subjects}
    peaks: list[dict[str, float]] = []
    runners: dict[str, Runner] = {}
    try:
        for name in () if case.alone else case.subjects:
            _guarded(found, runners, name, lambda name=name: _load(bench, case, name, runners))
        for i in range(rounds):
            peaks.append(limits.measure(bench.threads))
            for name in [name for name in case.subjects if "runs" in found[name]]:
                if case.alone:
                    _guarded(found, runners, name, lambda name=name: _load(bench, case, name, runners))
                if name in runners:
                    _guarded(found, runners, name, lambda name=name: _run(bench, case, runners[name]))
                if case.alone and name in runners:
                    runners.pop(name).stop()
                if run := found[name].get("runs", [])[i:]:
                    say(f"{title} {i + 1}/{rounds} {name}: {run[0]['prefill_s']:.2f} s + {run[0]['decode_s']:.2f} s")
    finally:
        for runner in runners.values():
            runner.stop()
    most = {what: statistics.median(peak[what] for peak in peaks) for what in peaks[0]}
    return {**asdict(case), "limits": most, "subjects": found}


def _guarded(found: dict[str, Any], runners: dict[str, Runner], name: str, call: Callable[[], dict[str, Any]]) -> None:
    """Keep what the call brings; a subject that refuses is stopped."""
    try:
        answer = call()
        found[name]["peak_gb"] = answer.pop("peak_gb")
        if "settings" in answer:
            found[name]["settings"] = answer["settings"]
        else:
            found[name]["runs"].append(answer)
    except Refused as reason:
        say(f"{name} cannot: {reason}")
        found[name] = {"refused": str(reason)}
        if name in runners:
            runners.pop(name).stop()


def _load(bench: Bench, case: Case, name: str, runners: dict[str, Runner]) -> dict[str, Any]:
    subject = SUBJECTS[name]
    runners[name] = bench.start(subject.peer, f"{case.model} {name}")
    length = -(-(case.prompt + case.new + 256) // 256) * 256
    path = bench.model(case.model + subject.suffix)
    shape = {"length": length, "sequences": case.sequences, "threads": bench.threads}
    loaded = runners[name].ask(bench.limit, "load", path=path, **shape, **subject.settings)
    prompt = min(case.prompt, WARM_TOKENS)
    runners[name].ask(bench.limit, "run", sequences=case.sequences, prompt=prompt, new=min(case.new, 8))
    return loaded


def _run(bench: Bench, case: Case, runner: Runner) -> dict[str, Any]:
    return runner.ask(bench.limit, "run", sequences=case.sequences, prompt=case.prompt, new=case.new)


def machine(threads: int) -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return {"processor": name, "cores": os.cpu_count(), "threads": threads, "memory_gb": round(memory, 1)}


def say(text: str) -> None:
    print(text, flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help="which, with commas between (default: all)")
    parser.add_argument("--peers", default=",".join(PEERS), help="which, with commas between (default: all)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--limit", type=float, default=1800, help="seconds that a single run may take")
    parser.add_argument("--build", type=Path, default=Path("build/bench"), help="models, environments, unfinished runs")
    parser.add_argument("--out", type=Path, default=Path("bench/results/side-by-side.json"))
    options = parser.parse_args(arguments)
    options.cases, options.peers = options.cases.split(","), options.peers.split(",")
    if unknown := [x for x in options.cases if x not in CASES] + [x for x in options.peers if x not in PEERS]:
        parser.error(f"unknown: {', '.join(unknown)}; cases are {', '.join(CASES)}; peers are {', '.join(PEERS)}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    bench = Bench(options.build, options.threads, options.limit)
    bench.missing = dict.fromkeys(PEERS.keys() - set(options.peers), "left out by --peers")
    bench.install([peer for peer in PEERS if peer in options.peers])
    write_models(bench, ["tiny", *sorted({CASES[title].model for title in options.cases})])
    unfinished = options.build / "unfinished.json"
    head = {"rounds": options.rounds, "machine": machine(options.threads)}
    kept = json.loads(unfinished.read_text()) if unfinished.exists() else {}
    if any(kept.get(key) != value for key, value in head.items()):
        kept = {**head, "versions": {peer: versions(peer, python) for peer, python in bench.pythons.items()}}
        kept |= {"parity": check_parity(bench), "cases": {}}
    for title in options.cases:
        if title not in kept["cases"]:
            say(f"{title}: {CASES[title]}")
            kept["cases"][title] = measure(bench, title, CASES[title], options.rounds)
            unfinished.write_text(json.dumps(kept, indent=1))
    kept["command"] = "python -m bench.side_by_side " + " ".join(sys.argv[1:] if arguments is None else arguments)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(kept, indent=1) + "\n")
    unfinished.unlink(missing_ok=True)
    say(table(kept["cases"]))


if __name__ == "__main__":
    main()
