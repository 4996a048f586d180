"""Conversions keep every value, say what they cannot keep, and go on where a killed one stopped."""

import importlib.metadata
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Llama4ForCausalLM, Llama4ForConditionalGeneration

from herd import checkpoint
from herd.checkpoint import streaming
from herd.checkpoint.convert import convert
from herd.checkpoint.gguf_file import GgufFile
from herd.checkpoint.gguf_tokenizer import tokenizer_files
from herd.checkpoint.gguf_vocabulary import add_vocabulary
from herd.config import SCOUT
from herd.errors import CheckpointError
from herd.prompt import Tokenizer
from tests.checkpoint import tiny_llama4
from tests.checkpoint.test_formats import assert_same, logits
from tests.checkpoint.tiny_llama4 import IDS, tensors


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("convert") / "hf"
    tiny_llama4.tiny_llama4().save_pretrained(folder)
    tiny_llama4.write_tokenizer(folder)
    (folder / "LICENSE").write_text("the licence")
    return folder


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("shard_bytes", [150_000, 10**9])
def test_round_trip_through_all_formats(plain, tmp_path, shard_bytes):
    """Hugging Face -> GGUF -> Hugging Face, and Meta -> Hugging Face, end with the values of the beginning."""
    weights = tensors(plain)
    convert(plain, tmp_path / "g" / "m.gguf", format="gguf")
    assert listing(tmp_path / "g") == ["m.gguf", "mmproj-m.gguf"]
    assert_same(tmp_path / "g", weights)
    convert(tmp_path / "g", tmp_path / "back", format="hf", dtype="bf16", shard_bytes=shard_bytes)
    assert_same(tmp_path / "back", weights)
    meta = tiny_llama4.write_meta(weights, tmp_path / "meta", 4)
    convert(meta, tmp_path / "hf", format="hf", shard_bytes=shard_bytes)
    assert_same(tmp_path / "hf", weights)
    assert (len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1) == (shard_bytes < 10**9)
    for folder in (tmp_path / "back", tmp_path / "hf"):
        theirs = Llama4ForConditionalGeneration.from_pretrained(folder).eval()
        original = Llama4ForConditionalGeneration.from_pretrained(plain).eval()
        with torch.no_grad():
            assert torch.equal(theirs(input_ids=IDS).logits, original(input_ids=IDS).logits)
    assert listing(tmp_path) == ["back", "g", "hf", "meta"]


def test_text_models(plain, tmp_path):
    """A text model keeps its names without prefix, and a tied head is not stored twice."""
    model = tiny_llama4.tiny_llama4(tie_word_embeddings=True).language_model
    model.save_pretrained(tmp_path / "text")
    tiny_llama4.write_tokenizer(tmp_path / "text")
    convert(tmp_path / "text", tmp_path / "out", format="hf")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight" not in stored and "model.embed_tokens.weight" in stored
    with torch.no_grad():
        theirs = Llama4ForCausalLM.from_pretrained(tmp_path / "out").eval()
        assert torch.equal(theirs(IDS).logits, Llama4ForCausalLM.from_pretrained(tmp_path / "text").eval()(IDS).logits)
    convert(tmp_path / "text", tmp_path / "m.gguf", format="gguf")
    assert torch.equal(logits(tmp_path / "m.gguf"), logits(tmp_path / "text"))
    assert "output.weight" not in {tensor.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert listing(tmp_path) == ["m.gguf", "out", "text"]


@pytest.mark.parametrize(("dtype", "kind"), [("int8", "Q8_0"), ("int4", "Q4_0"), ("fp16", "F16"), ("fp32", "F32")])
def test_gguf_types(plain, tmp_path, dtype, kind):
    """What is written is, byte for byte, what the gguf library makes of each tensor."""
    convert(plain, tmp_path / "m.gguf", format="gguf", dtype=dtype)
    theirs = tiny_llama4.write_gguf(tensors(plain), tmp_path / "theirs.gguf", kind)
    found, wanted = ({t.name: t for t in gguf.GGUFReader(path).tensors} for path in (tmp_path / "m.gguf", theirs))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].tensor_type == tensor.tensor_type, name
        assert found[name].data.tobytes() == tensor.data.tobytes(), name
    vision = {t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "mmproj-m.gguf").tensors}
    assert vision == ({"F32", "BF16"} if dtype.startswith("int") else {"F32", kind})
    ours, reference = (gguf.GGUFReader(path).fields for path in (tmp_path / "m.gguf", theirs))
    for name, field in reference.items():
        if not name.startswith("GGUF."):
            assert ours[name].contents() == field.contents(), name


