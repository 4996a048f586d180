"""The same weights in the formats of Hugging Face, Meta and llama.cpp are the same model to Herd."""

import json
import sys
from dataclasses import replace
from types import ModuleType
from unittest import mock

import gguf
import pytest
import torch

from herd import checkpoint
from herd.config import SCOUT, RopeScaling
from herd.errors import CheckpointError
from tests.checkpoint import tiny_llama4
from tests.checkpoint.tiny_llama4 import IDS, tensors
from tests.checkpoint.tiny_llama4 import tiny_llama4 as tiny
from tests.model import meta_reference


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder of transformers and its tensors."""
    folder = tmp_path_factory.mktemp("formats") / "hf"
    tiny().save_pretrained(folder)
    tiny_llama4.write_tokenizer(folder)
    return folder, tensors(folder)


def logits(path, dtype=None):
    with torch.no_grad():
        return checkpoint.load(path, dtype, check_finite=True)(IDS)


def assert_same(path, weights, *, dtype=torch.bfloat16) -> None:
    with checkpoint.open_weights(path) as found:
        assert found.names == weights.keys()
        for name, value in weights.items():
            assert found.shape(name) == tuple(value.shape), name
            assert torch.equal(found.tensor(name, dtype), value.to(dtype)), name


def test_hugging_face(world):
    folder, weights = world
    assert_same(folder, weights)
    with checkpoint.open_weights(folder) as found:
        assert found.vision is not None and found.dtype == torch.bfloat16
        assert found.text.num_parameters() + found.vision.num_parameters(64) == sum(t.numel() for t in weights.values())
    theirs = tiny(torch.float32)
    with torch.no_grad():
        assert (logits(folder, torch.float32) - theirs(input_ids=IDS).logits).abs().max() < 0.05
    full = folder.parent / "full"
    theirs.save_pretrained(full)
    with torch.no_grad():
        assert (logits(full) - theirs(input_ids=IDS).logits).abs().max() < 1e-4


@pytest.mark.parametrize("shards", [1, 2, 8])
def test_meta(world, tmp_path, shards):
    folder, weights = world
    meta = tiny_llama4.write_meta(weights, tmp_path / "meta", shards, nested=shards == 2)
    assert_same(meta, weights)
    assert torch.equal(logits(meta), logits(folder))
    with checkpoint.open_weights(meta) as found, checkpoint.open_weights(folder) as original:
        named = replace(found.text, bos_token_id=500, eos_token_id=(501,), pad_token_id=502)
        lists = {"moe_layers": original.text.moe_layers, "no_rope_layers": original.text.no_rope_layers}
        assert replace(named, **lists) == original.text
        assert found.vision == original.vision
    assert len(checkpoint.fingerprint(meta)) == 64


@pytest.mark.parametrize("shards", [2, 8])
def test_shards_are_those_of_meta(world, tmp_path, shards):
    """What the tests write is put together by Meta's own code to what a single GPU holds."""
    initialize = ModuleType("fairscale.nn.model_parallel.initialize")
    initialize.get_model_parallel_rank = initialize.get_model_parallel_world_size = None
    names = ("fairscale", "fairscale.nn", "fairscale.nn.model_parallel")
    with mock.patch.dict(sys.modules, {**{n: ModuleType(n) for n in names}, initialize.__name__: initialize}):
        from llama_models.checkpoint import convert_moe_weights, reshard_mp
    _, weights = world
    parts = [convert_moe_weights(tiny_llama4.meta_shard(weights, rank, shards), 4) for rank in range(shards)]
    whole = convert_moe_weights(tiny_llama4.meta_shard(weights, 0, 1), 4)
    found = reshard_mp(parts, size=1, rank=0)
    assert found.keys() == whole.keys()
    for name, value in whole.items():
        assert torch.equal(found[name], value), name


def test_meta_in_meta_code(world, tmp_path):
    """Meta's model, built from the same params.json and loaded with the same shard, gives the same logits."""
    _, weights = world
    meta = tiny_llama4.write_meta({n: t.float() for n, t in weights.items()}, tmp_path / "meta", 1)
    module = meta_reference.load()
    params = json.loads((meta / "params.json").read_text())
    del params["vision_args"]
    args = module.ModelArgs(**params, vocab_size=512, max_batch_size=1, max_seq_len=64)
    shard = tiny_llama4.meta_shard({n: t.float() for n, t in weights.items()}, 0, 1)
    with mock.patch.object(torch.Tensor, "cuda", lambda tensor: tensor):
        theirs = module.Transformer(args).eval()
    theirs.load_state_dict({n: t for n, t in shard.items() if not n.startswith("vision")}, strict=True)
    wanted = theirs(module.TransformerInput(tokens=IDS, tokens_position=0)).logits
    assert (logits(meta) - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["BF16", "F32", "F16", "Q8_0", "Q4_0"])
