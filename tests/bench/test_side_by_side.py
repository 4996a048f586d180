"""The benchmark beside peers, with a tiny model and Herd alone: no peer is installed, nothing is timed that matters."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from bench import checkpoints, limits, side_by_side
from bench.side_by_side import Case
from herd.checkpoint import load
from herd.config import TextConfig

PEAKS = {"read_bytes_per_s": 1e10, "bf16_ops_per_s": 1e11, "int8_ops_per_s": 1e12}


@pytest.mark.parametrize("sequences", [1, 3])
def test_measures_herd_and_says_who_cannot_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], sequences: int
) -> None:
    case = Case("tiny", sequences, 300, 3, ("herd int8", "llama.cpp Q8_0"), alone=sequences > 1)
    monkeypatch.setitem(side_by_side.CASES, "tiny", case)
    monkeypatch.setattr(side_by_side.limits, "measure", lambda threads: PEAKS)
    monkeypatch.setattr(side_by_side, "PARITY_TOKENS", 64)
    options = ["--cases", "tiny", "--peers", "herd", "--rounds", "2", "--threads", "1"]
    side_by_side.main([*options, "--build", str(tmp_path / "build"), "--out", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())["cases"]["tiny"]["subjects"]
    assert [run["prompt"] for run in found["herd int8"]["runs"]] == [300, 300]
    assert found["llama.cpp Q8_0"] == {"refused": "left out by --peers"}
    assert "cannot: left out by --peers" in capsys.readouterr().out


def test_other_log_probabilities_end_it() -> None:
    agreed = side_by_side._difference("x", [-1.0] * 2000, [-1.0001] * 1999 + [-2.0])
    assert isinstance(agreed, dict)
    assert agreed["share_above"] == 1 / 2000
    with pytest.raises(SystemExit, match="x computes something else"):
        side_by_side._difference("x", [-1.0, -2.0], [-1.0, -2.1])


def test_gguf_and_folder_hold_the_same_weights(tmp_path: Path) -> None:
    cfg = checkpoints.TINY
    folder = checkpoints.write_folder(cfg, tmp_path / "tiny", dtype=torch.float32)
    file = checkpoints.write_gguf(folder, tmp_path / "tiny.gguf", "F32")
    model, reader = load(folder), gguf.GGUFReader(file)
    tensors = {t.name: t.data for t in reader.tensors}
    assert sum(t.size for t in tensors.values()) == sum(p.numel() for p in model.parameters())
    experts = model.blocks[1].feed_forward.experts
    up = experts.gate_up_proj[3, :, cfg.intermediate_size :].T
    np.testing.assert_array_equal(tensors["blk.1.ffn_up_exps.weight"][3], up.detach().numpy())
    np.testing.assert_array_equal(tensors["blk.1.ffn_down_exps.weight"][3], experts.down_proj[3].T.detach().numpy())


def test_needs_of_a_model() -> None:
    cfg = TextConfig(
        vocab_size=10,
        hidden_size=4,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=2,
        intermediate_size=3,
        intermediate_size_mlp=3,
        num_local_experts=0,
        num_experts_per_tok=1,
        max_position_embeddings=100,
        nope_layer_interval=2,
        attention_chunk_size=8,
    )
    weights = cfg.num_parameters() - 40
    assert limits.decode_bytes(cfg, 8, 8, 9) == weights + (2 + 10) * 4  # the local layer sees its own chunk only
    pairs = (8 * 8 + 2 * 2) / 2 + 10 * 10 / 2
    assert limits.prefill_operations(cfg, 10) == 2 * (weights - 40) * 10 + 80 + 16 * pairs
