"""A server of Cria that is asked for five times what it can do, while it reads a million tokens: does it hold?

    python -m bench.overload [--minutes 10] [--clients 200] [--times 5] [--out bench/results/overload.json]

One server in a process of its own, at loopback, with the settings that it has by default but 2 GB for keys and values.
Each client has a key, so that the server knows them apart. Three kinds of them:

- *Heavy* clients (200) together want `times` as many answers as the server can give, at random times (Poisson), whether
  earlier ones came or not: prompts of some 300 tokens of real files, answers of up to 64 tokens, streamed. Each has at
  most 4 on the way; what it wants beyond that is counted as not sent. Refused with 429, it waits for as long as
  Retry-After says and asks again.
- *Light* clients (20) ask now and then, once in 20 seconds each at random times: a system prompt and a question, some
  100 tokens, and an answer of up to 16. That is less than a fair share of what the server can do, and they are what
  "short requests are not starved" is about. Time to the first token of *their* requests, from sending until text comes,
  refusals and waiting included, is compared with the same clients' when nothing else happens. What
  heavy clients wait is told beside it and has no limit: they want five times what there is, so they wait for a queue.
- A *reader* uploads a million tokens of Python files, again into a new context when they are read, to the end.

What the server can do is measured first, with as many heavy requests at a time as it has rows. A reply is whole if it
has its status, all its events, a finish_reason and the end; an error if the server says one in OpenAI's form; else it
is lost. Memory is what the process has that no file backs, each second; the first and the last fifth of the run,
without the time to fill up (30 s), are compared.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import sys
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from bench.overload_report import Reply, fairness, growth, judged, kind, quantiles
from bench.server import Process, serving
from herd import kernels
from herd.checkpoint.cria import cria_path
from herd.eval.corpus import fill, package_files
from herd.prompt import Tokenizer

ROWS, SLOTS, LIGHT, LIGHT_GAP_S = 32, 4, 20, 20.0
MEMORY = "2G"  # for keys and values, those that are kept for prompts to begin with included: it is soon full
ANSWER, SHORT_ANSWER, LEAST_WAIT_S = 64, 16, 0.1
READ_TOKENS, READ_PACKAGES = 1_000_000, ("sympy", "networkx")
DRAIN_S, REPLY_S = 300, 1800
SYSTEM = (
    "You are the assistant of a library. You help visitors to find books, tell them when the house is open and how "
    "loans are renewed. Answer in one short and friendly sentence, in the language in which you are asked. If you do "
    "not know something, say so, and name the desk on the first floor, where people are glad to help."
)
QUESTIONS = (
    "Where are the atlases?",
    "When do you open on Sunday?",
    "How long may I keep a novel?",
    "Who runs the bar?",
)


@dataclass
class Run:
    """A measurement: the server, the requests that wait for replies, and what came of those that do not."""

    process: Process
    http: dict[str, httpx.AsyncClient]  # by client: one for all looks through all its connections at each request
    texts: list[str]
    end: float = 0.0
    replies: list[Reply] = field(default_factory=list)
    wanted: int = 0
    unsent: int = 0
    without_retry_after: int = 0
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


def heavy_body(texts: Sequence[str]) -> dict[str, Any]:
    content = f"What does this code do?\n\n{random.choice(texts)}"
    return {"messages": [{"role": "user", "content": content}], "max_tokens": ANSWER, "stream": True}


def light_body() -> dict[str, Any]:
    asked = f"{random.choice(QUESTIONS)} I am visitor {random.randrange(10**6)}."
    turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": asked}]
    return {"messages": turns, "max_tokens": SHORT_ANSWER, "stream": True}


async def ask(run: Run, client: str, body: dict[str, Any]) -> None:
    """One request to its end: again and again while it is refused, unless the run ends meanwhile."""
    began, refused = time.perf_counter(), 0
    while True:
        try:
            wait, reply = await attempt(run, client, body, began)
        except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
            wait, reply = None, Reply(client, f"lost: {type(error).__name__} {error}"[:200], 0, 0, None, 0.0)
        if wait is None:
            break
        refused += 1
        if time.perf_counter() + wait > run.end:
            reply = Reply(client, "refused to the end", 0, 0, None, 0.0)
            break
        await asyncio.sleep(wait)
    reply.refused, reply.whole_s = refused, time.perf_counter() - began
    run.replies.append(reply)


async def attempt(run: Run, client: str, body: dict[str, Any], began: float) -> tuple[float | None, Reply]:
    """Seconds to wait before asking again if it was refused, and the reply."""
    reply, finish, done = Reply(client, "whole", 0, 0, None, 0.0), None, False
    async with run.http[client].stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            error = json.loads(await response.aread())["error"]["message"]
            reply.outcome = f"error: {response.status_code} {error}"[:200]
            if response.status_code != 429:
                return None, reply
            if not response.headers.get("retry-after", "").isdecimal():
                run.without_retry_after += 1
            return max(float(response.headers.get("retry-after", 1)), LEAST_WAIT_S), reply
        async for line in response.aiter_lines():
            if not line:
                continue
            assert not done, "something came behind the end"
            if line == "data: [DONE]":
                done = True
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                reply.outcome = f"error: {event['error']['message']}"[:200]
                return None, reply
            choice = event["choices"][0]
            finish = choice["finish_reason"] or finish
            if choice["delta"].get("content"):
                reply.tokens += 1
                reply.first_s = reply.first_s or time.perf_counter() - began
    if not done or finish is None:
        reply.outcome = "lost: the reply ended before its end"
    return None, reply


async def heavy(run: Run, client: str, gap_s: float) -> None:
    """Wants an answer each gap_s in the mean."""
    mine: set[asyncio.Task[None]] = set()
    await asyncio.sleep(random.expovariate(1 / gap_s))
    while time.perf_counter() < run.end:
        run.wanted += 1
        if len(mine) < SLOTS:
            task = asyncio.create_task(ask(run, client, heavy_body(run.texts)))
            mine.add(task)
            task.add_done_callback(mine.discard)
        else:
            run.unsent += 1
        await asyncio.sleep(random.expovariate(1 / gap_s))
    if mine:
        await asyncio.wait(mine)


async def light(run: Run, client: str, gap_s: float) -> None:
    """Asks once, then thinks, and so on."""
    await asyncio.sleep(random.uniform(0, gap_s))
    while time.perf_counter() < run.end:
        await ask(run, client, light_body())
        await asyncio.sleep(random.uniform(0.5 * gap_s, 1.5 * gap_s))


async def read(run: Run, client: str, files: Sequence[tuple[str, bytes]], reads: list[dict[str, Any]]) -> None:
    """Upload the files into one new context after the other, and note how far each is."""
    http, parts = run.http[client], [("files", file) for file in files]
    while time.perf_counter() < run.end:
        made = await http.post("/v1/contexts", json={"name": "read"})
        place, began = f"/v1/contexts/{made.raise_for_status().json()['id']}", time.perf_counter()
        reads.append(its := {"tokens": 0, "seconds": 0.0, "done": False})
        upload = asyncio.create_task(http.post(f"{place}/sources", files=parts))
        while time.perf_counter() < run.end and not upload.done():
            await asyncio.wait({upload}, timeout=1)
            shown = (await http.get(place)).raise_for_status().json()
            its["seconds"] = round(time.perf_counter() - began, 1)
            if shown["reading"]:
                its["tokens"] = shown["reading"]["read_tokens"]
        if upload.done():
            report = upload.result().raise_for_status().json()
            its |= {"tokens": report["tokens"], "done": True}
            (await http.delete(place)).raise_for_status()
        upload.cancel()


async def watch(run: Run, memory: list[tuple[float, int]]) -> None:
    """Note the server's memory each second."""
    began = time.perf_counter()
    while time.perf_counter() < run.end and run.process.exit_code is None:
        memory.append((time.perf_counter() - began, run.process.memory().get("own", 0)))
        await asyncio.sleep(1)


