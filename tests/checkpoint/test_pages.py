"""Loading takes one layer at a time: no more of a checkpoint is in memory as it was, be it copied or mapped."""

import re
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bench import load as sources
from bench.checkpoints import MID
from herd import checkpoint, kernels
from herd.formats import parse
from herd.kernels.heap import forget
from herd.model import Transformer
from herd.model.quantized import Fill, quantize
from tests.model.tiny_models import tokens

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="needs /proc"),
    pytest.mark.skipif(not kernels.runs_layers(torch.empty(0), 64), reason="needs the native library"),
]
CONFIG = replace(
    MID,
    vocab_size=1024,
    hidden_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    head_dim=64,
    intermediate_size=512,
    intermediate_size_mlp=768,
    num_local_experts=4,
)
LAYER = 2 * (CONFIG.num_parameters() - 2 * CONFIG.vocab_size * CONFIG.hidden_size) // CONFIG.num_hidden_layers
SLACK = 512 << 10  # around what is read, the system maps 64 KiB that it has: at most so much beside all layers


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sources")


def in_memory(folder: Path) -> int:
    """Bytes of mapped files below a folder that are in this process's memory."""
    parts = re.split(r"^[0-9a-f]+-[0-9a-f]+ ", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    sizes = (re.search(r"^Rss: +(\d+) kB", part, re.MULTILINE) for part in parts if f" {folder}/" in part)
    return sum(int(size[1]) << 10 for size in sizes if size is not None)


@pytest.mark.parametrize("formats", ["bf16", "int4"])
@pytest.mark.parametrize("source", sources.SOURCES)
def test_one_layer_at_a_time(work: Path, source: str, formats: str) -> None:
    path = sources.write(source, work, CONFIG)
    mapped, alive = list[int](), list[int]()
    blocks = list[weakref.ref[nn.Module]]()

    def change(model: Transformer, fill: Fill) -> None:
        blocks.extend(weakref.ref(block) for block in model.blocks)

        def watched(module: nn.Module, prefix: str) -> None:
            mapped.append(in_memory(work))
            alive.append(sum(block() is not None for block in blocks))
            fill(module, prefix)

        quantize(model, parse(formats), watched)

    loaded = checkpoint.load(path, torch.bfloat16, change=change)
    assert alive == [4, 3, 2, 1, 0]  # before each layer, and before the head
    assert max(mapped) <= LAYER + SLACK < 1.5 * LAYER
    assert in_memory(work) <= SLACK
    expected = checkpoint.load(path, torch.bfloat16)
    quantize(expected, parse(formats))
    with torch.inference_mode():
        assert torch.equal(loaded(tokens(1, 20)), expected(tokens(1, 20)))


def test_forgetting_loses_nothing(tmp_path: Path) -> None:
    """Of a tensor that does not fill whole pages, of rows of it, and of what is not contiguous, too."""
    values = torch.randn(4, 40_001)
    save_file({"x": torch.ones(3, dtype=torch.uint8), "values": values}, tmp_path / "model.safetensors")
    with checkpoint.files.WeightFiles.of_file(tmp_path / "model.safetensors") as files:
        found = files.tensor("values")
        for part in (found, found[1:3], found.T, found[:, ::2], found[0, :5]):
            assert torch.equal(found, values)
            before = in_memory(tmp_path)
            forget(part)
            if part.is_contiguous() and part.nbytes > 1 << 16:
                assert in_memory(tmp_path) <= before - part.nbytes + (8 << 10)
        assert torch.equal(found, values)
        files.forget("x")
        files.forget("values")
        assert in_memory(tmp_path) <= 8 << 10
        assert torch.equal(found, values)
