"""`Model` with images: a multimodal folder that transformers wrote, asked with files."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from PIL import Image
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

import herd
from herd.cli.main import run
from herd.errors import PromptError, SourceError
from herd.media import cut, open_image
from herd.prompt.images import expand
from tests.model.test_vision_parity import transformers_model
from tests.model.tiny_models import build, tiny
from tests.model.tiny_vision import build_vision, tiny_vision

NAMES = ["<|image_start|>", "<|image_end|>", "<|image|>", "<|patch|>", "<|tile_x_separator|>", "<|tile_y_separator|>"]
SPECIAL = {name: 256 + number for number, name in enumerate(NAMES)}
VISION = tiny_vision(boi_token_index=256, eoi_token_index=257, image_token_index=259)
TEXT = tiny(vocab_size=262, eos_token_id=(0,), max_position_embeddings=4096)
PLACE = SPECIAL["<|image|>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    transformers_model(build(TEXT), build_vision(VISION)).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = tokenizers.Tokenizer(models.BPE(vocab={char: id for id, char in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(NAMES)
    core.save(str(folder / "tokenizer.json"))
    part = "{% if part.type == 'image' %}<|image|>{% else %}{{ part.text }}{% endif %}"
    parts = "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}" + part
    template = "{% for m in messages %}" + parts + "{% endfor %}{% endif %}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> herd.Model:
    return herd.load(folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of one tile, and of two and the whole."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, size in (("small.png", (20, 28)), ("wide.jpg", (56, 20))):
        pixels = np.random.default_rng(size[0]).integers(0, 256, (*reversed(size), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return [folder / "small.png", folder / "wide.jpg"]


def transformers_logits(folder: Path, ids: list[int], pictures: list[Path]) -> Tensor:
    theirs = transformers_model(build(TEXT), build_vision(VISION))
    seen = [cut(open_image(picture), VISION) for picture in pictures]
    ids = expand(ids, [(tiles.rows, tiles.columns) for tiles in seen], SPECIAL, VISION.tokens_per_tile)
    with torch.inference_mode():
        return theirs(torch.tensor([ids]), pixel_values=torch.cat([tiles.pixels_NCYX for tiles in seen])).logits[0]


def test_logits_equal_transformers(folder: Path, model: herd.Model, pictures: list[Path]) -> None:
    assert model.vision is not None and model.vision.config == VISION
    ids = [5, PLACE, 6, 7, PLACE, 8]
    expected = transformers_logits(folder, ids, pictures)
    assert len(expected) == 4 + (3 + 4) + (3 + 2 + 3 * 4)
    assert (model.logits(ids, pictures) - expected).abs().max() <= 1e-4
    assert (model.logits(ids, pictures[::-1])[-1] - expected[-1]).abs().max() > 1e-2, "their order counts"


def test_a_conversation_with_images(folder: Path, model: herd.Model, pictures: list[Path]) -> None:
    said = [{"type": "text", "text": "What is "}, {"type": "image"}, {"type": "text", "text": "?"}, {"type": "image"}]
    ids = model.tokenizer.chat([{"role": "user", "content": said}])
    assert ids.count(PLACE) == 2
    made = model.generate(ids, images=[pictures[1], pictures[0].read_bytes()], max_tokens=5)
    assert made.ids[0] == int(transformers_logits(folder, ids, pictures[::-1])[-1].argmax())
    expanded, _ = model.look(ids, pictures[::-1])
    assert model.generate(expanded, images=pictures[::-1], max_tokens=5) == made, (
        "ids with patches are taken as they are"
    )


def test_text_that_names_a_token_is_no_place(model: herd.Model, pictures: list[Path]) -> None:
    ids = model.tokenizer.encode("<|image|> and <|patch|>")
    assert not set(ids) & set(SPECIAL.values())
    assert len(model.generate(ids, max_tokens=2).tokens) == 2
    with pytest.raises(PromptError, match=r"places for images .* in the prompt: 0; images given: 1"):
        model.generate(ids, images=pictures[:1], max_tokens=2)


def test_what_does_not_fit_is_refused(model: herd.Model, pictures: list[Path], tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"places for images \(<\|image\|>\) in the prompt: 1; images given: 2; give"):
        model.generate([1, PLACE], images=pictures, max_tokens=1)
    with pytest.raises(PromptError, match=r"in the prompt: 1; images given: 0"):
        model.generate([1, PLACE], max_tokens=1)
    with pytest.raises(PromptError, match=r"patches in the prompt: 3; of the images given: 0 \(images: 0\)"):
        model.generate([SPECIAL["<|patch|>"]] * 3, max_tokens=1)
    with pytest.raises(PromptError, match=r"patches in the prompt: 3; of the images given: 4 \(images: 1\)"):
        model.logits([SPECIAL["<|patch|>"]] * 3, pictures[:1])
    with pytest.raises(SourceError, match=r"cannot read .*missing\.png as an image"):
        model.generate([PLACE], images=[tmp_path / "missing.png"], max_tokens=1)


def test_a_text_model_sees_no_images(tiny_model: Path, pictures: list[Path]) -> None:
    model = herd.load(tiny_model)
    assert model.vision is None
    with pytest.raises(PromptError, match=r"this model has no image encoder; .* \(given: 2\)"):
        model.generate([1, 2], images=pictures, max_tokens=1)


def test_quantised_weights_see_images(folder: Path, model: herd.Model, pictures: list[Path]) -> None:
    """The encoder stays as it is stored (spec §7)."""
    rounded = herd.load(f"{folder}@int8:8")
    assert rounded.vision is not None and model.vision is not None
    for ours, theirs in zip(rounded.vision.parameters(), model.vision.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    ids = [5, PLACE, 6]
    difference = (rounded.logits(ids, pictures[:1]) - model.logits(ids, pictures[:1])).abs().mean()
    assert 0 < difference < 0.3


def test_chat_shows_images_with_the_first_line(
    folder: Path, model: herd.Model, pictures: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    options = [part for picture in pictures for part in ("--image", str(picture))]
    monkeypatch.setattr("sys.stdin", io.StringIO("What is it?\nAnd now?\n"))
    assert run(["chat", "--model", str(folder), "--max-tokens", "3", "--json", *options]) == 0
    turns = json.loads(capsys.readouterr().out)
    assert turns[0] == {"role": "user", "content": "What is it?", "images": [str(picture) for picture in pictures]}
    ids = [PLACE, PLACE, *model.tokenizer.encode("What is it?")]
    for turn in (1, 3):
        made = model.generate(ids, images=pictures, max_tokens=3)
        assert turns[turn]["content"] == made.text
        ids += model.tokenizer.encode(made.text) + model.tokenizer.encode("And now?")


def test_chat_refuses_images(
    folder: Path, pictures: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: Any, tmp_path: Path
) -> None:
    for options, message in (
        (["--image", str(tmp_path / "missing.png")], "cannot read"),
        (["--image", str(pictures[0]), "--context", str(tmp_path / "ctx")], "contexts are asked without images"),
    ):
        monkeypatch.setattr("sys.stdin", io.StringIO("What?\n"))
        assert run(["chat", "--model", str(folder), "--json", *options]) == 2
        assert message in capsys.readouterr().err


def test_an_image_in_memory(model: herd.Model) -> None:
    file = io.BytesIO()
    Image.new("RGBA", (9, 9), (255, 0, 0, 0)).save(file, "PNG")
    white = io.BytesIO()
    Image.new("RGB", (9, 9), (255, 255, 255)).save(white, "BMP")
    both = [model.logits([PLACE], [data.getvalue()]) for data in (file, white)]
    assert torch.equal(*both)
