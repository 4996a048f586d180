"""Models whose experts are read as they are needed: the same numbers as in memory, whatever room there is."""

import gc
import json
import os
import threading
import time
from collections.abc import Callable, Generator, Mapping
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from herd import checkpoint, kernels
from herd.checkpoint.files import INDEX
from herd.engine import Engine, Request, generate, stream
from herd.errors import CheckpointError
from herd.kernels.layers import Mlp, MlpForm
from herd.model import KVCache, Transformer, offload
from herd.model.offload import ExpertCache
from tests.checkpoint.tiny_packed import CONFIG, EXPERTS, pack_folder, plain_folder
from tests.model.tiny_models import tokens

pytestmark = pytest.mark.skipif(
    not kernels.runs_layers(torch.empty(0), 64), reason="the native library is not used on this machine"
)
EXPERT = MlpForm.of(CONFIG.hidden_size, CONFIG.intermediate_size, 4, 64).nbytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plain = tmp_path_factory.mktemp("offload")
    plain_folder(plain / "plain")
    return pack_folder(plain / "plain", plain / "packed", "int4")


@pytest.fixture(scope="module")
def whole(folder: Path) -> Transformer:
    """All in memory."""
    return checkpoint.load_packed(folder, 1 << 30)


def bounded(folder: Path, slots: int) -> Transformer:
    """With memory for so many experts."""
    with pytest.raises(CheckpointError, match="bytes of memory at least; there are 0") as refused:
        checkpoint.load_packed(folder, 0)
    least = int(str(refused.value).split(" need ")[1].split()[0].replace(",", ""))
    return checkpoint.load_packed(folder, least + (slots - 1) * EXPERT)


def source(model: Transformer) -> ExpertCache:
    assert model.packed is not None and isinstance(model.packed.source, ExpertCache)
    return model.packed.source


@torch.inference_mode()
@pytest.mark.parametrize("slots", range(1, EXPERTS))
def test_any_room_gives_the_same_numbers(folder: Path, whole: Transformer, slots: int) -> None:
    """Of whole sequences, and of pieces and single tokens with a cache."""
    ours, ids = bounded(folder, slots), tokens(2, 50)
    assert torch.equal(ours(ids), whole(ids))
    caches = [KVCache(CONFIG, torch.bfloat16).rows([KVCache(CONFIG).open(50) for _ in range(2)]) for _ in range(2)]
    for first, end in pairwise([0, 30, 40, 41, 42, 50]):
        here = torch.arange(first, end).expand(2, -1)
        found, expected = (
            model(ids[:, first:end], here, cache) for model, cache in zip((ours, whole), caches, strict=True)
        )
        assert torch.equal(found, expected)
    counts = source(ours).counts
    assert counts.read >= EXPERT and counts.there + counts.guessed <= counts.wanted


def test_all_the_room_is_no_bound(folder: Path, whole: Transformer) -> None:
    assert whole.packed is not None and whole.packed.source is None
    model = bounded(folder, EXPERTS)
    assert model.packed is not None and model.packed.source is None


def test_what_stays_in_memory_is_read_once(folder: Path) -> None:
    """One token after the other uses six experts each; with room for all but one, hardly any is read twice."""
    ours, little = bounded(folder, EXPERTS - 1), bounded(folder, 6)
    for model in (ours, little):
        generate(model, [[3]], max_tokens=30)
    assert source(ours).counts.read < source(little).counts.read
    assert source(ours).counts.there > source(little).counts.there


@pytest.mark.parametrize("slots", [1, 5, 9])
def test_an_engine_makes_the_same_tokens(folder: Path, whole: Transformer, slots: int) -> None:
    prompts = [row.tolist() for row in tokens(5, 23)]
    assert generate(bounded(folder, slots), prompts, max_tokens=12) == generate(whole, prompts, max_tokens=12)