async def light_alone(run: Run, count: int) -> list[float]:
    """Seconds to the first token of short requests, one after the other, when nothing else happens."""
    for number in range(count + 3):  # the first three warm up
        await ask(run, f"light-{number % LIGHT}", light_body())
    whole = [reply for reply in run.replies if reply.outcome == "whole" and reply.first_s]
    run.replies.clear()
    return [reply.first_s for reply in whole[3:] if reply.first_s]


async def capacity(run: Run, seconds: float) -> dict[str, float]:
    """Answers and tokens a second with as many heavy requests at a time as there are rows."""

    async def again(client: str) -> None:
        while time.perf_counter() < run.end:
            await ask(run, client, heavy_body(run.texts))

    began = time.perf_counter()
    run.end = began + seconds
    await asyncio.gather(*(again(f"heavy-{number}") for number in range(ROWS)))
    took = time.perf_counter() - began
    whole = [reply for reply in run.replies if reply.outcome == "whole"]
    run.replies.clear()
    if not whole:
        sys.exit("no heavy request was answered")
    return {"answers_per_s": len(whole) / took, "tokens_per_s": sum(reply.tokens for reply in whole) / took}


async def with_read(run: Run, files: Sequence[tuple[str, bytes]], seconds: float) -> list[float]:
    """Seconds to the first token of short requests beside a read, with no other load."""
    run.end, reads = time.perf_counter() + seconds, list[dict[str, Any]]()
    reading = asyncio.create_task(read(run, "reader", files, reads))
    await asyncio.gather(*(light(run, f"light-{number}", 3.0) for number in range(3)))
    await reading
    whole = [reply.first_s for reply in run.replies if reply.first_s]
    run.replies.clear()
    return whole


