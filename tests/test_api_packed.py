"""Packed folders from Python: loaded like any other, with as much memory as they are given."""

import os
from pathlib import Path

import pytest
import torch

import herd
from herd import kernels
from herd.checkpoint.files import copy_companions
from herd.errors import CheckpointError, ConfigError
from tests.checkpoint.tiny_packed import CONFIG, pack_folder, plain_folder
from tests.model.tiny_models import tiny

pytestmark = pytest.mark.skipif(
    not kernels.runs_layers(torch.empty(0), 64), reason="the native library is not used on this machine"
)
IDS = list(range(40, 90))


@pytest.fixture(scope="module")
def plain(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("api") / "plain"
    plain_folder(folder, tiny(**{**vars(CONFIG), "vocab_size": 259}))
    copy_companions(tiny_model, folder)
    return folder


@pytest.fixture(scope="module")
def packed(plain: Path) -> Path:
    return pack_folder(plain, plain.parent / "packed", "int4")


def bounded(model: herd.Model) -> bool:
    assert model.transformer.packed is not None
    return model.transformer.packed.source is not None


def test_a_packed_folder_is_loaded_like_any_other(plain: Path, packed: Path) -> None:
    found, expected = herd.load(packed), herd.load(f"{plain}@int4")
    assert torch.equal(found.logits(IDS), expected.logits(IDS)) and not bounded(found)
    assert found.fingerprint == herd.load(packed, memory="1G").fingerprint != expected.fingerprint
    assert found.tokenizer.encode("a b") == expected.tokenizer.encode("a b")


@pytest.mark.parametrize("memory", ["310K", 310 << 10])
def test_memory_is_bounded_by_argument_or_variable(
    packed: Path, memory: str | int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = herd.load(packed)
    found = herd.load(packed, memory=memory)
    assert bounded(found) and torch.equal(found.logits(IDS), whole.logits(IDS))
    monkeypatch.setenv("HERD_MEMORY", str(memory))
    assert bounded(herd.load(packed)) and not bounded(herd.load(packed, memory="1G"))


def test_a_bounded_model_reads_and_answers(packed: Path, tmp_path: Path) -> None:
    """Where a context attends, layers are run in halves."""
    notes = tmp_path / "gate.txt"
    notes.write_text("The code of the north gate is 4711.\n")
    answers = []
    for memory in ("310K", None):
        context = herd.Context.open(tmp_path / str(memory), herd.load(packed, memory=memory))
        context.read([notes])
        answers.append(context.ask("What is the code of the north gate?", max_tokens=9))
    (text, weights), expected = ((x.text, [c.weight for c in x.citations]) for x in answers)
    assert (text, weights) == expected


def test_what_cannot_be_is_refused(plain: Path, packed: Path) -> None:
    with pytest.raises(CheckpointError, match=r"need [\d,]+ bytes of memory at least; there are 1,024"):
        herd.load(packed, memory="1Ki")
    with pytest.raises(ConfigError, match="memory is 'much'; give a number above 0, such as 80G"):
        herd.load(packed, memory="much")
    with pytest.raises(ConfigError, match="packed: they have their format"):
        herd.load(f"{packed}@int8")
    with pytest.raises(ConfigError, match="packed: they have their format"):
        herd.load(packed, dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="memory can be bounded for packed folders"):
        herd.load(plain, memory="1G")
    assert "HERD_MEMORY" not in os.environ
