"""Packed folders that are gone on with: no layer is made twice, and nothing of another job is taken."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from herd import checkpoint, kernels
from herd.checkpoint import packing, streaming
from herd.errors import CheckpointError
from tests.checkpoint.tiny_packed import CONFIG, plain_folder
from tests.model.tiny_models import tokens

pytestmark = pytest.mark.skipif(
    not kernels.runs_layers(torch.empty(0), 64), reason="the native library, which packs, is not used on this machine"
)
LAYERS = CONFIG.num_hidden_layers
INT4: dict[str, Any] = {"format": "herd", "dtype": "int4:24"}
CALIBRATED = {**INT4, "calibration": tokens(4, 40)}


class Stop(Exception):
    pass


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A folder that a test may change."""
    plain_folder(tmp_path / "plain")
    (tmp_path / "plain" / "tokenizer.json").write_text("{}")
    return tmp_path / "plain"


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers that were packed until now."""
    found, pack = list[int](), packing.pack_block

    def pack_block(block: Any, formats: Any) -> Any:
        found.append(block.self_attn.layer)
        return pack(block, formats)

    monkeypatch.setattr(packing, "pack_block", pack_block)
    return found


def interrupted(source: Path, out: Path, writes: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """A conversion that ends when so many tensors are written."""
    left = writes

    def write(tensor: Tensor) -> memoryview:
        nonlocal left
        left -= 1
        if left < 0:
            raise Stop
        return as_bytes(tensor)

    as_bytes = streaming.as_bytes
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(streaming, "as_bytes", write)
        checkpoint.convert(source, out, **options)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("options", [INT4, CALIBRATED], ids=["rounded", "calibrated"])
def test_the_same_bytes_wherever_it_was_interrupted(
    plain: Path, tmp_path: Path, packed: list[int], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    checkpoint.convert(plain, tmp_path / "whole", **options)
    wanted, out = content(tmp_path / "whole"), tmp_path / "out"
    tensors = [6, 11, 6, 11, 11, 3]  # of each file
    for writes in (0, 3, 6, 13, 17, 30, 40, 45, 47):
        interrupted(plain, out, writes, monkeypatch, **options)
        done = [at for at in range(LAYERS) if sum(tensors[: at + 1]) <= writes]
        packed.clear()
        checkpoint.convert(plain, out, **options)
        assert [*done, *packed] == list(range(LAYERS))
        assert content(out) == wanted
        assert not (tmp_path / ".out.making").exists()
        shutil.rmtree(out)


def test_another_type_or_text_begins_anew(
    plain: Path, tmp_path: Path, packed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for options in (INT4, {**INT4, "dtype": "int8"}, {**CALIBRATED, "calibration": tokens(4, 41)}):
        interrupted(plain, tmp_path / "out", 30, monkeypatch, **CALIBRATED)
        packed.clear()
        checkpoint.convert(plain, tmp_path / "out", **options)
        assert packed == list(range(LAYERS))
        checkpoint.convert(plain, tmp_path / "whole", **options)
        assert content(tmp_path / "out") == content(tmp_path / "whole")
        for name in ("out", "whole"):
            shutil.rmtree(tmp_path / name)


def other_weights(plain: Path) -> None:
    weights = load_file(plain / "model.safetensors")
    save_file({name: x.flip(0) for name, x in weights.items()}, plain / "model.safetensors", {"format": "pt"})


def same_weights_again(plain: Path) -> None:
    """Of which nothing but the time tells that they are the same."""
    os.utime(plain / "model.safetensors", ns=(0, 0))


def other_tokenizer(plain: Path) -> None:
    (plain / "tokenizer.json").write_text('{"version": "1.0"}')


@pytest.mark.parametrize("change", [other_weights, same_weights_again, other_tokenizer])
def test_another_source_begins_anew(
    plain: Path,
    tmp_path: Path,
    packed: list[int],
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], None],
) -> None:
    interrupted(plain, tmp_path / "out", 30, monkeypatch, **CALIBRATED)
    change(plain)
    packed.clear()
    checkpoint.convert(plain, tmp_path / "out", **CALIBRATED)
    assert packed == list(range(LAYERS))
    checkpoint.convert(plain, tmp_path / "whole", **CALIBRATED)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_finished_file_that_was_cut_off_is_noticed(
    plain: Path, tmp_path: Path, packed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(plain, tmp_path / "out", 30, monkeypatch, **CALIBRATED)
    file = tmp_path / ".out.making" / "result" / "model-00002-of-00006.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    packed.clear()
    checkpoint.convert(plain, tmp_path / "out", **CALIBRATED)
    assert packed == list(range(LAYERS))
    checkpoint.convert(plain, tmp_path / "whole", **CALIBRATED)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, 4), lambda path: os.truncate(path, 90)])
def test_states_that_are_gone_are_noticed(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None]
) -> None:
    interrupted(plain, tmp_path / "out", 30, monkeypatch, **CALIBRATED)
    for path in (tmp_path / ".out.making").glob("states-*"):
        damage(path)
    with pytest.raises(CheckpointError, match=r"\.out\.making cannot be gone on with: .*; remove it to begin anew"):
        checkpoint.convert(plain, tmp_path / "out", **CALIBRATED)
    assert not (tmp_path / "out").exists()