async def overloaded(run: Run, options: argparse.Namespace, per_s: float, files: Sequence[tuple[str, bytes]]) -> Any:
    """The run itself. All that is on its way at its end may still take DRAIN_S."""
    memory, reads = list[tuple[float, int]](), list[dict[str, Any]]()
    run.end = time.perf_counter() + 60 * options.minutes
    gap_s = options.clients / (options.times * per_s)
    work = [heavy(run, f"heavy-{number}", gap_s) for number in range(options.clients)]
    work += [light(run, f"light-{number}", LIGHT_GAP_S) for number in range(LIGHT)]
    work += [watch(run, memory), read(run, "reader", files, reads)]
    tasks = [asyncio.create_task(its) for its in work]
    done, late = await asyncio.wait(tasks, timeout=60 * options.minutes + DRAIN_S)
    for task in late:
        task.cancel()
    failed = [repr(task.exception()) for task in done if task.exception() is not None]
    return memory, reads, failed + [f"{len(late)} clients still waited"] * bool(late)


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All phases; the first two with a server of their own."""
    tokenizer = Tokenizer.load(cria_path())
    chosen, _ = fill(package_files(READ_PACKAGES), READ_TOKENS, tokenizer, 1024)
    files = [(file.name, file.text.encode()) for file in chosen]
    texts = [file.text[at : at + 900] for file in package_files(("asyncio", "email")) for at in range(0, 9000, 900)]
    texts = [text for text in texts if len(text) > 600]
    names = [
        f"{name}-{number}"
        for name, count in (("heavy", max(options.clients, ROWS)), ("light", LIGHT))
        for number in range(count)
    ]
    found: dict[str, Any] = {"command": " ".join(["python -m bench.overload", *sys.argv[1:]])}
    found |= {"machine": {"cores": os.cpu_count(), "system": platform.platform()}, "kernels": kernels.implementation()}
    for phases in ("read", "overload"):
        with serving("--drain", "5", "--memory", MEMORY, keys=[*names, "reader"]) as process:
            async with clients(process.url, [*names, "reader"]) as http:
                run = Run(process, http, texts, end=time.perf_counter() + 600)
                if phases == "read":
                    found["alone_first_token_s"] = quantiles(await light_alone(run, 60))
                    say(f"short requests alone: {found['alone_first_token_s']}")
                    found["beside_read_first_token_s"] = quantiles(await with_read(run, files, options.probe))
                    say(f"beside a read: {found['beside_read_first_token_s']}")
                else:
                    found["capacity"] = await capacity(run, options.probe)
                    say(f"capacity: {found['capacity']}")
                    found |= await overload(run, options, found["capacity"]["answers_per_s"], files)
            found["crashes"] = found.get("crashes", 0) + (process.exit_code is not None)
            if phases == "overload":
                found["server_log"] = process.log.read_text()[-2000:].splitlines()[1:]
    return found


async def overload(
    run: Run, options: argparse.Namespace, per_s: float, files: Sequence[tuple[str, bytes]]
) -> dict[str, Any]:
    """The run, summed up."""
    memory, reads, failed = await overloaded(run, options, per_s, files)
    lost = [reply for reply in run.replies if reply.outcome.startswith("lost")]
    return {
        "minutes": options.minutes,
        "clients": {"heavy": options.clients, "light": LIGHT},
        "wanted": run.wanted,
        "wanted_times_capacity": round(run.wanted / (60 * options.minutes) / per_s, 2),
        "not_sent": run.unsent,
        "lost_replies": len(lost),
        "refusals_without_retry_after": run.without_retry_after,
        "failures_of_clients": failed,
        "light": kind(run.replies, "light-"),
        "heavy": kind(run.replies, "heavy-"),
        "fairness_of_heavy_tokens": fairness(run.replies, options.clients),
        "reads": reads,
        "memory": {**growth(memory, options.minutes), "each_10_s_mb": [round(size / 1e6) for _, size in memory[::10]]},
    }


@asynccontextmanager
async def clients(url: str, names: Sequence[str]) -> AsyncIterator[dict[str, httpx.AsyncClient]]:
    """One for each name, which is its key."""
    async with AsyncExitStack() as stack:
        made = dict[str, httpx.AsyncClient]()
        for name in names:
            headers = {"Authorization": f"Bearer {name}"}
            client = httpx.AsyncClient(base_url=url, headers=headers, timeout=REPLY_S, verify=False)
            made[name] = await stack.enter_async_context(client)
        yield made


def say(text: str) -> None:
    print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--times", type=float, default=5, help="the measured capacity that is asked for")
    parser.add_argument("--probe", type=float, default=60, help="seconds to measure capacity, and beside a read")
    parser.add_argument("--out", type=Path, default=Path("bench/results/overload.json"))
    options = parser.parse_args()
    found = asyncio.run(measure(options))
    found["judged"] = judged(found)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    for what, row in found["judged"].items():
        say(f"{'holds' if row['holds'] else 'FAILS'}: {what} ({row['measured']})")


if __name__ == "__main__":
    main()
