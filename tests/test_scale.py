"""Reading on a Ray cluster of two nodes: the context is that of one machine, also when workers and nodes are killed."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

import herd
from herd import checkpoint, scale
from herd.cli.main import run
from herd.context import manifest, read, sources
from herd.context.read import Progress
from herd.errors import ConfigError, ContextError
from herd.model import Transformer
from tests.conftest import tiny_config
from tests.ray_cluster import NODE, two_nodes


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with two_nodes() as made:
        yield made


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "BATCH_TOKENS", 256)
    monkeypatch.setattr(sources, "_RACY_NS", -(10**18))  # new files count as old enough for their stat to be kept


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "src"
    folder.mkdir()
    for name in "abcdef":
        (folder / f"{name}.txt").write_text("".join(f"{name} says that line {i} is {i * i}\n" for i in range(40)))
    return folder


def kept(context: herd.Context) -> tuple[list[bytes], str]:
    """All bytes of a context on disk: its segments in their order, and its manifest without their random names."""
    with closing(sqlite3.connect(context.folder / manifest.FILE)) as db:
        names = [name for (name,) in db.execute("SELECT file FROM segment ORDER BY id")]
        rows = "\n".join(db.iterdump())
    assert {path.name for path in context.folder.glob("*.kv")} == set(names)
    for place, name in enumerate(names):
        rows = rows.replace(name, f"segment {place}")
    return [(context.folder / name).read_bytes() for name in names], rows


def alone(folder: Path, model: herd.Model, files: Path) -> herd.Context:
    context = herd.Context.open(folder, model)
    context.read([files])
    return context


def test_two_nodes_write_what_one_machine_does_though_a_worker_is_killed(
    cluster: Any, tiny_model: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen, killed = scale._read, tmp_path / "seen", tmp_path / "killed"
    seen.mkdir()

    def fragile(*args: object) -> object:
        """Waits until both nodes read, then dies with the first batch that it has read."""
        (seen / ray.get_runtime_context().get_node_id()).touch()
        until = time.monotonic() + 60
        while len(list(seen.iterdir())) < 2 and time.monotonic() < until:
            time.sleep(0.01)
        done = real(*args)  # type: ignore[arg-type]
        try:
            os.close(os.open(killed, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return done
        return os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(scale, "_read", fragile)
    model = herd.load(tiny_model)
    context = herd.Context.open(tmp_path / "spread", model)
    with scale.spread(model, cluster.address) as reader:
        report = context.read([files], reader=reader)
        again = context.read([files], reader=reader)
    assert killed.exists() and len(list(seen.iterdir())) == 2
    assert report.read_tokens == report.tokens > 0 and again.read_tokens == 0
    assert kept(context) == kept(alone(tmp_path / "alone", model, files))


def test_a_lost_node_loses_nothing(cluster: Any, tiny_model: Path, files: Path, tmp_path: Path) -> None:
    model = herd.load(tiny_model)
    context = herd.Context.open(tmp_path / "spread", model)
    node, lost = cluster.add_node(**NODE), list[object]()

    def lose(progress: Progress) -> None:
        if progress.read_tokens and not lost:
            lost.append(node)
            cluster.remove_node(node, allow_graceful=False)

    with scale.spread(model, cluster.address) as reader:
        context.read([files], reader=reader, progress=lose)
    assert lost
    assert kept(context) == kept(alone(tmp_path / "alone", model, files))


def test_a_worker_with_other_weights_is_refused_in_one_line(
    cluster: Any, tiny_model: Path, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    model = herd.load(folder)
    context = herd.Context.open(tmp_path / "ctx", model)
    checkpoint.save(Transformer(tiny_config()), tmp_path / "other")
    for file in (tmp_path / "other").glob("*.safetensors"):
        shutil.copy(file, folder)  # what workers find under the name
    with (
        scale.spread(model, cluster.address) as reader,
        pytest.raises(ConfigError, match=r"the worker on .* has other weights under .*; copy them"),
    ):
        context.read([files], reader=reader)
    assert context.tokens == 0


def test_the_command_spreads(cluster: Any, tiny_model: Path, files: Path, tmp_path: Path) -> None:
    command = ["read", files, "--context", tmp_path / "spread", "--model", tiny_model, "--ray"]
    assert run([str(part) for part in (*command, cluster.address)]) == 0
    model = herd.load(tiny_model)
    assert kept(herd.Context.open(tmp_path / "spread", model)) == kept(alone(tmp_path / "alone", model, files))


def test_another_version_is_refused(tiny_model: Path) -> None:
    model = herd.load(tiny_model)
    with pytest.raises(ConfigError, match=f"has Herd {herd.__version__}, not 99; install 99 on all machines"):
        scale.loaded(replace(scale.wanted(model), version="99"))


def test_a_sequence_is_not_spread(several_model: Path, files: Path, tmp_path: Path) -> None:
    model = herd.load(several_model)
    context = herd.Context.open(tmp_path / "ctx", model)
    with pytest.raises(ContextError, match=r"read in sequence, .*; leave out --ray, or .* --reading independent"):
        context.read([files], reader=lambda batches, spec: iter([]))
    assert context.tokens == 0


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1:1", "127.0.0.1:99999"])
def test_no_cluster_is_an_error(address: str, tiny_model: Path) -> None:
    with (
        pytest.raises(ConfigError, match=f"no Ray cluster to be used at {address}: .* start one: `ray start"),
        scale.spread(herd.load(tiny_model), address),
    ):
        raise AssertionError("there is none")


def test_one_machine_needs_no_ray(tiny_model: Path, files: Path, tmp_path: Path) -> None:
    code = "import sys; sys.modules['ray'] = None; from herd.cli.main import run; raise SystemExit(run(sys.argv[1:]))"
    command = ["read", files, "--context", tmp_path / "ctx", "--model", tiny_model]
    done = subprocess.run([sys.executable, "-c", code, *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_ray_the_error_names_the_extra(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import herd.cli.read

    monkeypatch.setattr(herd.cli.read, "find_spec", lambda name: None)
    assert run(["read", str(files), "--context", str(tmp_path / "ctx"), "--ray", "local"]) == 2
    assert capsys.readouterr().err == "error: herd read --ray needs ray: pip install 'herd-llm[ray]'\n"
