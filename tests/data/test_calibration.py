"""Text for calibration: rows of one length, the same each time, nothing of what evaluations read."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import herd
from herd.data import calibration
from herd.data.calibration import default_rows, rows_of_file
from herd.errors import SourceError


@pytest.fixture
def model(tiny_model: Path) -> herd.Model:
    return herd.load(tiny_model)


ROWS = 6  # some have no questions, and are left out


def test_rows_are_of_one_length_and_the_same_again(model: herd.Model) -> None:
    tokenizer, cfg = model.tokenizer, replace(model.config, attention_chunk_size=512)
    rows = default_rows(tokenizer, cfg, ROWS)
    assert 1 < len(rows) <= ROWS and rows.shape[1] == 512 + calibration._ASKED
    assert int(rows.max()) < cfg.vocab_size
    assert torch.equal(rows, default_rows(tokenizer, cfg, ROWS))
    assert not torch.equal(rows, default_rows(tokenizer, cfg, ROWS, seed=1))
    assert 0 < int((rows[:, 0] == tokenizer.bos_id).sum()) < len(rows)
    for ids in rows.tolist():
        chunk, asked = (tokenizer.decode(part, keep_special=True) for part in (ids[:512], ids[512:]))
        assert ".py:" in chunk, "the chunk's header"
        assert asked.startswith("<|im_start|>user\n") and "<|im_start|>assistant\n" in asked


def test_a_tokenizer_without_the_prompt_format_gets_text_alone(
    model: herd.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(model.tokenizer), "special_tokens", {})
    assert default_rows(model.tokenizer, model.config, 3).shape == (3, 64)


def test_rows_of_a_file(model: herd.Model, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("The gate is open. " * 200)
    cfg = replace(model.config, attention_chunk_size=48)
    rows, first = rows_of_file(file, model.tokenizer, cfg, rows=4), calibration._begin(model.tokenizer)
    assert rows.shape == (4, 48) and rows[:, : len(first)].tolist() == [first] * 4
    text = model.tokenizer.decode(rows[:, len(first) :].flatten().tolist())
    assert file.read_text().startswith(text)


def test_a_file_that_cannot_be_calibrated_on_is_refused(model: herd.Model, tmp_path: Path) -> None:
    short, binary = tmp_path / "short.txt", tmp_path / "binary"
    short.write_text("The gate.")
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SourceError, match=r"short.txt has \d+ tokens; .* give a text of 64 or more"):
        rows_of_file(short, model.tokenizer, model.config)
    for path in (binary, tmp_path / "none"):
        with pytest.raises(SourceError, match="cannot calibrate on"):
            rows_of_file(path, model.tokenizer, model.config)
