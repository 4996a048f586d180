"""A server with replicas on a Ray cluster of two nodes: clients are told what one server says, whatever becomes of the
processes and nodes that say it."""

import asyncio
import json
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray

import herd
from herd import checkpoint
from herd.engine import Engine
from herd.errors import ConfigError
from herd.model import Transformer
from herd.server import replicas
from herd.server.asks import Ask
from herd.server.replicas import Guide, Replica, Replicas, spread
from herd.server.service import Service
from tests.conftest import tiny_config
from tests.ray_cluster import NODE, two_nodes
from tests.server.process import ServerProcess, new_chat
from tests.server.process import ask as ask_chat
from tests.server.served import Served, serving, user
from tests.server.test_load import until
from tests.server.test_tools import COUNTRY, TURN, WEATHER

LONG = {"messages": [user("Go on for ever.")], "max_tokens": 200_000, "logit_bias": {"258": -100}, "stream": True}
GREEDY = {"messages": [user("What is a herd?")], "max_tokens": 60, "temperature": 0, "logit_bias": {"258": -100}}
SEEDED = {"messages": [user("And what is a llama?")], "max_tokens": 60, "seed": 4, "logit_bias": {"258": -100}}
JSON = {
    "messages": TURN,
    "response_format": {"type": "json_schema", "json_schema": {"name": "country", "schema": COUNTRY}},
    "seed": 2,
    "max_tokens": 120,
}
BODIES = [
    GREEDY,
    SEEDED,
    JSON,
    {"messages": TURN, "tools": [WEATHER], "tool_choice": "required", "max_tokens": 200, "seed": 3},
    {"messages": [user("Three.")], "max_tokens": 20, "seed": 5, "n": 3, "top_p": 0.9, "frequency_penalty": 0.5},
    {"messages": [user("Odds?")], "max_tokens": 8, "temperature": 0, "logprobs": True, "top_logprobs": 3},
    {"messages": [user("Once.")], "max_tokens": 40, "seed": 1, "repetition_penalty": 1.3, "stop": ["a", "e", "\n"]},
]


def same(reply: dict[str, Any]) -> Any:
    """What a reply says, without what no two replies share: names of calls, and rounding."""
    for choice in reply["choices"]:
        for call in choice["message"].get("tool_calls") or ():
            call["id"] = ""
    return json.loads(json.dumps(reply["choices"]), parse_float=lambda number: round(float(number), 4))


def text(events: list[dict[str, Any]]) -> str:
    return "".join(e["choices"][0]["delta"].get("content") or "" for e in events if e["choices"])


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with two_nodes() as made:
        yield made


