"""Damaged and hostile checkpoints of every format give one clear error: no traceback, no hang, no code that is run."""

import io
import json
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from herd import checkpoint
from herd.errors import CheckpointError, HerdError
from tests.checkpoint import tiny_llama4
from tests.checkpoint.tiny_llama4 import tensors

DAMAGE = settings(max_examples=80, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
HUGE = [0, 1, 255, 2**16, 2**31, 2**32 - 1, 2**63, 2**64 - 1]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """One folder for each format."""
    root = tmp_path_factory.mktemp("damage")
    tiny_llama4.tiny_llama4().save_pretrained(root / "hf")
    weights = tensors(root / "hf")
    tiny_llama4.write_meta(weights, root / "meta", 2)
    (root / "gguf").mkdir()
    tiny_llama4.write_gguf(weights, root / "gguf" / "m.gguf", "Q4_0")
    tiny_llama4.write_mmproj(weights, root / "gguf" / "mmproj.gguf")
    return root


def copied(source: Path, out: Path) -> Path:
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(source, out)
    return out


def use(path: Path) -> None:
    """Everything that a command may ask of a checkpoint; nothing but a HerdError of one line comes out."""
    try:
        with checkpoint.open_weights(path) as weights:
            for name in weights.names:
                assert weights.tensor(name).shape == weights.shape(name)
        checkpoint.read_config(path)
        checkpoint.load(path, check_finite=True)
        weights.tokenizer()
    except HerdError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000


def garble(data, file: Path) -> None:
    """Cut a file, or write numbers of one to eight bytes into it, mostly near the ends, where headers are."""
    whole = file.read_bytes()
    bad = bytearray(whole[: data.draw(st.sampled_from([len(whole), len(whole) - 1, len(whole) // 2, 500, 7, 0]))])
    for _ in range(data.draw(st.integers(0, 4)) if len(bad) > 8 else 0):
        last = len(bad) - 9
        places = [st.integers(0, min(last, 2000)), st.integers(max(0, last - 3000), last), st.integers(0, last)]
        width, form = data.draw(st.sampled_from([(1, "B"), (4, "<I"), (8, "<Q")]))
        struct.pack_into(form, bad, data.draw(st.one_of(places)), data.draw(st.sampled_from(HUGE)) % 2 ** (8 * width))
    file.write_bytes(bad)


@pytest.mark.parametrize(
    "file", ["hf/model.safetensors", "meta/consolidated.00.pth", "gguf/m.gguf", "gguf/mmproj.gguf"]
)
@DAMAGE
@given(data=st.data())
def test_garbled_files(tmp_path, good, file, data):
    kind, _, name = file.partition("/")
    path = copied(good / kind, tmp_path / kind)
    garble(data, path / name)
    use(path)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(HUGE),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=5,
)


@pytest.mark.parametrize("file", ["hf/config.json", "meta/params.json"])
@DAMAGE
@given(data=st.data())
def test_junk_in_configurations(tmp_path, good, file, data):
    """Any value of any type, also none, in place of one or some that are there."""
    kind, _, name = file.partition("/")
    path = copied(good / kind, tmp_path / kind)
    raw = json.loads((path / name).read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        part = raw
        while True:
            key = data.draw(st.sampled_from(sorted(part)))
            if not isinstance(part[key], dict) or not part[key] or data.draw(st.booleans()):
                break
            part = part[key]
        part[key] = data.draw(JUNK)
    (path / name).write_text(json.dumps(raw))
    use(path)


@DAMAGE
@given(junk=JUNK)
def test_junk_for_a_whole_file(tmp_path, good, junk):
    for kind, name in (("hf", "config.json"), ("hf", "model.safetensors.index.json"), ("meta", "params.json")):
        path = copied(good / kind, tmp_path / kind)
        if "index" in name:
            (path / "model.safetensors").unlink()
        (path / name).write_text(json.dumps(junk))
        with pytest.raises(HerdError):
            checkpoint.load(path)


@pytest.mark.parametrize("layers", [10**9, 10**6, 5, 0, -1, "4", 4.0, True])
def test_numbers_of_layers(tmp_path, good, layers):
    for kind, name, keys in (
        ("hf", "config.json", ["text_config", "num_hidden_layers"]),
        ("hf", "config.json", ["vision_config", "num_hidden_layers"]),
        ("meta", "params.json", ["n_layers"]),
        ("meta", "params.json", ["vision_args", "n_layers"]),
    ):
        path = copied(good / kind, tmp_path / "m")
        raw = part = json.loads((path / name).read_text())
        for key in keys[:-1]:
            part = part[key]
        part[keys[-1]] = layers
        for lists in ("layer_types", "no_rope_layers", "moe_layers"):
            part.pop(lists, None)
        (path / name).write_text(json.dumps(raw))
        with pytest.raises(HerdError):
            checkpoint.load(path)


class Evil:
    """Runs a command where a pickle is read without care."""

    def __reduce__(self):
        return (Path.touch, (Path("/tmp/herd-evil-pickle"),))


class Large:
    def __reduce__(self):
        return (bytearray, (10**13,))


def pth(path: Path, value: object, compression: int = zipfile.ZIP_STORED, padding: int = 0) -> None:
    """A file in the form of torch.save around any pickle."""
    buffer = io.BytesIO()
    torch.save({"tok_embeddings.weight": torch.ones(2, 2)}, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w", compression) as target:
        for entry in source.infolist():
            data = source.read(entry)
            if entry.filename.endswith("data.pkl"):
                data = (pickle.dumps(value, protocol=2) if value is not None else data) + b"\0" * padding
            target.writestr(entry.filename, data)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Evil(), "its pickle names"),
        (Large(), "its pickle names '__builtin__ bytearray'"),
        ({"tok_embeddings.weight": Evil()}, "its pickle names"),
        ([1, 2], "must hold tensors by name, not list"),
        ({1: 2}, "must hold tensors by name, not dict"),
    ],
)
def test_hostile_pickles(tmp_path, good, value, message):
    path = copied(good / "meta", tmp_path / "meta")
    pth(path / "consolidated.00.pth", value)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(path)
    assert not Path("/tmp/herd-evil-pickle").exists()


def test_pickles_by_newer_protocols(tmp_path, good):
    path = copied(good / "meta", tmp_path / "meta")
    torch.save({"a": torch.ones(1)}, path / "consolidated.00.pth", pickle_protocol=4)
    with pytest.raises(CheckpointError, match="its pickle uses STACK_GLOBAL"):
        checkpoint.load(path)


def test_zip_bombs(tmp_path, good):
    path = copied(good / "meta", tmp_path / "meta")
    pth(path / "consolidated.00.pth", None, zipfile.ZIP_DEFLATED, padding=50 << 20)
    assert (path / "consolidated.00.pth").stat().st_size < 1 << 20
    with pytest.raises(CheckpointError, match="is compressed"):
        checkpoint.load(path)


def test_old_pickles(tmp_path, good):
    """Files from before torch 1.6 are plain pickles."""
    path = copied(good / "meta", tmp_path / "meta")
    torch.save({"a": torch.ones(1)}, path / "consolidated.00.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"consolidated.00.pth is not a readable \.pth file"):
        checkpoint.load(path)


def change(path: Path, file: str, edit) -> None:
    with torch.serialization.safe_globals([io.BytesIO]):
        shard = torch.load(path / file, weights_only=True)
    edit(shard)
    torch.save(shard, path / file)


ROUTER = "layers.1.feed_forward.router_DE"
QKV = "layers.0.attention.wqkv.weight"
OUT = "layers.0.attention.wo.weight"
NORM = "layers.0.attention.wqkv.layer_norm_weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda s: s.pop(ROUTER),
            f"consolidated.01.pth and consolidated.00.pth disagree on 1 tensors, first '{ROUTER}'",
        ),
        (lambda s: s.update(odd=torch.ones(1)), "disagree on 1 tensors, first 'odd'"),
        (lambda s: s.update({QKV: torch.ones(5, 64)}), f"{QKV} .* need 64 rows|do not fit"),
        (lambda s: s.update({QKV: torch.ones(64, 64, dtype=torch.int8)}), f"{QKV} in .* has type torch.int8"),
        (
            lambda s: s.update({"layers.0.attention.wo.weight": torch.ones(3, 32)}),
            "o_proj.weight .* do not fit together",
        ),
        (lambda s: s.update({NORM: torch.full((64,), torch.nan)}), "input_layernorm.weight .* not finite"),
    ],
)
def test_misfits_in_a_shard(tmp_path, good, edit, message):
    path = copied(good / "meta", tmp_path / "meta")
    change(path, "consolidated.00.pth", edit)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(path, check_finite=True)


def test_misfits_in_all_shards(tmp_path, good):
    for edit, message in (
        (lambda s: s.pop(ROUTER), r"lacks the tensor model.layers.1.feed_forward.router.weight of shape \[4, 64\]"),
        (lambda s: s.update(odd=torch.ones(1)), "a tensor that Llama 4 does not have: odd"),
        (lambda s: s.update({"layers.0.odd": torch.ones(1)}), "does not have: layers.0.odd"),
        (lambda s: s.update({NORM: 7}), f"has {NORM}, which is no tensor"),
        (lambda s: s.update({ROUTER: torch.ones(3, 4)}), r"router.weight in .* has shape \[4, 3\]"),
        (lambda s: s.update({"layers.0.attention_norm.weight": torch.ones(64)}), "under two names"),
    ):
        path = copied(good / "meta", tmp_path / "meta")
        for file in ("consolidated.00.pth", "consolidated.01.pth"):
            change(path, file, edit)
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load(path)


def test_missing_shards(tmp_path, good):
    path = copied(good / "meta", tmp_path / "meta")
    (path / "consolidated.00.pth").rename(path / "consolidated.02.pth")
    with pytest.raises(CheckpointError, match="shards 01, 02; they must be numbered from 00"):
        checkpoint.load(path)
    for file in path.glob("*.pth"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"no consolidated.00.pth"):
        checkpoint.load(path)


def test_wrong_places(tmp_path, good):
    for path, message in (
        (tmp_path / "nowhere", "is not a folder or a GGUF file"),
        (good / "hf" / "model.safetensors", "is not a readable GGUF file"),
        (good / "gguf" / "mmproj.gguf", "is the image encoder only"),
        (tmp_path, "has no config.json"),
    ):
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load(path)
    two = copied(good / "gguf", tmp_path / "two")
    shutil.copy(two / "m.gguf", two / "n.gguf")
    with pytest.raises(CheckpointError, match="has 2 GGUF models and 1 mmproj files"):
        checkpoint.load(two)
