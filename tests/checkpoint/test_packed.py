"""Folders of packed weights: the same model as in memory, and one clear error for what is no such folder."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from herd import checkpoint, kernels
from herd.checkpoint.convert import convert
from herd.checkpoint.files import INDEX
from herd.checkpoint.packed import EMBEDDING, NORM, Contents, write_packed
from herd.checkpoint.streaming import job
from herd.errors import CheckpointError, ConfigError
from herd.formats import Weights, parse
from herd.kernels.layers import PAGE
from herd.model import Transformer
from herd.model.calibrate import calibrate
from herd.model.quantized import pack_halves, quantize
from tests.checkpoint.tiny_packed import CONFIG, EXPERTS, pack_folder, plain_folder
from tests.model.tiny_models import build, tiny, tokens
from tests.model.tiny_vision import build_vision

pytestmark = pytest.mark.skipif(
    not kernels.runs_layers(torch.empty(0), 64), reason="the native library, which packs, is not used on this machine"
)
FORMATS = ("int4", "int4:24", "int8", "bf16", "fp8", "experts=int4,attention=int8")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder."""
    folder = tmp_path_factory.mktemp("plain") / "model"
    plain_folder(folder)
    return folder


@pytest.fixture
def packed(plain: Path, tmp_path: Path) -> Path:
    """A folder that a test may damage."""
    return pack_folder(plain, tmp_path / "packed", "int4")


def in_memory(plain: Path, formats: str) -> Transformer:
    model = checkpoint.load(plain)
    if formats == "bf16":
        pack_halves(model)
    else:
        quantize(model, parse(formats))
    return model


@torch.inference_mode()
@pytest.mark.parametrize("formats", [name for name in FORMATS if name != "fp8"])
def test_the_same_model_as_quantised_in_memory(plain: Path, tmp_path: Path, formats: str) -> None:
    found = checkpoint.load_packed(pack_folder(plain, tmp_path / "out", formats))
    expected, ids = in_memory(plain, formats), tokens(2, 90)
    assert torch.equal(found(ids), expected(ids))
    assert found.config == expected.config and not found.training
    assert checkpoint.load_packed_vision(tmp_path / "out") is None