def test_vocabulary_survives(plain, tmp_path):
    convert(plain, tmp_path / "g" / "m.gguf", format="gguf")
    convert(tmp_path / "g", tmp_path / "back", format="hf", dtype="bf16")
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (plain, tmp_path / "back")]
    text = "aa aab\n ünï 🦙 <|300|>"
    assert tokenizers[0].encode(text) == tokenizers[1].encode(text)
    convert(plain, tmp_path / "hf", format="hf")
    assert (tmp_path / "hf" / "LICENSE").read_text() == "the licence"
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == (plain / "tokenizer.json").read_bytes()


def changed(plain: Path, out: Path, change) -> Path:
    out.mkdir()
    for name, data in content(plain).items():
        (out / name).write_bytes(data)
    weights = load_file(plain / "model.safetensors")
    change(weights)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


NAME = "language_model.model.layers.1.feed_forward.experts.down_proj"


@pytest.mark.parametrize("format", ["hf", "gguf"])
def test_values_that_are_no_numbers(plain, tmp_path, format):
    bad = changed(plain, tmp_path / "bad", lambda w: w[NAME][0, 0, :1].fill_(torch.nan))
    with pytest.raises(CheckpointError, match=r"layers.1.feed_forward.experts.down_proj .* not finite"):
        convert(bad, tmp_path / "out.gguf", format=format, dtype="bf16")
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("format", ["hf", "gguf"])
def test_values_too_large_for_half_precision(plain, tmp_path, format):
    large = changed(plain, tmp_path / "large", lambda w: w[NAME][0, 0, :1].fill_(1e6))
    with pytest.raises(CheckpointError, match=r"down_proj.*F16|down_proj.*float16"):
        convert(large, tmp_path / "out.gguf", format=format, dtype="fp16")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "hf", "dtype": "int4"}, "hf cannot hold int4; it can be bf16, fp16, fp32, fp8"),
        ({"format": "gguf", "dtype": "fp8"}, "gguf cannot hold fp8"),
        ({"format": "gguf", "name": "out"}, "must end in .gguf"),
        ({"format": "hf", "name": "precious"}, "exists already"),
    ],
)
def test_refused(plain, tmp_path, arguments, message):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    name = arguments.pop("name", "out.gguf")
    with pytest.raises(CheckpointError, match=message):
        convert(plain, tmp_path / name, **arguments)
    assert listing(tmp_path) == ["precious"]


def test_quantised_sources_need_a_type(plain, tmp_path):
    convert(plain, tmp_path / "g" / "m.gguf", format="gguf", dtype="int8")
    with pytest.raises(CheckpointError, match=r"holds .*Q8_0; say which type"):
        convert(tmp_path / "g", tmp_path / "out", format="hf")
    convert(tmp_path / "g", tmp_path / "out", format="hf", dtype="bf16")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_chunk_size": 16}, "attention_chunk_size 8192"),
        ({"no_rope_layers": [1, 0, 1, 0]}, "every 4th layer global"),
        ({"moe_layers": [0]}, "experts in every layer that 2 divides"),
        ({"use_qk_norm": False}, "QK-norm on with 4 experts"),
        ({"attn_temperature_tuning": False}, "temperature on"),
    ],
)
def test_what_llama_cpp_would_run_otherwise(tmp_path, changes, message):
    tiny_llama4.tiny_llama4(**changes).save_pretrained(tmp_path / "hf")
    tiny_llama4.write_tokenizer(tmp_path / "hf")
    with pytest.raises(CheckpointError, match=f"cannot be a GGUF file: llama.cpp's llama4 always has .*{message}"):
        convert(tmp_path / "hf", tmp_path / "out.gguf", format="gguf")


def test_unnamed_splitting(plain, tmp_path):
    odd = changed(plain, tmp_path / "odd", lambda w: None)
    tokenizer = (odd / "tokenizer.json").read_text()
    (odd / "tokenizer.json").write_text(tokenizer.replace('"add_prefix_space": false', '"add_prefix_space": true', 1))
    with pytest.raises(CheckpointError, match="a rule without a name"):
        convert(odd, tmp_path / "out.gguf", format="gguf")


def _convert_and_die(source: Path, out: Path, arguments: dict, share: float) -> None:
    """In a forked process, which has none of torch's threads: killed when a share of the bytes is written."""
    torch.set_num_threads(1)

    def watch(done: int, total: int) -> None:
        if done >= share * total:
            os.kill(os.getpid(), signal.SIGKILL)

    convert(source, out, progress=watch, **arguments)