@pytest.fixture(scope="module")
def dying(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file for each replica that was born, or died. One that has said as many tokens as the file
    `after` says takes it away and dies. While there is the file `hold`, replicas name their node and are quiet."""
    return tmp_path_factory.mktemp("dying")


@pytest.fixture(scope="module")
def spreading(
    cluster: Any, model: herd.Model, dying: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """A server with two replicas, one on each node."""

    class Mortal(Replica):
        def __init__(self, *its: Any) -> None:
            Replica.__init__(self, *its)
            (dying / f"born {os.getpid()}").touch()

        async def answer(self, ask: Ask, guide: Guide | None) -> AsyncIterator[Any]:
            said = count(1)
            async for one in Replica.answer(self, ask, guide):
                yield one
                while (dying / "hold").exists():
                    (dying / f"held {ray.get_runtime_context().get_node_id()}").touch()
                    await asyncio.sleep(0.01)
                try:
                    if next(said) >= int((dying / "after").read_text()):
                        (dying / "after").rename(dying / f"dead {os.getpid()}")
                        os.kill(os.getpid(), signal.SIGKILL)
                except FileNotFoundError:
                    pass

    folder = tmp_path_factory.mktemp("spreading")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replicas, "Replica", Mortal)
        with (
            spread(model, 2, cluster.address, folder, rows=3, memory=1 << 26) as service,
            serving(model, folder, service=service) as it,
        ):
            yield it


def away(served: Served) -> Service:
    """The service that has the replicas."""
    assert served.service.elsewhere is not None
    return served.service.elsewhere


def whole(served: Served, dying: Path) -> None:
    """Waits until two replicas answer, as they do again some time after one died."""
    health, living, ends = {}, 0, time.monotonic() + 60
    while living != 2 or health != {"status": "ok", "replicas": {"running": 2, "wanted": 2}}:
        assert time.monotonic() < ends, (health, living)
        time.sleep(0.1)
        health = served.http.get("/health").json()
        living = len([*dying.glob("born *")]) - len([*dying.glob("dead *")])


def test_many_clients_are_told_what_one_server_says(
    spreading: Served, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [same(served.ask(**body)) for body in BODIES]
    step = Engine.step

    def refuse(engine: Engine) -> object:
        assert not engine.running, "nothing of this is for the engine of this process"
        return step(engine)

    monkeypatch.setattr(Engine, "step", refuse)
    with ThreadPoolExecutor(2 * len(BODIES)) as pool:
        found = list(pool.map(lambda body: same(spreading.ask(**body)), BODIES * 2))
        streams = list(pool.map(lambda body: text(spreading.events(**body)), (GREEDY, SEEDED, JSON) * 2))
    assert found == expected * 2
    assert streams == [said[0]["message"]["content"] for said in expected[:3]] * 2
    counts = spreading.http.get("/metrics").text.splitlines()
    assert {'herd_replicas{state="running"} 2.0', 'herd_replicas{state="wanted"} 2.0', "herd_kv_bytes 0.0"} <= {*counts}


def test_contexts_and_chats_are_answered_by_the_server(spreading: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Replicas, "submit", None)
    context = spreading.http.post("/v1/contexts", json={"name": "gate"}).json()["id"]
    files = {"files": ("gate.txt", b"The code of the north gate is 4711.\n")}
    spreading.http.post(f"/v1/contexts/{context}/sources", files=files).raise_for_status()
    said = spreading.ask(messages=[user("What is the code of the north gate?")], context=context)
    assert said["choices"][0]["message"]["content"] == "The code of the north gate is 4711."
    spreading.http.put("/api/settings", json={"max_tokens": 12, "temperature": 0})
    chat = new_chat(spreading.url)
    assert ask_chat(spreading.url, chat, "Who?")["content"] == spreading.alone("Who?", 12)
    assert ask_chat(spreading.url, chat, "Where?")["detail"]["cached_tokens"] > 0


@pytest.mark.parametrize("body", [GREEDY, SEEDED, JSON])
def test_a_replica_that_is_killed_is_not_missed(
    spreading: Served, served: Served, dying: Path, body: dict[str, Any]
) -> None:
    whole(spreading, dying)
    others = [{**GREEDY, "messages": [user(name)]} for name in "abc"]
    expected = [text(served.events(**its)) for its in (body, *others)]
    deaths = len([*dying.glob("dead *")])
    (dying / "after").write_text("9")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda its: text(spreading.events(**its)), (body, *others)))
    assert len([*dying.glob("dead *")]) == deaths + 1
    assert found == expected


def test_who_leaves_makes_room(spreading: Served, dying: Path) -> None:
    """More often than there are rows, and each time with an answer that would not end."""
    whole(spreading, dying)
    for _ in range(8):
        with spreading.http.stream("POST", "/v1/chat/completions", json=LONG) as reply:
            assert next(reply.iter_lines())
    with ThreadPoolExecutor(6) as pool:
        assert len(list(pool.map(lambda _: spreading.ask(**GREEDY), range(6)))) == 6
    assert away(spreading).running == 0 and away(spreading).memory_used == 0


@pytest.fixture(scope="module")
def third(cluster: Any) -> None:
    """A node for one more replica."""
    cluster.add_node(**NODE)


def test_the_command_serves_and_ends(third: None, cluster: Any, tiny_model: Path, tmp_path: Path) -> None:
    its = ServerProcess(tiny_model, tmp_path, "--replicas", 1, "--ray", cluster.address, "--memory", "64M")
    assert httpx.get(f"{its.url}/health").json()["replicas"] == {"running": 1, "wanted": 1}
    body = {"messages": [user("Who?")], "max_tokens": 5}
    assert httpx.post(f"{its.url}/v1/chat/completions", json=body).json()["usage"]["completion_tokens"] == 5
    assert its.stop() == 0


def test_too_few_processors_and_other_weights_are_refused(
    third: None, spreading: Served, cluster: Any, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"50 replicas need a CPU each, and the Ray cluster at .* has \d: start"):
        spread(spreading.model, 50, cluster.address, tmp_path).__enter__()
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    other = herd.load(folder)
    checkpoint.save(Transformer(tiny_config()), tmp_path / "other")
    for file in (tmp_path / "other").glob("*.safetensors"):
        shutil.copy(file, folder)  # what replicas find under the name
    with pytest.raises(ConfigError, match=r"^the worker on .* has other weights under .*; copy them$"):
        spread(other, 1, cluster.address, tmp_path, memory=1 << 26).__enter__()
    assert same(spreading.ask(**SEEDED)), "the others answer as ever"


def test_a_node_that_is_lost_is_not_missed(spreading: Served, served: Served, cluster: Any, dying: Path) -> None:
    whole(spreading, dying)
    bodies = [{**SEEDED, "messages": [user(name)]} for name in "abcd"]  # more than a replica has rows
    expected = [text(served.events(**body)) for body in bodies]
    (dying / "hold").touch()
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(spreading.events, **body) for body in bodies]
        until(lambda: len([*dying.glob("held *")]) == 2)
        lost = next(node for node in cluster.worker_nodes if (dying / f"held {node.node_id}").exists())
        cluster.remove_node(lost, allow_graceful=False)
        (dying / "hold").unlink()
        assert [text(answer.result()) for answer in answers] == expected
