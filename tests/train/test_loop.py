"""A run that was killed goes on as if nothing had happened; recipes that cannot be run are refused."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from herd.errors import ConfigError
from herd.train.loop import Loop, schedule
from herd.train.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """
seed = 1
checkpoint_every = 4
[pool]
paths = ["*.py"]
hold_out = []
chunks = 4
chunk_size = 64
[model]
global_layer = 1
chunk = 64
experts = 2
expert_width = 8
lora_rank = 2
[looking]
steps = 11
questions = 4
chunks = 2
rows = 50
dilute_to = 100
lr = 1e-2
lora_lr = 2e-2
warmup = 3
decay = 0.5
[answering]
steps = 2
questions = 4
chunks = 1
rows = 50
dilute_to = 100
lr = 1e-2
warmup = 3
decay = 0.5
text = 0.5
"""


def make(run_dir: Path) -> tuple[Loop, Callable[[int], dict[str, torch.Tensor]]]:
    """A loop over a small network in bfloat16, whose batches depend on the step alone."""
    run_dir.mkdir(exist_ok=True)
    (run_dir / "recipe.toml").write_text(RECIPE)
    torch.manual_seed(0)
    names = {"weight": (6, 5), "x.lora_a": (2, 6), "unused": (3,)}
    parameters = {name: torch.nn.Parameter(torch.randn(shape).bfloat16()) for name, shape in names.items()}
    loop = Loop(load_recipe(run_dir / "recipe.toml").looking, parameters, run_dir, every=4)

    def losses(step: int) -> dict[str, torch.Tensor]:
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step)).bfloat16()
        hidden = (x @ parameters["weight"].T @ parameters["x.lora_a"].T).float()
        return {"answer": (hidden - 1).pow(2).mean(), "noted": hidden.mean()}

    return loop, losses


def run(run_dir: Path, at: Callable[[int], None]) -> Loop:
    loop, losses = make(run_dir)
    loop.resume()
    loop.train(losses, {"answer": 1.0, "absent": 2.0}, lambda step, figures: at(step))
    return loop


def steps_of(run_dir: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_killed_run_goes_on_bit_by_bit(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", lambda step: None)
    code = (
        "import os, signal, sys; from pathlib import Path; from tests.train.test_loop import run\n"
        "run(Path(sys.argv[1]), lambda step: os.kill(os.getpid(), signal.SIGKILL) if step == 7 else None)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "cut"], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert steps_of(tmp_path / "cut") == [1, 2, 3, 4, 5, 6, 7]
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as log:
        log.write('{"step": 8, "ans')  # a line that was not finished
    loop, _ = make(tmp_path / "cut")
    assert loop.resume() and loop.step == 4
    assert steps_of(tmp_path / "cut") == [1, 2, 3, 4]
    resumed = run(tmp_path / "cut", lambda step: None)
    assert resumed.step == whole.step == 11
    assert steps_of(tmp_path / "cut") == steps_of(tmp_path / "whole") == list(range(1, 12))
    for name, master in whole.masters.items():
        assert torch.equal(resumed.masters[name], master), name
        assert torch.equal(resumed.parameters[name], master.bfloat16())
    ours, theirs = (loop.optimizer.state_dict() for loop in (resumed, whole))
    assert ours["param_groups"] == theirs["param_groups"]
    for i, state in theirs["state"].items():
        assert all(torch.equal(ours["state"][i][key], value) for key, value in state.items())


def test_weights_choose_the_loss_and_masters_keep_float32(tmp_path: Path) -> None:
    loop, losses = make(tmp_path)
    before = {name: master.clone() for name, master in loop.masters.items()}
    loop.train(losses, {"answer": 1.0}, lambda step, figures: None)
    assert torch.equal(loop.masters["unused"], before["unused"])
    assert not torch.equal(loop.masters["weight"], before["weight"])
    assert not torch.equal(loop.masters["weight"], loop.masters["weight"].bfloat16().float())
    peaks = {group["peak"]: len(group["params"]) for group in loop.optimizer.param_groups}
    assert peaks == {1e-2: 2, 2e-2: 1}


def test_a_gradient_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    loop, losses = make(tmp_path)
    with pytest.raises(FloatingPointError, match="at step 0"):
        loop.train(lambda step: {"answer": losses(step)["answer"] * torch.nan}, {"answer": 1.0}, lambda *_: None)


def test_a_constraint_holds_after_every_step(tmp_path: Path) -> None:
    make(tmp_path)
    parameters = {"weight": torch.nn.Parameter(torch.randn(6, 5).bfloat16())}
    phase = load_recipe(tmp_path / "recipe.toml").looking
    loop = Loop(phase, parameters, tmp_path, keep=lambda masters: masters["weight"].clamp_(-0.25, 0.25))
    lost = lambda step: {"answer": (parameters["weight"].float() - 1).pow(2).mean()}  # noqa: E731
    loop.train(lost, {"answer": 1.0}, lambda *_: None)
    assert parameters["weight"].abs().max() <= 0.25
    assert not parameters["weight"].requires_grad, "what has been trained is fixed afterwards"


def test_without_a_checkpoint_there_is_nothing_to_resume(tmp_path: Path) -> None:
    assert make(tmp_path)[0].resume() is False


def test_schedule() -> None:
    rates = [schedule(step, 20, 4, 0.5) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:11] == [1.0] * 7
    assert rates[11:] == pytest.approx([0.9 - 0.1 * i for i in range(9)])
    assert schedule(20, 20, 4, 0.5) == 0
    assert schedule(0, 5, 0, 0.0) == 1.0


def test_our_recipes_load() -> None:
    recipe = load_recipe(ROOT / "recipes" / "cria.toml")
    assert recipe.answering.lora_lr > 0
    assert recipe.looking.weight_decay == 0.0  # a default


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seed = 1", "sed = 1", "unknown sed; known are .*seed"),
        ("lr = 1e-2\n", "lr = 1e-2\nmomentum = 3\n", r"\[looking\]: unknown momentum"),
        ("steps = 11\n", "", r"\[looking\].*'steps'"),
        ("[answering]", "[answer]", r"\[answering\].*steps"),
        ("steps = 11", "steps = 11.5", r"\[looking\]: steps is 11.5; it must be int"),
        ("steps = 11", "steps = true", "steps is True; it must be int"),
        ("text = 0.5", 'text = "much"', r"\[answering\]: text is 'much'; it must be float"),
        ("chunks = 2", "chunks = [2]", r"\[looking\]: chunks is \[2\]; it must be int"),
        ('paths = ["*.py"]', 'paths = "*.py"', r"\[pool\]: paths is '\*.py'; it must be tuple\[str, \.\.\.\]"),
        ("seed = 1", "looking = 1", "Cannot overwrite"),
        ("seed = 1", "seed = ", "recipe.toml"),
    ],
)
def test_bad_recipes_name_what_is_wrong(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "recipe.toml"
    assert old in RECIPE
    path.write_text(RECIPE.replace(old, new, 1))
    with pytest.raises(ConfigError, match=message):
        load_recipe(path)


def test_a_missing_recipe_and_a_table_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.toml"):
        load_recipe(tmp_path / "no.toml")
    path = tmp_path / "r.toml"
    path.write_text("looking = 3\n")
    with pytest.raises(ConfigError, match=r"\[pool\]|must be a table"):
        load_recipe(path)