@torch.inference_mode()
@pytest.mark.parametrize("formats", ["int4:24", "bf16", "experts=int4,attention=int8"])
def test_without_the_library_the_same_numbers(
    plain: Path, tmp_path: Path, formats: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, ids = pack_folder(plain, tmp_path / "out", formats), tokens(2, 30)
    monkeypatch.setenv("HERD_KERNELS", "reference")
    found, expected = checkpoint.load_packed(folder), checkpoint.load(plain)
    quantize(expected, parse(formats))
    assert found.packed is None
    assert torch.equal(found(ids), expected(ids))
    with pytest.raises(
        ConfigError, match="memory can be bounded where the native library runs the layers; here is reference"
    ):
        checkpoint.load_packed(folder, 1 << 20)


@torch.inference_mode()
def test_a_tied_head(tmp_path: Path) -> None:
    plain_folder(tmp_path / "plain", tiny(head_dim=64, tie_word_embeddings=True))
    folder = pack_folder(tmp_path / "plain", tmp_path / "packed", "int8")
    ids = tokens(1, 12)
    assert torch.equal(checkpoint.load_packed(folder)(ids), in_memory(tmp_path / "plain", "int8")(ids))


@torch.inference_mode()
def test_weights_that_are_packed_already_are_written_as_they_are(plain: Path, tmp_path: Path) -> None:
    model = in_memory(plain, "int8")
    assert model.packed is not None
    packed, out = model.packed, tmp_path / "out"
    plain = {EMBEDDING: model.model.embed_tokens.weight.detach(), NORM: packed.norm_D}
    types = {name: (x.dtype, x.shape) for name, x in plain.items()}
    layer, files = packed.layers.__getitem__, {"tokenizer.json": b"{}"}
    contents = Contents(CONFIG, parse("int8"), layer, lambda: packed.head, types, plain.__getitem__, files)
    with job(out, {}) as made:
        write_packed(contents, made)
    assert torch.equal(checkpoint.load_packed(out)(tokens(1, 9)), model(tokens(1, 9)))
    assert (out / "tokenizer.json").read_bytes() == b"{}"


@pytest.fixture
def multimodal(tmp_path: Path) -> Path:
    """A Hugging Face folder with an image encoder."""
    folder = tmp_path / "multimodal"
    folder.mkdir()
    text, vision = build(CONFIG), build_vision(hidden_size=CONFIG.hidden_size)
    tensors = {f"language_model.{name}": x.detach() for name, x in text.named_parameters()}
    save_file(tensors | {name: x.detach() for name, x in vision.named_parameters()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(vision.config.to_hf(CONFIG)))
    return folder


@torch.inference_mode()
def test_image_encoders_stay_as_they_are(multimodal: Path, tmp_path: Path) -> None:
    out = pack_folder(multimodal, tmp_path / "out", "int8")
    found, expected = checkpoint.load_packed_vision(out), checkpoint.load_vision(multimodal)
    assert found is not None and expected is not None and found.config == expected.config
    for (name, ours), (other, theirs) in zip(found.named_parameters(), expected.named_parameters(), strict=True):
        assert name == other and torch.equal(ours, theirs)
    assert torch.equal(checkpoint.load_packed(out)(tokens(1, 9)), in_memory(multimodal, "int8")(tokens(1, 9)))
    index = json.loads((out / INDEX).read_text())
    del index["weight_map"]["vision_model.class_embedding"]
    file = sorted(out.glob("*.safetensors"))[-1]
    save_file({name: x for name, x in load_file(file).items() if name != "vision_model.class_embedding"}, file)
    (out / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"lacks the tensor vision_model\.class_embedding"):
        checkpoint.load_packed_vision(out)


def test_other_software_reads_the_files_and_experts_are_whole_pages(packed: Path) -> None:
    index = json.loads((packed / INDEX).read_text())["weight_map"]
    found = 0
    for path in packed.glob("*.safetensors"):
        tensors = load_file(path)
        assert {name for name, file in index.items() if file == path.name} == set(tensors)
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        for name in tensors:
            first, end = (8 + length + at for at in header[name]["data_offsets"])
            if ".experts." in name:
                assert first % PAGE == 0 and end % PAGE == 0
                found += 1
    assert found == EXPERTS
    assert os.path.getsize(packed / index["model.layers.1.feed_forward.experts.0"]) < 1 << 20


def test_a_fingerprint_names_the_weights(plain: Path, packed: Path, tmp_path: Path) -> None:
    again = pack_folder(plain, tmp_path / "again", "int4")
    other = pack_folder(plain, tmp_path / "other", "int8")
    assert checkpoint.fingerprint(packed) == checkpoint.fingerprint(again) != checkpoint.fingerprint(other)


def test_a_folder_says_by_its_configuration_that_it_is_packed(plain: Path, packed: Path, tmp_path: Path) -> None:
    assert checkpoint.is_packed(packed) and not checkpoint.is_packed(plain) and not checkpoint.is_packed(tmp_path)
    assert checkpoint.read_config(packed) == checkpoint.read_config(plain)


def test_nothing_is_replaced_or_left_half_done(plain: Path, packed: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="exists already"):
        pack_folder(plain, packed, "int8")
    weights = load_file(plain / "model.safetensors")
    weights["model.layers.3.self_attn.q_proj.weight"][2, 5] = torch.nan
    broken = tmp_path / "broken"
    plain_folder(broken)
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.3\.self_attn\.q_proj\.weight .* not finite"):
        pack_folder(broken, tmp_path / "out", "int8")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.making", "broken", "packed"]  # layers 0 to 2


def test_sizes_that_a_format_cannot_have(tmp_path: Path) -> None:
    plain_folder(tmp_path / "plain", tiny(head_dim=64, intermediate_size=36))
    with pytest.raises(ConfigError, match="36 inputs; int4:64 needs a multiple of 8"):
        pack_folder(tmp_path / "plain", tmp_path / "out", "int4")


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 6, "no_rope_layers": None, "moe_layers": None}, "lacks the tensor"),
        ({"num_local_experts": 3}, r"router\.weight .* F32 \[4, 72\]; the configuration asks for F32 \[3, 72\]"),
        ({"vocab_size": 96}, "asks for"),
        ({"packed": {"version": 2}}, "version 2; this one reads 1"),
        ({"packed": {"version": 1, "experts": "int5"}}, "does not say how it is packed.*int5"),
        ({"packed": {"version": 1}}, "does not say how it is packed"),
        ({"packed": 4}, "does not say how it is packed"),
        ({"packed": dict.fromkeys(Weights().formats, "int8") | {"version": 1}}, "asks for U8"),
    ],
)
def test_a_configuration_that_does_not_fit(packed: Path, changes: dict[str, Any], message: str) -> None:
    change_config(packed, **changes)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load_packed(packed)


def test_missing_and_extra_tensors_are_named(packed: Path) -> None:
    index = json.loads((packed / INDEX).read_text())
    whole = {name: file for name, file in index["weight_map"].items() if "layers.4" not in name}
    (packed / INDEX).write_text(json.dumps({"weight_map": whole}))
    with pytest.raises(CheckpointError, match=r"lacks the tensor model\.layers\.4\."):
        checkpoint.load_packed(packed)
    (packed / INDEX).write_text(json.dumps(index))
    change_config(packed, num_hidden_layers=4, no_rope_layers=[1, 1, 0, 1], moe_layers=[1, 3])
    with pytest.raises(CheckpointError, match=r"tensors the model does not have, first model\.layers\.4\."):
        checkpoint.load_packed(packed)


@pytest.mark.parametrize("size", [0, 7, 100, 5000, -1])
def test_files_that_end_early(packed: Path, size: int) -> None:
    path = sorted(packed.glob("*.safetensors"))[2]
    os.truncate(path, size if size >= 0 else path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=path.name):
        checkpoint.load_packed(packed)


@torch.inference_mode()
@pytest.mark.parametrize("formats", ["int4:24", "experts=int4,attention=int8,global_attention=bf16"])
def test_a_folder_calibrated_layer_by_layer_is_the_calibrated_model(plain: Path, tmp_path: Path, formats: str) -> None:
    expected, rows = checkpoint.load(plain), tokens(4, 40)
    calibrate(expected, rows, parse(formats))
    convert(plain, tmp_path / "out", format="herd", dtype=formats, calibration=rows)
    found, ids = checkpoint.load_packed(tmp_path / "out"), tokens(2, 90)
    assert torch.equal(found(ids), expected(ids))
    assert not torch.equal(found(ids), in_memory(plain, formats)(ids))


def test_only_packed_folders_are_calibrated(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="only packed folders can be calibrated, not hf; leave the text out"):
        convert(plain, tmp_path / "out", format="hf", calibration=tokens(4, 40))
    assert not (tmp_path / "out").exists()
