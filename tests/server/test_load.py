"""Many clients: a bounded queue, turns, clients that leave, and a server that stops."""

import asyncio
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import herd
from herd.server.asks import Ask, Busy
from herd.server.fair import FairQueue
from herd.server.metrics import Metrics
from herd.server.service import Service
from tests.server.served import Served, serving, user

LONG = {"messages": [user("Go on for ever.")], "max_tokens": 20_000, "logit_bias": {"258": -100}, "stream": True}
SAID = {"input": "Hello."}


def until(holds: Callable[[], bool]) -> None:
    """Waits until something holds; fails if it never does."""
    for _ in range(4000):
        if holds():
            return
        time.sleep(0.005)
    raise AssertionError("it never came to that")


def idle(served: Served) -> None:
    """Waits until nothing runs or waits."""
    until(lambda: not served.service.running and not served.service.waiting)


def test_more_than_may_wait_are_refused(model: herd.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(model, tmp_path, rows=1, queue=2) as served, ThreadPoolExecutor(3) as pool:
        left = threading.Event()

        def hold() -> None:
            with served.http.stream("POST", "/v1/chat/completions", json=LONG) as reply:
                assert reply.status_code == 200
                left.wait()

        try:
            holding = [pool.submit(hold)]
            until(lambda: served.service.running == 1)  # the others would find no place before
            holding += [pool.submit(hold) for _ in range(2)]
            until(lambda: served.service.waiting == 2)
            for each_s, retry_s in ((None, 5), (0.1, 1), (10.0, 20), (100.0, 60)):  # two wait
                monkeypatch.setattr(served.service.metrics, "seconds_each", lambda each_s=each_s: each_s)
                reply = served.http.post("/v1/chat/completions", json={"messages": [user("me, too")]})
                assert reply.status_code == 429 and reply.headers["retry-after"] == str(retry_s)
                assert reply.json()["error"]["code"] == "rate_limit_exceeded"
            for route, body in (("chat/completions", LONG), ("completions", {"prompt": []}), ("responses", SAID)):
                reply = served.http.post(f"/v1/{route}", json={**body, "model": "none"})
                assert reply.status_code == 429, "refused before anything else is looked at"
        finally:
            left.set()
        for each in holding:
            each.result()
        idle(served)
        served.alive()


def test_seconds_between_answers_of_late(monkeypatch: pytest.MonkeyPatch) -> None:
    now, metrics = 1000.0, Metrics()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for at in (0.0, 930.0, 950.0, 970.0):
        now = at
        metrics.ended(1, 0, "stop")
    assert metrics.seconds_each() == 20.0, "the first one is long ago"
    now = 1000.0
    assert metrics.seconds_each() == 50.0, "now the second one is, too"
    now = 2000.0
    assert metrics.seconds_each() is None


def test_all_choices_wait_or_none(model: herd.Model, tmp_path: Path) -> None:
    with serving(model, tmp_path, rows=1, queue=3) as served:
        assert served.ask(messages=[user("x")], n=4, max_tokens=2, status=429)["error"]["message"]
        assert len(served.ask(messages=[user("x")], n=3, max_tokens=2)["choices"]) == 3


@given(st.lists(st.sampled_from("abc"), max_size=30))
def test_clients_take_turns(clients: list[str]) -> None:
    queue: FairQueue[tuple[str, int]] = FairQueue(lambda item: 1)
    for number, client in enumerate(clients):
        queue.push(client, (client, number))
    got = [queue.pop() for _ in clients]
    for client in set(clients):
        mine = [item for item in got if item[0] == client]
        assert [number for _, number in mine] == sorted(number for _, number in mine)
        # While one waits, each other client is served at most once between two of its turns.
        places = [at for at, item in enumerate(got) if item[0] == client]
        between = [got[a + 1 : b] for a, b in pairwise(places)]
        assert all(len(others) == len({name for name, _ in others}) for others in between)
    assert len(queue) == 0


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 100)), max_size=60))
def test_clients_that_wait_are_given_the_same(requests: list[tuple[str, int]]) -> None:
    """As many tokens, up to one request; and of one client, in order."""
    queue: FairQueue[tuple[str, int]] = FairQueue(lambda item: item[1])
    for client, size in requests:
        queue.push(client, (client, size))
    given, got = dict.fromkeys("abc", 0), list[tuple[str, int]]()
    while len(queue):
        waiting = {client for client in "abc" if queue.count(client)}
        client, size = queue.pop()
        assert given[client] == min(given[name] for name in waiting)
        queue.give(client, size - 1)  # popping it counts as one
        given[client] += size
        got.append((client, size))
    assert [[its for its in got if its[0] == name] for name in "abc"] == [
        [its for its in requests if its[0] == name] for name in "abc"
    ]