def test_requests_can_be_cancelled(folder: Path, whole: Transformer) -> None:
    engine = Engine(bounded(folder, 4))
    kept, dropped = (engine.submit(Request([token, 5, 8], 9)) for token in (1, 2))
    engine.step()
    engine.cancel(dropped)
    found = [token.id for token in stream(engine) if token.request == kept]
    assert found == generate(whole, [[1, 5, 8]], max_tokens=9)[0][1:]


class Interrupted(ExpertCache):
    """Like a user who does not want to wait."""

    def load(self, layer: int, wanted: object, x_ND: Tensor) -> Generator[Mapping[int, Mlp], None, None]:
        if layer == 3:
            raise KeyboardInterrupt
        yield from super().load(layer, wanted, x_ND)  # type: ignore[arg-type]


@torch.inference_mode()
@pytest.mark.parametrize("slots", [1, 6])
def test_an_interrupt_leaves_a_model_that_can_be_used(folder: Path, whole: Transformer, slots: int) -> None:
    ours, ids = bounded(folder, slots), tokens(1, 20)
    cache = source(ours)
    cache.__class__ = Interrupted
    with pytest.raises(KeyboardInterrupt):
        ours(ids)
    cache.__class__ = ExpertCache
    assert torch.equal(ours(ids), whole(ids))


@torch.inference_mode()
def test_threads_take_turns(folder: Path, whole: Transformer) -> None:
    ours, inputs = bounded(folder, 3), [tokens(1, 30, seed) for seed in range(4)]
    found: list[Tensor | None] = [None] * 4

    def run(at: int) -> None:
        with torch.inference_mode():
            found[at] = ours(inputs[at])

    threads = [threading.Thread(target=run, args=(at,)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ids, states in zip(inputs, found, strict=True):
        assert states is not None and torch.equal(states, whole(ids))


def experts_threads() -> int:
    return sum(thread.name.startswith("experts") for thread in threading.enumerate())


@torch.inference_mode()
def test_threads_and_files_end_with_the_model(folder: Path) -> None:
    gc.collect()
    wait_for(lambda: experts_threads() == 0)
    files = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    model = bounded(folder, 2)
    model(tokens(1, 4))
    assert experts_threads() == offload.READERS
    del model
    gc.collect()
    wait_for(lambda: experts_threads() == 0)
    assert not files or len(os.listdir("/proc/self/fd")) == files


def wait_for(done: Callable[[], bool]) -> None:
    for _ in range(1000):
        if done():
            return
        time.sleep(0.01)
    raise AssertionError("not done after 10 s")


def layer_file(folder: Path) -> Path:
    """Of the last layer."""
    return folder / json.loads((folder / INDEX).read_text())["weight_map"]["model.layers.4.feed_forward.experts.0"]


def shorten(path: Path) -> None:
    os.truncate(path, 5000)


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


@torch.inference_mode()
@pytest.mark.parametrize("change", [shorten, touch])
@pytest.mark.parametrize("slots", [1, 7])
def test_a_file_that_changes_is_an_error(
    folder: Path, whole: Transformer, tmp_path: Path, change: Callable[[Path], None], slots: int
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    ours, ids = bounded(copy, slots), tokens(1, 20)
    change(layer_file(copy))
    for _ in range(2):
        with pytest.raises(CheckpointError, match=f"{layer_file(copy).name} was changed while the model was in use"):
            ours(ids)
    # Who replaces a file does not change the one that is open.
    ours, path = bounded(folder, slots), layer_file(folder)
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    assert torch.equal(ours(ids), whole(ids))


@torch.inference_mode()
def test_file_systems_that_always_cache(folder: Path, whole: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = os.open

    def refusing(path: str, flags: int, *more: int) -> int:
        if flags & getattr(os, "O_DIRECT", 0):
            raise OSError(22, "Invalid argument")
        return usual(path, flags, *more)

    monkeypatch.setattr(os, "open", refusing)
    ours = bounded(folder, 2)
    assert torch.equal(ours(tokens(1, 9)), whole(tokens(1, 9)))
