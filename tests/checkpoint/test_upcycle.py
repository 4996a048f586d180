"""Upcycling keeps the function of a dense Llama, in Herd and when transformers loads the result."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Llama4ForCausalLM, LlamaForCausalLM

from herd import checkpoint
from herd.errors import CheckpointError
from herd.prompt import Tokenizer
from tests.checkpoint.tiny_llamas import CHATML, tiny_llama, write_gguf

CHUNK = 24


def logits(model, ids):
    with torch.no_grad():
        out = model(ids)
    return out if isinstance(out, torch.Tensor) else out.logits


def check_same_function(source: LlamaForCausalLM, out: Path, bound: float = 1e-4) -> None:
    ids = torch.randint(0, source.config.vocab_size, (2, CHUNK), generator=torch.Generator().manual_seed(3))
    wanted = logits(source, ids)
    assert wanted.std() > 0.1
    theirs = Llama4ForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert theirs.config.layer_types.count("full_attention") == 1
    assert [theirs.config.layer_types.index("full_attention")] == theirs.config.moe_layers
    assert (logits(theirs, ids) - wanted).abs().max() <= bound
    assert (logits(checkpoint.load(out, torch.float32), ids) - wanted).abs().max() <= bound


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("global_layer", "extra_local"), [(1, True), (2, False), (3, True), (4, False)])
def test_function_is_kept(tmp_path, tied, global_layer, extra_local):
    source = tiny_llama(tie_word_embeddings=tied)
    source.save_pretrained(tmp_path / "llama")
    config = checkpoint.upcycle(
        tmp_path / "llama", tmp_path / "out", global_layer=global_layer, chunk=CHUNK, extra_local=extra_local
    )
    assert config.global_layers == (global_layer + extra_local,)
    assert config.num_hidden_layers == 5 + extra_local
    assert config.eos_token_id == (2,)
    check_same_function(source, tmp_path / "out")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 4},
        {"head_dim": 16},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ],
    ids=["all heads", "wide heads", "llama3 scaling"],
)
def test_function_is_kept_for_other_attention(tmp_path, changes):
    source = tiny_llama(**changes)
    source.save_pretrained(tmp_path / "llama", max_shard_size="20KB")
    assert len(list((tmp_path / "llama").glob("*.safetensors"))) > 1
    checkpoint.upcycle(tmp_path / "llama", tmp_path / "out", global_layer=2, chunk=CHUNK, shard_bytes=30_000)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1
    check_same_function(source, tmp_path / "out")


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_1"])
@pytest.mark.parametrize("tied", [True, False])
def test_function_is_kept_from_gguf(tmp_path, kind, tied):
    source = tiny_llama(tie_word_embeddings=tied, hidden_size=64)
    path = write_gguf(source, tmp_path / "m.gguf", kind)
    checkpoint.upcycle(path, tmp_path / "out", global_layer=2, chunk=CHUNK)
    if kind in ("F32", "F16"):
        check_same_function(source, tmp_path / "out", 1e-4 if kind == "F32" else 0.1)
    else:  # rounded weights: the same as transformers computes from the same rounded weights
        check_same_function(_rounded(source, tmp_path / "out"), tmp_path / "out")


def _rounded(source: LlamaForCausalLM, out: Path) -> LlamaForCausalLM:
    """The source with weights taken back from the upcycled folder, rows of q and k in the order of halves."""
    stored = load_file(out / "model.safetensors")
    weights = {name: stored[name] for name in ("model.embed_tokens.weight", "model.norm.weight")}
    weights |= {"lm_head.weight": stored.get("lm_head.weight", stored["model.embed_tokens.weight"])}
    for layer in range(4):
        target = layer if layer < 2 else layer + 2
        for name, original in source.model.layers[layer].state_dict().items():
            value = stored[f"model.layers.{target}.{name.replace('mlp', 'feed_forward')}"]
            if name.split(".")[-2] in ("q_proj", "k_proj"):
                value = value.unflatten(0, (-1, 8, 2)).transpose(1, 2).flatten(0, 2)
            assert (value - original).abs().max() < 0.3
            weights[f"model.layers.{layer}.{name}"] = value
    source.load_state_dict(weights)
    return source


def test_gguf_tokenizer(tmp_path):
    path = write_gguf(tiny_llama(), tmp_path / "m.gguf")
    checkpoint.upcycle(path, tmp_path / "out", global_layer=2, chunk=CHUNK)
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert tokenizer.eos_ids == [2]
    assert tokenizer.decode(tokenizer.encode("the the\n 2024 ünï 🦙")) == "the the\n 2024 ünï 🦙"
    assert tokenizer.encode(" the") == [len(tokenizer) - 1]
    assert tokenizer.chat([{"role": "user", "content": "a"}])[0] == 1


def test_new_weights(tmp_path):
    source = tiny_llama()
    source.save_pretrained(tmp_path / "llama")
    for out, dtype in (("a", torch.bfloat16), ("b", None)):
        checkpoint.upcycle(
            tmp_path / "llama", tmp_path / out, global_layer=2, chunk=CHUNK, dtype=dtype, experts=3, expert_width=6
        )
    rounded, full = (load_file(tmp_path / out / "model.safetensors") for out in "ab")
    assert {t.dtype for t in rounded.values()} == {torch.bfloat16}
    assert all(torch.equal(full[name].bfloat16(), rounded[name]) for name in full)
    moe = "model.layers.3.feed_forward."
    assert full[moe + "experts.gate_up_proj"].shape == (3, 32, 12)
    assert 0.015 < full[moe + "experts.gate_up_proj"].std() < 0.025
    for silent in (
        f"{moe}experts.down_proj",
        f"{moe}shared_expert.down_proj.weight",
        "model.layers.3.self_attn.o_proj.weight",
        "model.layers.2.self_attn.o_proj.weight",
        "model.layers.2.feed_forward.down_proj.weight",
    ):
        assert not full[silent].any()
    assert torch.equal(full["model.layers.2.self_attn.q_proj.weight"], full["model.layers.1.self_attn.q_proj.weight"])
    assert torch.equal(full["model.layers.3.self_attn.k_proj.weight"], full["model.layers.4.self_attn.k_proj.weight"])


def test_chat_template_can_be_replaced(tmp_path):
    path = write_gguf(tiny_llama(), tmp_path / "m.gguf")
    checkpoint.upcycle(path, tmp_path / "out", global_layer=2, chunk=CHUNK, chat_template="{{ messages[0].content }}")
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text())["chat_template"] != CHATML
    assert Tokenizer.load(tmp_path / "out").chat([{"role": "user", "content": " the"}]) == [261]


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: change_config(f, model_type="qwen2"), "qwen2"),
        (lambda f: change_config(f, attention_bias=True), "attention_bias"),
        (lambda f: change_config(f, hidden_size="wide"), "does not describe a Llama"),
        (lambda f: change_config(f, rope_scaling={"rope_type": "yarn", "factor": 2.0}), "yarn"),
        (lambda f: change_weights(f, lambda w: w.pop("model.norm.weight")), "lacks 1 tensors, first model.norm.weight"),
        (lambda f: change_weights(f, lambda w: w.update(odd=torch.ones(1))), "odd"),
        (lambda f: change_weights(f, lambda w: w["model.norm.weight"].fill_(torch.nan)), "model.norm.weight.*finite"),
        (
            lambda f: change_weights(f, lambda w: w.update({"model.norm.weight": torch.ones(3)})),
            r"model.norm.weight has shape \[3\]; config.json says \[32\]",
        ),
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("["), "not readable JSON"),
        (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors nor"),
    ],
)
def test_bad_sources(tmp_path, damage, message):
    tiny_llama().save_pretrained(tmp_path / "llama")
    damage(tmp_path / "llama")
    with pytest.raises(CheckpointError, match=message):
        checkpoint.upcycle(tmp_path / "llama", tmp_path / "out", global_layer=2, chunk=CHUNK)
    assert [p.name for p in tmp_path.iterdir()] == ["llama"]


def test_bad_arguments(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "llama")
    for wrong in (0, 5):
        with pytest.raises(CheckpointError, match=f"global_layer is {wrong}; the source has 4 layers"):
            checkpoint.upcycle(tmp_path / "llama", tmp_path / "out", global_layer=wrong, chunk=CHUNK)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(CheckpointError, match="exists already"):
        checkpoint.upcycle(tmp_path / "llama", tmp_path / "out", global_layer=2, chunk=CHUNK)
    with pytest.raises(CheckpointError, match="nowhere"):
        checkpoint.upcycle(tmp_path / "nowhere", tmp_path / "out2", global_layer=2, chunk=CHUNK)
