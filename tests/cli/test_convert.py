"""`herd convert` and what `herd info` says of checkpoints in each format."""

import json
from pathlib import Path

import pytest
import torch

import herd
from herd import checkpoint
from herd.cli.main import run
from tests.checkpoint import tiny_llama4
from tests.cli.running import fails, run_json


def test_convert_and_describe(capsys: pytest.CaptureFixture[str], plain: Path, tmp_path: Path) -> None:
    gguf = tmp_path / "g" / "m.gguf"
    made = run_json(capsys, "convert", plain, gguf, "--format", "gguf", "--dtype", "int8", "--json")
    assert made["format"] == "GGUF" and made["types"].keys() == {"Q8_0", "F32"}
    both = run_json(capsys, "info", tmp_path / "g", "--json")
    original = run_json(capsys, "info", plain, "--json")
    for key in ("parameters", "active_parameters", "image_parameters", "all_parameters", "layer_map", "context"):
        assert both[key] == original[key], key
    assert original["weight_bytes"] == 2 * original["all_parameters"] == sum(original["bytes"].values())
    assert original["types"] == {"BF16": original["weight_bytes"]}
    assert both["bytes"]["routed_experts"] == original["bytes"]["routed_experts"] * 34 // 64
    assert both["bytes"]["vision"] >= original["bytes"]["vision"]
    assert run(["convert", str(plain), str(tmp_path / "fp8"), "--format", "hf", "--dtype", "fp8"]) == 0
    assert f"{tmp_path / 'fp8'}: " in capsys.readouterr().out
    meta = tiny_llama4.write_meta(tiny_llama4.tensors(plain), tmp_path / "meta", 2)
    assert run_json(capsys, "info", meta, "--json")["format"] == "Meta"


def test_convert_to_a_packed_folder(capsys: pytest.CaptureFixture[str], plain: Path, tmp_path: Path) -> None:
    made = run_json(capsys, "convert", plain, tmp_path / "int4", "--format", "herd", "--dtype", "int4:32", "--json")
    original = run_json(capsys, "info", plain, "--json")
    assert made["format"] == "Herd, packed"
    assert made["parameters"] == original["parameters"]
    assert made["bytes"]["vision"] == original["bytes"]["vision"]
    assert 0 < made["bytes"]["dense"] < original["bytes"]["dense"]
    assert herd.load(tmp_path / "int4").logits([1, 2, 3]).isfinite().all()
    error = fails(capsys, "convert", tmp_path / "int4", tmp_path / "out", "--format", "hf", "--dtype", "bf16")
    assert "packed for Herd's kernels; use the checkpoint that it was made of" in error


def test_calibrated_weights(capsys: pytest.CaptureFixture[str], plain: Path, tmp_path: Path) -> None:
    """They are not the nearest ones, and any checkpoint can be calibrated whose vocabulary is known."""
    text, short = tmp_path / "text", tmp_path / "short"
    text.write_text("aab abba ünï " * 100)
    short.write_text("a")
    checkpoint.convert(plain, tmp_path / "g.gguf", format="gguf")
    checkpoint.convert(plain, tmp_path / "rounded", format="herd", dtype="int4:32")
    options = ("--format", "herd", "--dtype", "int4:32", "--calibrate")
    for source, out in ((plain, tmp_path / "of-folder"), (tmp_path / "g.gguf", tmp_path / "of-file")):
        assert run(["convert", str(source), str(out), *options, str(text)]) == 0
        assert herd.load(out).fingerprint != herd.load(tmp_path / "rounded").fingerprint
    capsys.readouterr()
    assert "1 tokens" in fails(capsys, "convert", plain, tmp_path / "out", *options, short)
    options = ("--format", "hf", "--calibrate")
    assert "only packed folders" in fails(capsys, "convert", plain, tmp_path / "out", *options, text)


def test_models_of_each_format_are_used_alike(plain: Path, tmp_path: Path) -> None:
    """Text and images; a GGUF file has its vocabulary inside."""
    checkpoint.convert(plain, tmp_path / "g" / "m.gguf", format="gguf")
    wanted = herd.load(plain)
    for path in (tmp_path / "g", tmp_path / "g" / "m.gguf"):
        model = herd.load(path)
        ids = model.tokenizer.encode("aab ünï")
        assert ids == wanted.tokenizer.encode("aab ünï")
        assert model.generate(ids, max_tokens=8).ids == wanted.generate(ids, max_tokens=8).ids
        assert (model.vision is None) == path.is_file()
        assert model.tokenizer.eos_ids == wanted.tokenizer.eos_ids


def test_a_folder_of_meta_with_its_tokenizer(
    capsys: pytest.CaptureFixture[str], plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tokenizer.model goes along, and a tokenizer.json is made of it."""
    meta = tiny_llama4.write_meta(tiny_llama4.tensors(plain), tmp_path / "meta", 1)
    (meta / "tokenizer.model").write_bytes(b"ranks")
    loaded = herd.prompt.Tokenizer.load(plain)
    monkeypatch.setattr(herd.prompt.Tokenizer, "load", lambda folder: loaded)
    assert run(["convert", str(meta), str(tmp_path / "hf"), "--format", "hf"]) == 0
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == b"ranks"
    made = json.loads((tmp_path / "hf" / "tokenizer.json").read_text())
    assert made["model"] == json.loads((plain / "tokenizer.json").read_text())["model"]
    assert run(["convert", str(meta), str(tmp_path / "m.gguf"), "--format", "gguf"]) == 0
    capsys.readouterr()
    assert torch.equal(checkpoint.load(tmp_path / "m.gguf")(tiny_llama4.IDS), checkpoint.load(meta)(tiny_llama4.IDS))


def test_errors_are_one_line(capsys: pytest.CaptureFixture[str], plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "it can be hf, gguf, herd" in fails(capsys, "convert", plain, out, "--format", "onnx")
    assert "needs a type, such as int8" in fails(capsys, "convert", plain, out, "--format", "herd")
    assert "weights cannot be 'int7'" in fails(capsys, "convert", plain, out, "--format", "herd", "--dtype", "int7")
    assert "hf cannot hold int4" in fails(capsys, "convert", plain, out, "--format", "hf", "--dtype", "int4")
    assert "not a folder or a GGUF file" in fails(capsys, "convert", tmp_path / "none", out, "--format", "hf")
    assert "not a folder or a GGUF file" in fails(capsys, "info", tmp_path / "none")
    assert not list(tmp_path.iterdir())


def test_licence(capsys: pytest.CaptureFixture[str], plain: Path, tmp_path: Path) -> None:
    """Meta's vocabulary is of a size of its own; the note on the EU is for multimodal models."""
    scout = run_json(capsys, "info", "scout", "--json")
    assert scout["all_parameters"] == 108_641_793_536
    assert all(part in scout["licence"] for part in ("Llama 4 Community License", "700 million", "EU"))
    assert "licence" not in run_json(capsys, "info", plain, "--json")
    raw = json.loads((plain / "config.json").read_text())["text_config"]
    (tmp_path / "config.json").write_text(json.dumps({**raw, "vocab_size": 202048}))
    text = run_json(capsys, "info", tmp_path, "--json")
    assert "Built with Llama" in text["licence"] and "EU" not in text["licence"]
