"""FP8 checkpoints of compressed-tensors and in FBGEMM's layout, and experts that are stored one by one."""

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Llama4ForConditionalGeneration
from transformers.integrations import fbgemm_fp8

from herd import checkpoint
from herd.checkpoint.convert import convert
from herd.errors import CheckpointError, ConfigError
from tests.checkpoint.tiny_llama4 import tensors, tiny_llama4


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp8") / "hf"
    tiny_llama4(num_hidden_layers=8).save_pretrained(folder)
    return folder


def one_by_one(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts as linear layers of their own, [out, in], as llm-compressor has them."""
    out = dict[str, Tensor]()
    for name, value in weights.items():
        prefix, _, leaf = name.rpartition(".")
        if not prefix.endswith(".experts"):
            out[name] = value
            continue
        fused = leaf == "gate_up_proj"
        parts = dict(zip(("gate", "up"), value.chunk(2, -1), strict=True)) if fused else {"down": value}
        for part, experts in parts.items():
            for e, expert in enumerate(experts):
                out[f"{prefix}.{e}.{part}_proj.weight"] = expert.T.contiguous()
    return out


def write(source: Path, out: Path, weights: dict[str, Tensor], **config) -> Path:
    out.mkdir()
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((source / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**raw, **config}))
    return out


def assert_same(path: Path, wanted: dict[str, Tensor]) -> None:
    with checkpoint.open_weights(path) as found:
        assert found.names == wanted.keys()
        for name, value in wanted.items():
            assert torch.equal(found.tensor(name), value), name
    checkpoint.load(path, check_finite=True)


def test_experts_one_by_one(plain, tmp_path):
    stored = one_by_one(load_file(plain / "model.safetensors"))
    raw = json.loads((plain / "config.json").read_text())
    text = {**raw["text_config"], "for_llm_compressor": True}
    assert_same(write(plain, tmp_path / "m", stored, text_config=text), tensors(plain))


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_compressed_tensors(plain, tmp_path, strategy):
    """Codes, scales and the values they stand for are compressed-tensors' own; attention is quantised, too."""
    args = QuantizationArgs(num_bits=8, type="float", strategy=strategy, symmetric=True)
    stored, wanted = dict[str, Tensor](), dict[str, Tensor]()
    for name, value in one_by_one(load_file(plain / "model.safetensors")).items():
        if "vision" in name or not any(part in name for part in (".experts.", ".shared_expert.", "self_attn")):
            stored[name] = wanted[name] = value
            continue
        ends = (value.amin(1, keepdim=True), value.amax(1, keepdim=True))
        ends = ends if strategy == "channel" else (value.min().view(1), value.max().view(1))
        scale, zero = calculate_qparams(*ends, args)
        stored[name] = quantize(value, scale, zero, args, dtype=torch.float8_e4m3fn)
        stored[f"{name}_scale"] = scale
        stored[f"{name.removesuffix('weight')}input_scale"] = torch.ones(1, dtype=torch.bfloat16)
        wanted[name] = dequantize(stored[name], scale, args=args)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    config = QuantizationConfig(config_groups={"group_0": scheme}, format="float-quantized", ignore=["lm_head"])
    path = write(plain, tmp_path / "m", stored, quantization_config=config.model_dump(mode="json"))
    assert_same(path, together(wanted))


def together(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    out, experts = dict[str, Tensor](), dict[str, dict[str, Tensor]]()
    for name, value in weights.items():
        name = name.removeprefix("language_model.")
        prefix, found, rest = name.partition(".experts.")
        if found:
            experts.setdefault(prefix + ".experts", {})[rest] = value
        else:
            out[name] = value
    for prefix, parts in experts.items():
        count = len(parts) // 3
        gates, ups, downs = ([parts[f"{e}.{x}_proj.weight"].T for e in range(count)] for x in ("gate", "up", "down"))
        out[f"{prefix}.gate_up_proj"] = torch.cat([torch.stack(gates), torch.stack(ups)], -1)
        out[f"{prefix}.down_proj"] = torch.stack(downs)
    return out


def test_fbgemm_layout(plain, tmp_path):
    """What is written has the names, shapes and types of transformers' module, and its values read back."""
    convert(plain, tmp_path / "fp8", format="hf", dtype="fp8")
    stored = {
        n.removeprefix("language_model."): t for n, t in load_file(tmp_path / "fp8" / "model.safetensors").items()
    }
    original, wanted = tensors(plain), dict[str, Tensor]()
    for name, value in original.items():
        if ".experts." in name and ".layers.7." not in name:  # the last layer's stay as they are
            columns = value.float().transpose(1, 2)  # one factor for each output
            factor = columns.abs().amax(-1, keepdim=True) / 448
            codes = (columns / factor).to(torch.float8_e4m3fn)
            assert torch.equal(stored[name].view(torch.uint8), codes.transpose(1, 2).contiguous().view(torch.uint8))
            shape = (4, value.shape[2], 1) if "down" in name else (4, 1, value.shape[2])
            assert stored[f"{name}_scale"].shape == shape and stored[f"{name}_scale"].dtype == torch.float32
            wanted[name] = (codes.float() * factor).bfloat16().transpose(1, 2)
            assert (wanted[name].float() - value.float()).norm() < 0.03 * value.float().norm()
        else:
            wanted[name] = value
    assert sum(value.dtype == torch.float8_e4m3fn for value in stored.values()) == 6
    assert_same(tmp_path / "fp8", wanted)


def test_fbgemm_modules_of_transformers(plain, tmp_path, monkeypatch):
    """transformers, told by our config.json, replaces just the modules with FP8 weights, and knows every name."""
    convert(plain, tmp_path / "fp8", format="hf", dtype="fp8")
    stored = load_file(tmp_path / "fp8" / "model.safetensors")
    raw = json.loads((tmp_path / "fp8" / "config.json").read_text())
    monkeypatch.setattr(fbgemm_fp8, "get_quantize_fp8_per_row", lambda: None)  # needs a GPU
    monkeypatch.setattr(fbgemm_fp8, "init_empty_weights", lambda **_: torch.device("meta"), raising=False)
    config = Llama4ForConditionalGeneration.config_class.from_pretrained(tmp_path / "fp8")
    del config.quantization_config
    with torch.device("meta"):
        model = Llama4ForConditionalGeneration(config)
    kept = raw["quantization_config"]["modules_to_not_convert"]
    fbgemm_fp8.replace_with_fbgemm_fp8_linear(model, kept, pre_quantized=True)
    theirs = {name.replace("model.language_model", "language_model"): p for name, p in model.named_parameters()}
    assert theirs.keys() == stored.keys()
    for name, parameter in theirs.items():
        assert stored[name].shape == parameter.shape, name
        assert (stored[name].dtype == torch.float8_e4m3fn) == (parameter.dtype == torch.float8_e4m3fn), name


def drop(name):
    return lambda w: w.pop(name)


FP8 = "language_model.model.layers.3.feed_forward.experts.down_proj"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop(f"{FP8}_scale"), "there is no .*down_proj_scale"),
        (
            lambda w: w.update({f"{FP8}_scale": torch.ones(4, 3, 1)}),
            r"down_proj_scale .* shape \[4, 3, 1\]; one factor",
        ),
        (lambda w: w.update({f"{FP8}_scale": torch.ones(1, dtype=torch.int8)}), "down_proj_scale"),
        (lambda w: w.update(odd_scale=torch.ones(1)), "odd_scale"),
    ],
)
def test_damaged_scales(plain, tmp_path, damage, message):
    convert(plain, tmp_path / "fp8", format="hf", dtype="fp8")
    stored = load_file(tmp_path / "fp8" / "model.safetensors")
    damage(stored)
    save_file(stored, tmp_path / "fp8" / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(tmp_path / "fp8")


def test_damaged_experts(plain, tmp_path):
    stored = one_by_one(load_file(plain / "model.safetensors"))
    name = FP8.replace("down_proj", "2.up_proj.weight")
    lost = write(plain, tmp_path / "lost", {n: t for n, t in stored.items() if n != name})
    with pytest.raises(CheckpointError, match="not numbered from 0 without gaps"):
        checkpoint.load(lost)
    odd = write(plain, tmp_path / "odd", {**stored, name: torch.ones(3, 64, dtype=torch.bfloat16)})
    with pytest.raises(CheckpointError, match="differ in shape or type"):
        checkpoint.load(odd)


def test_other_quantisations_are_named(plain, tmp_path):
    folder = write(plain, tmp_path / "m", tensors(plain), quantization_config={"quant_method": "gptq"})
    with pytest.raises(ConfigError, match="quantised by 'gptq'; compressed-tensors and fbgemm_fp8 can be read"):
        checkpoint.load(folder)
