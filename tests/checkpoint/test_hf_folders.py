"""Folders of transformers load bit by bit, and ours load in transformers; what does not fit is refused by name."""

import importlib
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import Llama4Config, Llama4ForCausalLM, Llama4ForConditionalGeneration, Llama4TextConfig

from herd import checkpoint
from herd.errors import CheckpointError, HerdError

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 24,
    "intermediate_size_mlp": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 4,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": 16,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "eos_token_id": [2, 3],
}
IDS = torch.tensor([[5, 4, 9, 7, 40, 33, 2, 1]])


def their_model(dtype=torch.float32, **changes) -> Llama4ForCausalLM:
    torch.manual_seed(0)
    model = Llama4ForCausalLM(Llama4TextConfig(**{**SIZES, **changes})).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def assert_equal_weights(ours, theirs) -> None:
    wanted = dict(theirs.named_parameters())
    found = dict(ours.named_parameters())
    assert found.keys() == wanted.keys()
    for name, parameter in wanted.items():
        assert found[name].dtype == parameter.dtype, name
        assert torch.equal(found[name], parameter), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard", ["20KB", "5GB"])
def test_round_trip_both_ways(tmp_path, dtype, tied, shard):
    theirs = their_model(dtype, tie_word_embeddings=tied)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    ours = checkpoint.load(tmp_path / "theirs")
    assert not ours.training
    assert_equal_weights(ours, theirs)

    checkpoint.save(ours, tmp_path / "ours", shard_bytes=20_000 if shard == "20KB" else 10**9)
    assert (tmp_path / "ours" / "model.safetensors.index.json").exists() == (shard == "20KB")
    back = Llama4ForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert back.dtype == dtype
    assert_equal_weights(checkpoint.load(tmp_path / "ours"), back)
    assert_equal_weights(ours, back)
    with torch.no_grad():
        theirs = Llama4ForCausalLM.from_pretrained(tmp_path / "theirs").eval()  # .to() above also rounds its angles
        assert torch.equal(back(IDS).logits, theirs(IDS).logits)
    assert back.config.moe_layers == theirs.config.moe_layers
    assert back.config.no_rope_layers == theirs.config.no_rope_layers
    assert back.config.rope_parameters["rope_theta"] == theirs.config.rope_parameters["rope_theta"]


@pytest.mark.parametrize("scaled", [True, False])
def test_configs_of_transformers_4_and_5(tmp_path, scaled):
    scaling = {"factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0, "original_max_position_embeddings": 32}
    rope = {"rope_type": "llama3", **scaling} if scaled else {"rope_type": "default"}
    theirs = their_model(rope_parameters={"rope_theta": 777.0, **rope})
    theirs.save_pretrained(tmp_path)
    wanted = theirs(IDS).logits
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())
    assert "rope_parameters" in raw
    new = checkpoint.load(tmp_path)
    del raw["rope_parameters"], raw["layer_types"], raw["moe_layers"]
    path.write_text(json.dumps({**raw, "rope_theta": 777.0, "rope_scaling": rope if scaled else None}))
    old = checkpoint.load(tmp_path)
    assert new.config.rope_theta == old.config.rope_theta == 777.0
    assert new.config.rope_scaling == old.config.rope_scaling
    with torch.no_grad():
        assert torch.equal(new(IDS), old(IDS))
        assert (new(IDS) - wanted).abs().max() < 1e-4


def test_multimodal_folder_gives_its_text_model(tmp_path):
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    vision |= {"image_size": 28, "patch_size": 14, "vision_output_dim": 16, "projector_input_dim": 16}
    vision |= {"projector_output_dim": 16}
    config = Llama4Config(text_config=SIZES, vision_config=vision)
    theirs = Llama4ForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = checkpoint.load(tmp_path)
    wanted = {n: p for n, p in theirs.named_parameters() if "vision" not in n and "projector" not in n}
    found = {n.removeprefix("model."): p for n, p in ours.named_parameters()}
    assert len(found) == len(wanted)
    for name, parameter in wanted.items():
        assert torch.equal(parameter, found[name.removeprefix("language_model.").removeprefix("model.")]), name
    with torch.no_grad():
        assert (ours(IDS) - theirs(input_ids=IDS).logits).abs().max() < 1e-4


def test_dtype_on_load(tmp_path):
    their_model(torch.bfloat16).save_pretrained(tmp_path)
    assert {p.dtype for p in checkpoint.load(tmp_path, torch.float32).parameters()} == {torch.float32}


