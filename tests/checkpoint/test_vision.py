"""Image encoders that transformers wrote, loaded beside the text model."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Llama4ForConditionalGeneration

from herd import checkpoint
from herd.checkpoint.vision import load_vision
from herd.errors import CheckpointError
from tests.checkpoint import tiny_llama4
from tests.model.test_vision_parity import prompt, transformers_model
from tests.model.tiny_models import build, tiny
from tests.model.tiny_vision import TINY, build_vision, patches, tiles


@pytest.fixture(scope="module")
def theirs() -> Llama4ForConditionalGeneration:
    return transformers_model(build(tiny()), build_vision())


@pytest.mark.parametrize("shard", ["1GB", "40KB"])
@torch.inference_mode()
def test_a_folder_of_transformers(theirs: Llama4ForConditionalGeneration, shard: str, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "40KB")
    model, vision = checkpoint.load(tmp_path), load_vision(tmp_path)
    assert vision is not None and vision.config == TINY and not vision.training
    ids, pixels = prompt([1, 2]), tiles(3)
    expected = theirs(ids, pixel_values=pixels).logits
    assert (model(ids, patches=patches(ids, vision.features(pixels))) - expected).abs().max() <= 1e-4


def test_types(theirs: Llama4ForConditionalGeneration, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path)
    for asked, found in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        vision = load_vision(tmp_path, asked)
        assert vision is not None and {p.dtype for p in vision.parameters()} == {found}


def test_a_text_model_has_none(tmp_path: Path) -> None:
    checkpoint.save(build(tiny()), tmp_path)
    assert load_vision(tmp_path) is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vision_model.class_embedding", "lacks the tensor vision_model.class_embedding of shape"),
        ("multi_modal_projector.linear_1.weight", r"linear_1.weight in .* has shape \[3\]; the configuration asks for"),
    ],
)
def test_what_does_not_fit_is_named(
    theirs: Llama4ForConditionalGeneration, name: str, message: str, tmp_path: Path
) -> None:
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    if "lacks" in message:
        del weights[name]
    else:
        weights[name] = torch.zeros(3)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        load_vision(tmp_path)


@torch.inference_mode()
def test_all_formats_see_the_same(tmp_path: Path) -> None:
    """A folder of transformers, eight shards of Meta's and GGUF files."""
    tiny_llama4.tiny_llama4().save_pretrained(tmp_path / "hf")
    tiny_llama4.write_tokenizer(tmp_path / "hf")
    weights = tiny_llama4.tensors(tmp_path / "hf")
    meta = tiny_llama4.write_meta(weights, tmp_path / "meta", 8)
    (tmp_path / "gguf").mkdir()
    tiny_llama4.write_gguf(weights, tmp_path / "gguf" / "model.gguf")
    tiny_llama4.write_mmproj(weights, tmp_path / "gguf" / "mmproj-model.gguf")
    theirs = Llama4ForConditionalGeneration.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    pixels = tiles(3)
    expected = theirs.multi_modal_projector(theirs.get_image_features(pixels, return_dict=True).last_hidden_state)
    assert expected.std() > 0.1
    for folder in (tmp_path / "hf", meta, tmp_path / "gguf"):
        vision = load_vision(folder, torch.float32)
        assert vision is not None
        assert (vision.features(pixels) - expected.flatten(0, 1)).abs().max() <= 1e-4
