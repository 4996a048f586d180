"""`herd plan` as a user meets it."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from herd.checkpoint import names
from herd.cli.main import run
from herd.config import SCOUT, VISION, TextConfig
from herd.plan.flops import flops_of_prompt
from tests.cli.running import fails, run_json

DOCS = Path(__file__).parents[2] / "docs" / "plan.md"
TRANSCRIPTS = re.findall(r"^```\n\$ herd (plan [^\n]*)\n(.*?)^```$", DOCS.read_text("utf-8"), re.MULTILINE | re.DOTALL)
H100 = ("--gpu", "h100-80g")


def test_scout_in_int4_with_ten_million_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    ten = ("plan", "scout", "--context", "10M", *H100, "--weights", "int4", "--kv", "int4")
    found = run_json(capsys, *ten, "--json")
    assert found["context"] == 10_485_760 and not found["fits"]
    assert found["places"]["device"]["bytes"] == sum(item["nbytes"] for item in found["items"])
    assert sum(item["parameters"] for item in found["items"]) == 108_641_793_536
    assert found["changes"][0]["text"] == "keys and values of global layers in host memory"
    assert found["devices_needed"] == 4 and 1_000_000 < found["longest_context"] < 2_000_000
    assert run([*ten, "--kv-in", "host"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("It fits.")


def test_a_model_folder_is_planned_with_its_images(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(VISION.to_hf(SCOUT)))
    found = run_json(capsys, "plan", tmp_path, *H100, "--json")
    assert found["items"] == run_json(capsys, "plan", "scout", *H100, "--json")["items"]
    (tmp_path / "config.json").write_text(json.dumps(SCOUT.to_hf()))
    text = run_json(capsys, "plan", tmp_path, *H100, "--json")
    assert "vision" not in [item["name"] for item in text["items"]] and text["flops"]["image_tile"] is None


def test_a_machine_can_be_stated(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = ("--memory", "96G", "--bandwidth", "1.8T", "--flops", "500T")
    found = run_json(capsys, "plan", "scout", "--context", "128K", *numbers, "--weights", "int4", "--json")
    assert found["fits"] and found["machine"]["memory"] == 96e9 and found["machine"]["reserved"] == 0
    assert found["prefill"]["compute"] == pytest.approx(flops_of_prompt(SCOUT, 131_072).total / 500e12)
    four = run_json(capsys, "plan", "scout", *numbers, "--interconnect", "50G", "--count", "4", "--json")
    assert four["decode"]["waiting"] > 0
    half = run_json(capsys, "plan", "scout", *H100, "--memory", "40G", "--json")
    assert half["places"]["device"]["room"] == 40e9 and half["machine"]["bandwidth"] == 3.35e12


def test_herds_own_engine_is_planned_on_a_cpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(replace(SCOUT, num_hidden_layers=1).to_hf()))
    found = run_json(capsys, "plan", tmp_path, "--gpu", "cpu", "--weights", "int8", "--json")
    need = found["process"]
    assert need["peak"] == need["loading"] > need["own"] + need["mapped"] > 0  # of one layer, its head is the most
    assert run_json(capsys, "plan", "scout", *H100, "--json")["process"] is None


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("scout",), "a machine is missing; give --gpu (h100-80g, "),
        (("scout", "--memory", "80G"), "or also --bandwidth, --flops"),
        (("scout", "--gpu", "h100"), "no machine is called 'h100'; known: h100-80g"),
        (("nosuch", *H100), "no model is called 'nosuch'; known: cria, scout, maverick, behemoth-assumed"),
        (("scout", *H100, "--weights", "int5"), "use bf16, int8, int4"),
        (("scout", *H100, "--kv", "int3"), "known: bf16, int8, fp8, int4"),
        (("scout", *H100, "--context", "11M"), "11,534,336 tokens; scout has 10,485,760 positions"),
        (("scout", *H100, "--context", "many"), "--context is 'many'"),
        (("scout", *H100, "--count", "0"), "--count is 0"),
        (("scout", "--gpu", "mac-m4-max", "--count", "2"), "mac-m4-max has no connection to others"),
        (("scout", "--gpu", "mac-m4-max", "--kv-in", "host"), "mac-m4-max has no host"),
        (("scout", *H100, "--kv-in", "cloud"), "--kv-in is 'cloud'; it can be device, host, disk"),
        (("scout", *H100, "--prefill-chunk", "-1"), "--prefill-chunk is '-1'"),
    ],
)
def test_bad_input_is_one_line_with_what_is_known(
    args: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in fails(capsys, "plan", *args)


CRIA = TextConfig(
    vocab_size=49152,
    hidden_size=576,
    num_hidden_layers=32,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    intermediate_size=256,
    intermediate_size_mlp=1536,
    num_local_experts=16,
    num_experts_per_tok=1,
    max_position_embeddings=10_485_760,
    moe_layers=(9,),
    no_rope_layers=tuple(int(i != 9) for i in range(32)),
    attention_chunk_size=1024,
    tie_word_embeddings=True,
)


@pytest.mark.parametrize(("command", "printed"), TRANSCRIPTS, ids=[command for command, _ in TRANSCRIPTS])
def test_the_page_shows_what_the_command_prints(
    command: str, printed: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CRIA.to_hf()))
    monkeypatch.setattr(names, "cria_path", lambda: tmp_path)  # which would be built first
    assert run(command.split()) == 0
    assert capsys.readouterr().out == printed


TABLE = re.findall(r"^\| (\w+), (\w+) \| ([\d |]+) \|$", DOCS.read_text("utf-8"), re.MULTILINE)


def test_the_page_says_how_many_gpus_behemoth_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(TABLE) == 3
    for weights, kv, counts in TABLE:
        for gpu, count in zip(("h100-80g", "h200", "b200", "mi300x"), counts.split(" | "), strict=True):
            args = ("--context", "1M", "--gpu", gpu, "--weights", weights, "--kv", kv, "--json")
            assert run_json(capsys, "plan", "behemoth-assumed", *args)["devices_needed"] == int(count)


def test_the_page_has_transcripts() -> None:
    assert len(TRANSCRIPTS) >= 3


def test_presets_are_planned_without_torch() -> None:
    plan = "run(['plan', 'scout', '--gpu', 'h200'])"
    code = f"import sys; from herd.cli.main import run; {plan}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
