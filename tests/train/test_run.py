"""A whole run on a tiny model: from files to a delta that fits, also when it was interrupted."""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from herd import checkpoint
from herd.checkpoint import cria
from herd.checkpoint.upcycle import upcycle
from herd.errors import CheckpointError, ConfigError
from herd.train import curve
from herd.train import run as run_recipe
from tests.checkpoint.tiny_llamas import tiny_llama, write_gguf
from tests.data.tiny_text import write_files
from tests.train.test_loop import steps_of

module = import_module("herd.train.run")  # the package exports the function of this name
RECIPE = """
checkpoint_every = 2
[pool]
paths = ["{folder}/*.py"]
hold_out = []
chunks = 8
chunk_size = 600
facts_per_chunk = 1
questions_per_chunk = 4
absent_share = 0.3
passages_per_chunk = 1
passage_tokens = 16
[model]
global_layer = 2
chunk = 1024
experts = 2
expert_width = 16
lora_rank = 2
[looking]
steps = 4
questions = 4
chunks = 3
rows = 60
around = 3
dilute_to = 10000
lr = 1e-3
warmup = 2
decay = 0.5
[answering]
steps = 5
questions = 4
chunks = 2
rows = 60
around = 3
blind = 0.2
dilute_to = 4000
lr = 1e-3
lora_lr = 1e-3
warmup = 2
decay = 0.5
text = 0.5
text_rows = 1
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe whose base model is a random one with nine heads in three groups."""
    llama = tiny_llama(hidden_size=72, num_attention_heads=9, num_key_value_heads=3)
    gguf = write_gguf(llama, tmp_path / "tiny.gguf")
    monkeypatch.setattr(module, "fetch_wheel", lambda folder: gguf)
    grow = lambda base, out, sizes: upcycle(base, out, **sizes, dtype=torch.bfloat16)  # noqa: E731
    monkeypatch.setattr(module, "upcycle_base", grow)
    (tmp_path / "text").mkdir()
    write_files(tmp_path / "text")
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE.replace("{folder}", str(tmp_path / "text")))
    return path


def test_a_run_leaves_a_delta_and_survives_an_interruption(recipe: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    stages: list[str] = []
    figures = run_recipe(recipe, whole, progress=lambda stage, *_: stages.append(stage))
    assert figures["step"] == 5 and figures["answer"] > 0
    rows = ("chunks", "questions", "passages", "vocabulary", "firsts")
    made = ["pool", *(f"hidden states of {name}" for name in rows)]
    assert list(dict.fromkeys(stages)) == [*made, "looking", "start of copying", "answering"]

    def interrupt(during: str) -> Callable[[str, int, int, dict[str, float]], None]:
        def progress(stage: str, done: int, total: int, figures: dict[str, float]) -> None:
            if stage == during and done == 3:
                raise KeyboardInterrupt

        return progress

    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, cut, progress=interrupt("looking"))
    with pytest.raises(ConfigError, match="--resume"):
        run_recipe(recipe, cut)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, cut, resume=True, progress=interrupt("answering"))
    run_recipe(recipe, cut, resume=True)
    assert steps_of(cut / "looking") == [1, 2, 3, 4]
    assert steps_of(cut / "answering") == [1, 2, 3, 4, 5]
    ours, theirs = (load_file(folder / "delta.safetensors") for folder in (cut, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    (tmp_path / "model").mkdir()
    cria.apply_delta(whole / "init", whole / "delta.safetensors", tmp_path / "model")
    model = checkpoint.load(tmp_path / "model")
    assert model(torch.tensor([[5, 6, 7]])).isfinite().all()


def test_a_run_goes_on_from_the_weights_of_another(recipe: Path, tmp_path: Path) -> None:
    run_recipe(recipe, tmp_path / "first")
    delta = tmp_path / "first" / "delta.safetensors"
    text = recipe.read_text().replace("checkpoint_every", f'start = "{delta}"\ncheckpoint_every', 1)
    recipe.write_text(text.replace("steps = 4", "steps = 0").replace("steps = 5", "steps = 0"))
    stages: list[str] = []
    run_recipe(recipe, tmp_path / "same", progress=lambda stage, *_: stages.append(stage))
    assert "start of copying" not in stages
    same, first = (load_file(tmp_path / name / "delta.safetensors") for name in ("same", "first"))
    assert same.keys() == first.keys()
    assert all(torch.equal(same[name], tensor) for name, tensor in first.items())
    recipe.write_text(text.replace("expert_width = 16", "expert_width = 24"))
    with pytest.raises(ConfigError, match="expert_width"):
        run_recipe(recipe, tmp_path / "other")
    recipe.write_text(text.replace("lora_rank = 2", "lora_rank = 3"))
    with pytest.raises(CheckpointError, match="does not fit"):
        run_recipe(recipe, tmp_path / "rank")


def test_a_folder_belongs_to_one_recipe(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.toml").write_text("seed = 5\n")
    with pytest.raises(ConfigError, match=r"another recipe.*--run-dir"):
        run_recipe(recipe, folder, resume=True)
    assert (folder / "recipe.toml").read_text() == "seed = 5\n"
    assert {path.name for path in folder.iterdir()} == {"lock", "recipe.toml"}, "nothing is begun there"


TRAINS = """
import sys, time
from importlib import import_module
from pathlib import Path

def wait(folder):
    print("trains", flush=True)
    time.sleep(600)

run = import_module("herd.train.run")
run.fetch_wheel = wait
run.run(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_a_folder_belongs_to_one_process(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", TRAINS, recipe, folder], stdout=subprocess.PIPE, text=True) as first:
        try:
            assert first.stdout is not None and first.stdout.readline() == "trains\n"
            command = [sys.executable, "-m", "herd", "train", recipe, "--run-dir", folder, "--resume"]
            second = subprocess.run(command, capture_output=True, text=True)
        finally:
            first.kill()
    assert (second.returncode, second.stdout) == (2, "")
    said = f"error: process {first.pid} trains in {folder}; wait for it, or choose another folder with --run-dir\n"
    assert second.stderr == said
    monkeypatch.setattr(module, "fetch_wheel", lambda folder: 1 // 0)
    with pytest.raises(ZeroDivisionError):  # a lock dies with its process, so this one begins
        run_recipe(recipe, folder, resume=True)


def test_a_curve_is_drawn_from_the_metrics(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ConfigError, match="holds no steps"):
        curve.draw(tmp_path)
    for phase, line in (("looking", {"evidence": 2.0, "mass": 0.3}), ("answering", {"answer": 3.0, "correct": 0.5})):
        (tmp_path / phase).mkdir()
        lines = [json.dumps({"step": step, **line}) for step in (1, 2)]
        (tmp_path / phase / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert curve.read(tmp_path / "answering" / "metrics.jsonl")["answer"] == [(1, 3.0), (2, 3.0)]
    assert curve.smoothed([(1, 2.0), (2, 1.0)]) == ([1, 2], [2.0, 1.5])
    assert curve.draw(tmp_path).read_bytes().startswith(b"\x89PNG")