def test_gguf(world, tmp_path, kind):
    folder, weights = world
    (tmp_path / "m").mkdir()
    path = tiny_llama4.write_gguf(weights, tmp_path / "m" / "model.gguf", kind)
    tiny_llama4.write_mmproj(weights, tmp_path / "m" / "mmproj-model.gguf", "F32")
    if kind in ("BF16", "F32"):
        assert_same(tmp_path / "m", weights)
        assert torch.equal(logits(tmp_path / "m", torch.bfloat16), logits(folder))
        assert torch.equal(logits(path, torch.float32), logits(folder, torch.float32))
    else:
        rounded = {n: _rounded(n, t, kind) for n, t in weights.items()}
        assert_same(tmp_path / "m", rounded, dtype=torch.float32)
        assert (logits(path, torch.float32) - logits(folder, torch.float32)).abs().max() > 0
    with checkpoint.open_weights(tmp_path / "m") as found, checkpoint.open_weights(folder) as original:
        lists = {"moe_layers": original.text.moe_layers, "no_rope_layers": original.text.no_rope_layers}
        assert replace(found.text, **lists) == original.text
        assert found.vision == original.vision
        assert found.dtype == {"F32": torch.float32, "F16": torch.float16}.get(kind, torch.bfloat16)
        assert {"tokenizer.json", "tokenizer_config.json"} <= found.tokenizer().keys()
    with checkpoint.open_weights(path) as found:
        assert found.vision is None
    assert len({checkpoint.fingerprint(path), checkpoint.fingerprint(tmp_path / "m")}) == 2


def _rounded(name, value, kind):
    """As the gguf library rounds matrices, whose rows are outputs."""
    if value.ndim == 1 or name.endswith("router.weight") or name.startswith(("vision", "multi")):
        return value.float()
    expert = ".experts." in name
    rows = (value.transpose(1, 2) if expert else value).float().contiguous().numpy()
    wanted = gguf.GGMLQuantizationType[kind]
    back = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(rows, wanted), wanted))
    return back.transpose(1, 2) if expert else back


def test_gguf_without_chunks(world, tmp_path):
    """A sliding window of 0 means attention to everything, by positions, in every layer."""
    _, weights = world
    path = tiny_llama4.write_gguf(weights, tmp_path / "m.gguf", attention__sliding_window=0)
    config = checkpoint.read_config(path)
    assert config.attention_chunk_size is None and not config.global_layers and not config.attn_temperature_tuning


def test_split_gguf(world, tmp_path):
    folder, weights = world
    whole = tiny_llama4.write_gguf(weights, tmp_path / "whole.gguf")
    reader = gguf.GGUFReader(whole)
    out = tmp_path / "split"
    out.mkdir()
    writer = gguf.GGUFWriter(out / "m.gguf", "llama4", split_max_tensors=20)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            sub = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    tiny_llama4._finish(writer)
    parts = sorted(out.iterdir())
    assert len(parts) > 2
    assert torch.equal(logits(parts[0]), logits(folder))
    assert torch.equal(logits(out), logits(folder))
    with pytest.raises(CheckpointError, match=r"one of \d+ parts"):
        checkpoint.load(parts[1])
    parts[-1].unlink()
    with pytest.raises(CheckpointError, match=f"{parts[-1].name} is not beside it"):
        checkpoint.load(parts[0])


K_QUANTS = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


@pytest.mark.parametrize("kind", K_QUANTS)
def test_k_quants(tmp_path, kind):
    """Random codes, with float16 factors at their places in each block of 256, are read as the gguf library does."""
    wanted = gguf.GGMLQuantizationType[kind]
    size = gguf.GGML_QUANT_SIZES[wanted][1]
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama4")
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (3, 8, 2 * size), generator=generator, dtype=torch.uint8)
    for at in K_QUANTS[kind]:
        for block in (0, size):
            blocks[..., block + at : block + at + 2] = torch.tensor([0.01], dtype=torch.float16).view(torch.uint8)
    writer.add_tensor("t.weight", blocks.numpy(), raw_dtype=wanted)
    tiny_llama4._finish(writer)
    from herd.checkpoint.gguf_file import GgufFile

    file = GgufFile(tmp_path / "m.gguf")
    expected = torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), wanted))
    assert expected.isfinite().all() and expected.std() > 0
    assert torch.equal(file.values("t.weight"), expected)
    assert torch.equal(file.rows("t.weight", 8, 8), expected[1])
    assert file.dtype("t.weight") == torch.bfloat16


def test_meta_params_of_the_releases(tmp_path):
    """The formula for widths gives Scout's, and use_scaled_rope alone means Scout's scaling."""
    from herd.checkpoint.meta_config import read_params

    moe = {"num_experts": 16, "capacity_factor": 1.0, "interleave_moe_layer_step": 1}
    sizes = {
        "dim": 5120,
        "n_layers": 48,
        "n_heads": 40,
        "n_kv_heads": 8,
        "multiple_of": 2048,
        "ffn_dim_multiplier": 1.2,
    }
    flags = {"ffn_exp": 4, "use_scaled_rope": True, "nope_layer_interval": 4, "use_qk_norm": True}
    raw = {**sizes, **flags, "attention_chunk_size": 8192, "moe_args": moe, "rope_theta": 500000.0, "norm_eps": 1e-5}
    (tmp_path / "params.json").write_text(json.dumps(raw))
    found, vision = read_params(tmp_path, 202048)
    assert found == SCOUT and vision is None
    assert found.rope_scaling == RopeScaling(16.0, 1.0, 1.0, 8192)