def test_stored_tied_head(tmp_path):
    their_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    change_weights(tmp_path, lambda w: w.update({"lm_head.weight": embedding.clone()}))
    model = checkpoint.load(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    change_weights(tmp_path, lambda w: w["lm_head.weight"].add_(1))
    with pytest.raises(CheckpointError, match=r"different lm_head\.weight"):
        checkpoint.load(tmp_path)


def test_save_replaces_and_keeps_companions(tmp_path):
    their_model().save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    model = checkpoint.load(tmp_path / "m")
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    wanted = model.model.norm.weight.clone()
    checkpoint.save(model, tmp_path / "m", companions_of=tmp_path / "m")  # while mapped
    assert torch.equal(checkpoint.load(tmp_path / "m").model.norm.weight, wanted)
    assert (tmp_path / "m" / "tokenizer.json").read_text() == "{}"
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_remains_of_a_killed_process_are_cleared(tmp_path):
    their_model().save_pretrained(tmp_path / "m")
    model = checkpoint.load(tmp_path / "m")
    dead = 2**22 + 1  # beyond the largest process id
    (tmp_path / f".m.new-{dead}").mkdir()
    (tmp_path / "m").rename(tmp_path / f".m.old-{dead}")  # killed between moving the old and placing the new
    checkpoint.save(model, tmp_path / "m")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def change_weights(folder: Path, change) -> None:
    weights = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_index(folder: Path, change) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    change(index)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


ROUTER = "model.layers.1.feed_forward.router.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: change_weights(f, lambda w: w.pop(ROUTER)), rf"lacks the tensor {ROUTER} of shape \[4, 32\]"),
        (
            lambda f: change_weights(f, lambda w: w.update({ROUTER: torch.ones(4, 31)})),
            rf"{ROUTER} in .* has shape \[4, 31\]; the configuration asks for \[4, 32\]",
        ),
        (lambda f: change_weights(f, lambda w: w.update(odd=torch.ones(1))), "has 1 tensors the model does not.* odd"),
        (
            lambda f: change_weights(f, lambda w: w.update({ROUTER: torch.ones(4, 32, dtype=torch.int8)})),
            f"{ROUTER}.*type I8",
        ),
        (lambda f: (f / "config.json").write_text("{}"), "model_type"),
        (lambda f: (f / "config.json").write_text('{"a": NaN'), "not readable JSON"),
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "model.safetensors").unlink(), "neither"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 100), "not a readable safetensors file"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "not a readable safetensors file"),
    ],
)
def test_misfits(tmp_path, damage, message):
    their_model().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(HerdError, match=message) as caught:
        checkpoint.load(tmp_path)
    assert "\n" not in str(caught.value)


def _swap(index: dict) -> None:
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"][ROUTER] = files[index["weight_map"][ROUTER] == files[0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i["weight_map"].update({ROUTER: "../evil.safetensors"}), "evil.safetensors.*beside it"),
        (lambda i: i["weight_map"].update({ROUTER: "/etc/passwd"}), "beside it"),
        (lambda i: i["weight_map"].update({ROUTER: "..\\evil.safetensors"}), "beside it"),
        (lambda i: i["weight_map"].update({ROUTER: 7}), "beside it"),
        (lambda i: i["weight_map"].update({ROUTER: "gone.safetensors"}), "gone.safetensors"),
        (lambda i: i["weight_map"].pop(ROUTER), f"disagree on 1 tensors, first '{ROUTER}'"),
        (_swap, "disagree"),
        (lambda i: i.pop("weight_map"), "no weight_map"),
    ],
)
def test_lying_index(tmp_path, change, message):
    their_model().save_pretrained(tmp_path, max_shard_size="20KB")
    change_index(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(tmp_path)


def test_a_tensor_under_two_names(tmp_path):
    their_model().save_pretrained(tmp_path)
    change_weights(tmp_path, lambda w: w.update({f"language_model.{ROUTER}": w[ROUTER].clone()}))
    with pytest.raises(CheckpointError, match=f"has {ROUTER} with and without the prefix"):
        checkpoint.load(tmp_path)


def test_not_finite(tmp_path):
    their_model().save_pretrained(tmp_path)
    change_weights(tmp_path, lambda w: w[ROUTER].fill_(torch.inf))
    checkpoint.load(tmp_path)
    with pytest.raises(CheckpointError, match=f"{ROUTER} .* not finite"):
        checkpoint.load(tmp_path, check_finite=True)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    their_model().save_pretrained(folder)
    return folder


@settings(max_examples=100, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_garbled_weight_file(tmp_path, good, data):
    whole = (good / "model.safetensors").read_bytes()
    bad = bytearray(whole[: data.draw(st.sampled_from([len(whole), len(whole) - 1, 5000, 7]))])
    for _ in range(data.draw(st.integers(0, 3))):
        bad[data.draw(st.integers(0, min(len(bad), 4000) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "config.json").write_bytes((good / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(bad)
    try:
        checkpoint.load(tmp_path)
    except CheckpointError:
        return
    assert len(bad) == len(whole)


def test_fingerprint(tmp_path):
    theirs = their_model()
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    one = checkpoint.fingerprint(tmp_path / "one")
    assert len(one) == 64
    assert checkpoint.fingerprint(tmp_path / "many") == one
    assert checkpoint.fingerprint(tmp_path / "one") == one

    change_weights(tmp_path / "one", lambda w: w[ROUTER][0, :1].add_(1e-3))
    other = checkpoint.fingerprint(tmp_path / "one")
    assert other != one
    raw = json.loads((tmp_path / "many" / "config.json").read_text())
    (tmp_path / "many" / "config.json").write_text(json.dumps({**raw, "attn_scale": 0.2}))
    assert checkpoint.fingerprint(tmp_path / "many") not in (one, other)


def test_fingerprint_is_cached_while_files_are_unchanged(tmp_path, monkeypatch):
    their_model().save_pretrained(tmp_path)
    old = 1_000_000_000
    os.utime(tmp_path / "model.safetensors", ns=(old, old))
    first = checkpoint.fingerprint(tmp_path)
    module = importlib.import_module("herd.checkpoint.fingerprint")
    monkeypatch.setattr(module, "_hash_tensors", lambda folder: "hashed again")
    assert checkpoint.fingerprint(tmp_path) == first
    os.utime(tmp_path / "model.safetensors", ns=(old, old + 1))
    assert checkpoint.fingerprint(tmp_path) != first
    (tmp_path / "fingerprint.json").write_text("garbage")
    assert checkpoint.fingerprint(tmp_path) != first