TO_HF = {"format": "hf", "dtype": "fp8", "shard_bytes": 200_000}


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("arguments", [TO_HF, {"format": "gguf", "dtype": "int8"}], ids=str)
def test_killed_and_repeated(plain, tmp_path, monkeypatch, arguments, share):
    monkeypatch.setattr(streaming, "_SYNC_BYTES", 60_000)
    child = multiprocessing.get_context("fork").Process(
        target=_convert_and_die, args=(plain, tmp_path / "killed" / "m.gguf", arguments, share)
    )
    (tmp_path / "killed").mkdir()
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert listing(tmp_path / "killed") == [".m.gguf.making"]
    told = []
    convert(plain, tmp_path / "killed" / "m.gguf", progress=lambda done, total: told.append(done / total), **arguments)
    assert told[0] >= share - 0.2  # what was not on the disk is made again
    assert told[-1] == 1.0
    convert(plain, tmp_path / "whole" / "m.gguf", **arguments)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def _convert_and_die_between(source: Path, out: Path) -> None:
    """The same, when one of two files has its final name."""
    torch.set_num_threads(1)
    move = Path.replace

    def replace(path: Path, target: Path) -> Path:
        if target == out:
            os.kill(os.getpid(), signal.SIGKILL)
        return move(path, target)

    Path.replace = replace  # type: ignore[method-assign, assignment]
    convert(source, out, format="gguf")


def test_killed_between_two_files(plain, tmp_path):
    out, image = tmp_path / "m.gguf", tmp_path / "mmproj-m.gguf"
    child = multiprocessing.get_context("fork").Process(target=_convert_and_die_between, args=(plain, out))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert listing(tmp_path) == [".m.gguf.making", "mmproj-m.gguf"]
    first = image.read_bytes()
    convert(plain, out, format="gguf")
    assert listing(tmp_path) == ["m.gguf", "mmproj-m.gguf"] and image.read_bytes() == first
    for path in (out, image):
        path.rename(tmp_path / "other")
        with pytest.raises(CheckpointError, match="exists already"):
            convert(plain, out, format="gguf")
        (tmp_path / "other").rename(path)
    assert listing(tmp_path) == ["m.gguf", "mmproj-m.gguf"]


def test_work_of_another_job_is_not_continued(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "_SYNC_BYTES", 60_000)

    class Stop(Exception):
        pass

    def stop(done, total):
        if done > total / 2:
            raise Stop

    with pytest.raises(Stop):
        convert(plain, tmp_path / "out", format="hf", dtype="bf16", progress=stop)
    assert listing(tmp_path) == [".out.making"]
    convert(plain, tmp_path / "out", format="hf", dtype="fp32")
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float32}
    assert listing(tmp_path) == ["out"]


def test_two_at_a_time(plain, tmp_path):
    def again(done, total):
        with pytest.raises(CheckpointError, match=r"is being made by process \d+"):
            convert(plain, tmp_path / "out", format="hf")

    convert(plain, tmp_path / "out", format="hf", progress=again)
    assert listing(tmp_path) == ["out"]


def test_values_are_mapped_not_copied(plain, tmp_path):
    """Where type and layout are kept, reading a tensor twice gives the same memory: the file's."""
    meta = tiny_llama4.write_meta(tensors(plain), tmp_path / "meta", 1)
    convert(plain, tmp_path / "m.gguf", format="gguf")
    for path in (plain, meta, tmp_path / "m.gguf"):
        with checkpoint.open_weights(path) as weights:
            first, again = (weights.tensor("model.embed_tokens.weight") for _ in range(2))
            assert first.data_ptr() == again.data_ptr(), path


def test_llama4_vocabulary(tmp_path):
    """Meta's tokenizer.model survives as tokenizer.json and in a GGUF file that says how Llama 4's splits text."""
    source = importlib.metadata.distribution("llama_models").locate_file("llama_models/llama4/tokenizer.model")
    shutil.copy(str(source), tmp_path / "tokenizer.model")
    original = Tokenizer.load(tmp_path)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama4")
    add_vocabulary(writer, tmp_path, {"tokenizer.json": original.to_json()}, SCOUT)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    file = GgufFile(tmp_path / "m.gguf")
    assert file.get("tokenizer.ggml.pre") == "llama4"
    ends = [file.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eom", "eot")]
    assert tuple(ends) == SCOUT.eos_token_id
    (tmp_path / "back").mkdir()
    for name, data in tokenizer_files(file).items():
        (tmp_path / "back" / name).write_bytes(data)
    back = Tokenizer.load(tmp_path / "back")
    for text in ("Hello, world!", "don't  12345 =\n\n\t日本語のテスト a/b\r\n//x ünï 🦙🦙", "<|eot|> é́ \u2028"):
        assert back.encode(text) == original.encode(text)
    assert back.special_tokens == original.special_tokens
    assert back.eos_ids == original.eos_ids
