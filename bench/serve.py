"""What serving costs: many clients at once beside the engine alone, JSON that keeps to a schema, and cancellations.

    python -m bench.serve [--rounds 5] [--clients 16] [--cancel 1000] [--out bench/results/serve.json]

- *Serving*: the same prompts, greedily to the same tokens, go through `Engine` in this process and through
  `herd serve` in another one, from as many clients at once (streamed), by turns. Tokens a second, all in all: medians.
- *Schemas*: answers that keep to a JSON schema, made by the engine. What the guides take (mask, bias, matching) as a
  share of the rest of the steps that make tokens: one answer at a time, and as many as there are clients.
- *Cancellations*: clients that ask for a long answer and go when the first token is there. It must end within one step:
  counted are the tokens that were made and that the client did not hear, and the time until nothing runs, looked for
  every 2 ms from when the connection is closed. The server's memory must not grow: that after the first quarter and
  after the last are compared. What was said is kept for others to begin with, as far as there is memory for keys and
  values; this server has little, which is full by then.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import re
import socket
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
from torch import Tensor

import herd
from bench.overload_report import quantiles
from bench.server import Process, serving
from herd import kernels
from herd.engine import Engine, Request, Sampler, stream
from herd.eval.corpus import package_files
from herd.model import KVRow
from herd.server.structured import Grammars, Guided

ANSWER, JSON_ANSWER, SETTLE_S = 64, 96, 5.0
LITTLE = "128M"  # for two answers as long as those that are cancelled
SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 60},
        "kind": {"enum": ["book", "atlas", "map"]},
        "year": {"type": "integer", "minimum": 1400, "maximum": 2100},
        "authors": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 4},
        "summary": {"type": "string"},
    },
    "required": ["title", "kind", "year", "authors", "summary"],
    "additionalProperties": False,
}


def contents(count: int) -> list[str]:
    """What clients say: pieces of real files, each another one."""
    files = [file.text for file in package_files(("email", "asyncio")) if len(file.text) > 4000]
    return [f"Explain this code.\n\n{files[n % len(files)][n * 40 : n * 40 + 500]}" for n in range(count)]


def by_engine(model: herd.Model, prompts: Sequence[list[int]]) -> tuple[int, float]:
    """Tokens, and seconds that they took."""
    engine, began = Engine(model.transformer), time.perf_counter()
    for ids in prompts:
        engine.submit(Request(ids, ANSWER, eos_ids=model.tokenizer.eos_ids))
    return sum(1 for _ in stream(engine)), time.perf_counter() - began


async def by_server(url: str, texts: Sequence[str]) -> tuple[int, float]:
    """The same through the server, streamed."""

    async def ask(text: str) -> int:
        turns = [{"role": "user", "content": text}]
        body = {"messages": turns, "max_tokens": ANSWER, "temperature": 0, "stream": True}
        # Read from a plain connection and looked at when all is there: what clients do with it takes of the processors
        # that answer.
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]), limit=1 << 20)
        writer.write(chat_request(url, {**body, "stream_options": {"include_usage": True}}))
        said = (await reader.readuntil(b"data: [DONE]")).decode()
        writer.close()
        return int(re.findall(r'"completion_tokens":(\d+)', said)[-1])

    began = time.perf_counter()
    tokens = sum(await asyncio.gather(*map(ask, texts)))
    return tokens, time.perf_counter() - began


def chat_request(url: str, body: dict[str, Any]) -> bytes:
    """The bytes of a request."""
    request = httpx.Request("POST", f"{url}/v1/chat/completions", json=body)
    lines = [b"POST /v1/chat/completions HTTP/1.1", *(b"%b: %b" % pair for pair in request.headers.raw)]
    return b"\r\n".join(lines) + b"\r\n\r\n" + request.read()


def throughput(model: herd.Model, process: Process, clients: int, rounds: int) -> dict[str, Any]:
    found: dict[str, list[float]] = {"engine": [], "server": []}
    made: dict[str, int] = {}
    for number in range(rounds + 1):  # the first warms up
        texts = [f"# {number}\n{text}" for text in contents(clients)]  # so that none begins as one before
        prompts = [model.tokenizer.chat([{"role": "user", "content": text}]) for text in texts]
        for name in ("engine", "server"):
            tokens, seconds = (
                by_engine(model, prompts) if name == "engine" else asyncio.run(by_server(process.url, texts))
            )
            made[name] = tokens
            if number:
                found[name].append(round(tokens / seconds, 1))
        if abs(made["engine"] - made["server"]) > 0.1 * made["engine"]:
            sys.exit(f"engine and server do not make the same: {made}")
    medians = {name: statistics.median(values) for name, values in found.items()}
    share = round(medians["server"] / medians["engine"], 3)
    return {"clients": clients, "tokens_per_s": found, "medians": medians, "share": share, "holds": share >= 0.8}


class Timed:
    """A guide, and the seconds that it takes."""

    def __init__(self, guide: Callable[[Sequence[int], Tensor, KVRow], Tensor]) -> None:
        self._guide, self.seconds = guide, 0.0

    def __call__(self, ids: Sequence[int], logits_V: Tensor, row: KVRow) -> Tensor:
        began = time.perf_counter()
        try:
            return self._guide(ids, logits_V, row)
        finally:
            self.seconds += time.perf_counter() - began


def masks(model: herd.Model, rows: int, rounds: int) -> dict[str, Any]:
    """Guides beside the rest of the steps that make tokens; reading prompts does not count."""
    matcher = Grammars(model.tokenizer).matcher(SCHEMA)
    prompts = [model.tokenizer.chat([{"role": "user", "content": text}]) for text in contents(rows)]
    shares, tokens = list[float](), 0
    for number in range(rounds):
        engine, guides = (
            Engine(model.transformer),
            [Timed(Guided(model.tokenizer.eos_ids, {}, matcher)) for _ in prompts],
        )
        for at, (ids, guide) in enumerate(zip(prompts, guides, strict=True)):
            sampler = Sampler(temperature=1.0, seed=100 * number + at)
            engine.submit(Request(ids, JSON_ANSWER, sampler, model.tokenizer.eos_ids, guide))
        whole = 0.0
        while not engine.idle:
            began, before = time.perf_counter(), sum(guide.seconds for guide in guides)
            said = len(engine.step())
            if said == len(engine.running) == rows:
                whole += time.perf_counter() - began
                tokens += said
            else:
                for guide in guides:  # a step of prompts, or with fewer answers
                    guide.seconds = 0.0 if guide is not guides[0] else before
        seconds = sum(guide.seconds for guide in guides)
        shares.append(round(seconds / (whole - seconds), 4))
    cost = statistics.median(shares)
    return {"answers_at_a_time": rows, "tokens": tokens, "shares": shares, "cost": cost, "holds": cost <= 0.1}


def cancellations(process: Process, count: int) -> dict[str, Any]:
    """Clients that go; see above."""
    port = int(process.url.rsplit(":", 1)[1])
    freed, unheard, sizes, step_ms = list[float](), list[int](), list[int](), _step_ms(process.url)
    with httpx.Client(base_url=process.url, timeout=60) as http:
        for number in range(count):
            body = {
                "messages": [{"role": "user", "content": f"Tell a long story, number {number}."}],
                "max_tokens": 4000,
                "stream": True,
            }
            made = _metric(http, "generated_tokens_total")
            with socket.create_connection(("127.0.0.1", port)) as raw:
                raw.sendall(chat_request(process.url, body))
                heard = b""
                while heard.count(b'"content":"') < 2:
                    heard += raw.recv(4096)
            freed.append(_until_free(http))
            told = heard.count(b'"content":"') - 1  # the first one is empty
            unheard.append(round(_metric(http, "generated_tokens_total") - made) - told)
            if number in (count // 4, count - 1):
                time.sleep(0.5)
                sizes.append(process.memory()["own"])
    growth = sizes[-1] - sizes[0]
    return {
        "count": count,
        "step_ms": step_ms,
        "freed_after_ms": quantiles(freed),
        "tokens_unheard": quantiles(unheard),
        "own_memory_mb": [round(size / 1e6, 1) for size in sizes],
        "bytes_per_cancellation": round(growth / max(1, count - count // 4)),
        "holds": growth < 16 << 20,
    }


def _step_ms(url: str) -> float:
    """Between two tokens of an answer that is alone."""
    body = {"messages": [{"role": "user", "content": "Tell a long story."}], "max_tokens": 50, "stream": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as reply:
        came = [time.perf_counter() for line in reply.iter_lines() if '"content":' in line]
    return round(1e3 * statistics.median([after - before for before, after in pairwise(came)]), 1)


def _until_free(http: httpx.Client) -> float:
    """Milliseconds until nothing runs; what ended keeps no memory, unless it may be gone on from."""
    began = time.perf_counter()
    while time.perf_counter() - began < SETTLE_S:
        if _metric(http, "requests_running") == 0:
            return round(1e3 * (time.perf_counter() - began), 1)
        time.sleep(0.002)
    sys.exit(f"an answer still runs {SETTLE_S} s after its client has gone")


def _metric(http: httpx.Client, name: str) -> float:
    said = re.search(rf"^herd_{name} (\S+)$", http.get("/metrics").text, re.MULTILINE)
    assert said is not None, name
    return float(said[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--cancel", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("bench/results/serve.json"))
    options = parser.parse_args()
    random.seed(0)
    found: dict[str, Any] = {
        "command": " ".join(["python -m bench.serve", *sys.argv[1:]]),
        "machine": {"cores": os.cpu_count(), "system": platform.platform()},
        "kernels": kernels.implementation(),
    }
    model = herd.load("cria")
    with serving() as process:
        found["serving"] = throughput(model, process, options.clients, options.rounds)
        print("serving", found["serving"], flush=True)
        found["schemas"] = [masks(model, rows, options.rounds) for rows in (1, options.clients)]
        print("schemas", found["schemas"], flush=True)
    with serving("--memory", LITTLE) as process:
        found["cancellations"] = cancellations(process, options.cancel)
        print("cancellations", found["cancellations"], flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