def test_who_asks_now_and_then_is_next() -> None:
    queue: FairQueue[str] = FairQueue(len)
    for _ in range(5):
        for client in "abc":
            queue.push(client, f"{client} wants a lot")
    for _ in range(6):
        queue.give(queue.pop()[0], 1000)
    queue.push("late", "hi")
    assert queue.pop() == "hi", "it was given nothing, and others were"
    queue.give("late", 5000)
    queue.push("late", "hi again")
    assert [queue.pop()[0] for _ in range(3)] == ["a", "b", "c"], "nobody may save up or be always first"


def test_rows_for_short_requests_are_theirs_whoever_is_next() -> None:
    queue: FairQueue[str] = FairQueue(len)
    queue.push("a", "a long request")
    queue.give("b", 10)
    queue.push("b", "short")
    queue.push("b", "hi")
    assert queue.first() == "a long request"
    assert queue.first(5) == "short" and queue.pop(5) == "short", "a client's come in their order"
    assert queue.first(4) == "hi" and queue.first(1) is None
    queue.push("late", "a longer request")
    assert [queue.pop() for _ in range(3)] == ["a long request", "a longer request", "hi"], "nobody was passed over"


def test_a_few_clients_cannot_keep_others_out(model: herd.Model, tmp_path: Path) -> None:
    """Who has none waiting gets a place in a queue that others have filled."""
    service = Service(model, rows=1, queue=2, memory=1 << 26)
    ids = model.tokenizer.chat([user("x")])

    async def come() -> None:
        many = [await service.submit(Ask(ids, 20_000, client="many"))]
        while service.waiting:
            await asyncio.sleep(0.001)
        many += [await service.submit(Ask(ids, 20_000, client="many")) for _ in range(2)]
        with pytest.raises(Busy):
            await service.submit(Ask(ids, 2, client="many"))
        others = [await service.submit(Ask(ids, 2, client=name)) for name in ("one", "two")]
        with pytest.raises(Busy):
            await service.submit(Ask(ids, 2, client="three"))
        for its in (*many, *others):
            async with its:
                pass

    try:
        asyncio.run(come())
    finally:
        service.close()


def test_who_leaves_frees_the_memory(served: Served) -> None:
    idle(served)
    for whole in (False, True):
        body = {**LONG, "stream": not whole, "messages": [user(f"Go on, {whole}")]}
        with socket.create_connection(("127.0.0.1", served.port)) as raw:
            raw.sendall(httpx_bytes(body))
            while not served.service.running:
                time.sleep(0.001)
        idle(served)
    assert served.service.memory_used == served.service._prefixes.nbytes, "only what others may begin with is left"
    served.alive()


class Counted(Metrics):
    """Metrics that know how many tokens were made."""

    made = 0

    def said(self, tokens: int) -> None:
        self.made += tokens


def test_who_leaves_costs_the_step_that_runs_and_no_other(model: herd.Model) -> None:
    service = Service(model, rows=1, memory=1 << 26, metrics=(metrics := Counted()))
    ids = model.tokenizer.chat([user("x")])

    async def leave() -> int:
        async with await service.submit(Ask(ids, 20_000)) as answers:
            async for _ in answers:
                break
        made = metrics.made
        while service.running:
            await asyncio.sleep(0.001)
        return metrics.made - made

    try:
        assert {asyncio.run(leave()) for _ in range(30)} <= {0, 1}
    finally:
        service.close()


def test_cancelling_again_and_again_grows_nothing(served: Served) -> None:
    def leave(times: int) -> None:
        for _ in range(times):
            with socket.create_connection(("127.0.0.1", served.port)) as raw:
                raw.sendall(httpx_bytes(LONG))
                raw.recv(100)
        idle(served)

    leave(20)
    before, threads = peak(), own_threads()
    leave(100)
    assert peak() - before < 8 << 10
    assert own_threads() <= threads
    served.alive()


def own_threads() -> int:
    """Threads besides those of asyncio's pool, which starts up to six of them as it is used."""
    return sum(not thread.name.startswith("asyncio_") for thread in threading.enumerate())


def peak() -> int:
    """The most KiB that this process ever had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def httpx_bytes(body: dict[str, object]) -> bytes:
    request = httpx.Request("POST", "http://localhost/v1/chat/completions", json=body)
    lines = [b"POST /v1/chat/completions HTTP/1.1", *(b"%b: %b" % pair for pair in request.headers.raw)]
    return b"\r\n".join(lines) + b"\r\n\r\n" + request.read()


@pytest.fixture
def command(tiny_model: Path, tmp_path: Path) -> list[str]:
    return [sys.executable, "-m", "herd", "serve", str(tiny_model), "--port", "0", "--data", str(tmp_path / "data")]


def test_a_server_that_is_stopped_finishes_what_it_says(command: list[str]) -> None:
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        line = next(line for line in server.stderr if "http://" in line)
        url = "http://" + line.split("http://")[1].split()[0]
        body = {"messages": [user("Go on.")], "max_tokens": 300, "logit_bias": {"258": -100}, "stream": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as reply:
            lines = reply.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and '"finish_reason":"length"' in rest[-2]
        assert server.wait(20) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
