"""The comparison of formats, with a tiny random model."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import herd
from herd import checkpoint, kernels
from herd import eval as evaluation
from herd.errors import ConfigError
from herd.eval import quantisation
from herd.eval.quantisation import Variant
from herd.model import Transformer
from tests.conftest import tiny_config

VARIANTS = (Variant("int8:32"), Variant("int4:32"), Variant("int4:32", True), Variant("experts=int4,shared=int4"))


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with heads that the native library takes, and chunks of 1,024 bytes."""
    if not kernels.runs_layers(torch.empty(0), 64):
        pytest.skip("the native library is not used here")
    folder = tmp_path_factory.mktemp("model") / "packable"
    torch.manual_seed(0)
    model = Transformer(replace(tiny_config(), head_dim=64, attention_chunk_size=1024))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    checkpoint.save(model.bfloat16(), folder)
    for file in tiny_model.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def test_each_format_is_compared_with_the_model_as_it_is_stored(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantisation, "VARIANTS", VARIANTS)
    monkeypatch.setattr(quantisation.calibration, "ROWS", 3)
    model, out = herd.load(f"{folder}@int8"), tmp_path / "result.json"
    result = evaluation.run("quantisation", model, lengths=[], trials=1, out=out, workdir=tmp_path, progress=print)
    assert json.loads(out.read_text()) == result and str(tmp_path) not in out.read_text()
    assert result["command"] == "herd eval quantisation --trials 1 --seed 0 --model packable@int8"
    exact, eight, four, calibrated, parts = result["results"][0]["variants"]
    assert (exact["weights"], exact["kl"], exact["same_next"]) == ("bf16", 0, 1)
    assert 0 < eight["kl"] < four["kl"] and 0 <= parts["kl"] < four["kl"] and 0 < calibrated["kl"] < four["kl"]
    assert exact["weight_bytes"] > eight["weight_bytes"] > four["weight_bytes"] == calibrated["weight_bytes"]
    assert [one["calibrated"] for one in result["results"][0]["variants"]] == [False, False, False, True, False]


def test_what_the_library_does_not_run_is_not_compared(tiny_model: Path, tmp_path: Path) -> None:
    model = herd.load(tiny_model)
    with pytest.raises(ConfigError, match="exceeds the local chunk 64"):
        evaluation.run("quantisation", model, lengths=[], workdir=tmp_path)
    with pytest.raises(ConfigError, match="quantisation is measured without a context; leave --length"):
        evaluation.run("quantisation", model, lengths=["4K"], workdir=tmp_path)
