"""The command line as a user meets it: outputs, exit codes, one-line errors."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from herd.cli.main import app, run
from herd.config import MAVERICK, SCOUT
from herd.context.limits import MAX_BYTES
from tests.checkpoint.tiny_llamas import tiny_llama, write_gguf
from tests.cli.running import fails, run_json

VERBS = ["ask", "read", "context", "chat", "serve", "convert", "upcycle", "train", "eval", "info", "plan"]


def test_every_verb_is_there_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    overview = capsys.readouterr().out
    names = [c.name for c in app.registered_commands] + [g.name for g in app.registered_groups]
    assert sorted(map(str, names)) == sorted(VERBS)
    for verb in VERBS:
        assert f"\n  {verb} " in overview
        assert run([verb, "--help"]) == 0
        assert f"Examples:\n    herd {verb}" in capsys.readouterr().out


def test_the_limit_of_a_file_is_told_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    limit = f"{MAX_BYTES >> 20} MiB"
    assert run(["read", "--help"]) == 0
    assert limit in " ".join(capsys.readouterr().out.split())
    assert limit in (Path(__file__).parents[2] / "docs/cli.md").read_text(encoding="utf-8")


def test_ask_reads_then_reuses(capsys: pytest.CaptureFixture[str], notes: Path, tiny_model: Path) -> None:
    context = notes.parent / "ctx"
    args = ("ask", "What is the code?", notes, "--context", context, "--model", tiny_model, "--max-tokens", 4, "--json")
    first = run_json(capsys, *args)
    assert list(first) == ["answer", "quoted", "citations", "missed_mass", "context", "timing"]
    assert list(first["timing"]) == ["read_s", "first_token_s", "answer_s", "read_tokens_per_s"]
    assert {"dir", "tokens", "sources", "read_tokens", "reused_tokens", "skipped"} == set(first["context"])
    assert first["context"]["sources"] == 2 and first["context"]["read_tokens"] == first["context"]["tokens"] > 0
    [skipped] = first["context"]["skipped"]
    assert skipped["source"] == "notes/image.png" and skipped["reason"]
    for citation in first["citations"]:
        assert set(citation) == {"source", "lines", "weight"} and citation["source"].startswith("notes/")
    second = run_json(capsys, *args)
    assert second["context"]["read_tokens"] == 0
    assert second["context"]["reused_tokens"] == first["context"]["tokens"]
    assert (second["answer"], second["citations"]) == (first["answer"], first["citations"])
    only_ask = run_json(capsys, *args[:2], *args[3:])
    assert only_ask["answer"] == first["answer"]
    assert only_ask["context"]["skipped"] == first["context"]["skipped"]


def test_several_contexts_are_asked_together(capsys: pytest.CaptureFixture[str], notes: Path, tiny_model: Path) -> None:
    first, second = notes.parent / "first", notes.parent / "second"
    model = ("--model", tiny_model)
    assert run([str(a) for a in ("read", notes / "port.py", "--context", first, *model)]) == 0
    assert run([str(a) for a in ("read", notes / "gate.txt", "--context", second, *model)]) == 0
    capsys.readouterr()
    both = ("ask", "What is the code?", "--context", first, "--context", second, "--max-tokens", 4)
    answer = run_json(capsys, *both, *model, "--json")
    assert answer["context"]["dir"] == str(first) and [c["dir"] for c in answer["also"]] == [str(second)]
    assert {c["context"] for c in answer["citations"]} <= {str(first), str(second)}
    assert run([str(a) for a in (*both, *model)]) == 0
    assert f"  in {notes.parent}" in capsys.readouterr().out
    assert "read into one context, and 2 are named" in fails(capsys, *both, notes, *model)
    assert "named twice" in fails(capsys, *both[:4], "--context", first, *model)


def test_quantised_weights_are_asked_for_by_name(
    capsys: pytest.CaptureFixture[str], notes: Path, tiny_model: Path
) -> None:
    context = notes.parent / "ctx"
    args = ("ask", "What is the code?", notes, "--context", context, "--max-tokens", 4)
    assert run_json(capsys, *args, "--json", "--model", f"{tiny_model}@int8:8")["answer"]
    assert "another model" in fails(capsys, *args, "--model", tiny_model)
    assert "groups of 4 inputs; use 8 or more" in fails(capsys, *args, "--model", f"{tiny_model}@int8:4")
    assert "cannot be 'int5'" in fails(capsys, *args, "--model", f"{tiny_model}@int5")


def test_ask_for_people(capsys: pytest.CaptureFixture[str], notes: Path, tiny_model: Path) -> None:
    context = notes.parent / "ctx"
    assert run(["ask", "Which port?", str(notes), "-c", str(context), "-m", str(tiny_model), "--max-tokens", "4"]) == 0
    out, err = capsys.readouterr()
    assert "notes/" in out  # a citation
    assert "2 sources" in err and "skipped notes/image.png" in err and "first token after" in err
    assert "\x1b" not in out + err  # no terminal, no control codes


def test_ask_keeps_a_context_of_its_own(
    capsys: pytest.CaptureFixture[str], notes: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HERD_HOME", str(notes.parent / "home"))
    rest = ("--model", tiny_model, "--max-tokens", 2, "--json")
    first = run_json(capsys, "ask", "q", notes, *rest)
    assert Path(first["context"]["dir"]).is_relative_to(notes.parent / "home")
    monkeypatch.chdir(notes)
    again = run_json(capsys, "ask", "q", ".", *rest)
    assert again["context"]["dir"] == first["context"]["dir"] and again["context"]["read_tokens"] == 0
    other = run_json(capsys, "ask", "q", "gate.txt", *rest)
    assert other["context"]["dir"] != first["context"]["dir"]


def test_read(capsys: pytest.CaptureFixture[str], notes: Path, tiny_model: Path) -> None:
    args = ("read", notes, "--context", notes.parent / "ctx", "--model", tiny_model)
    result = run_json(capsys, *args, "--json")
    assert result["context"]["read_tokens"] > 0 and result["timing"]["read_tokens_per_s"] > 0
    assert run([str(a) for a in args]) == 0
    out, err = capsys.readouterr()
    assert out == "" and "read 0 in" in err


def test_a_context_too_long_to_be_asked_is_told_when_it_is_read(
    capsys: pytest.CaptureFixture[str], notes: Path, short_model: Path
) -> None:
    context = notes.parent / "ctx"
    rest = ("--context", context, "--model", short_model)
    assert run_json(capsys, "read", notes, *rest, "--json")["warning"] is None
    (notes / "long.txt").write_text("More than there is room for.\n" * 50)
    assert run([str(a) for a in ("read", notes, *rest)]) == 0
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(f"warning: {context} has 1,") and told.endswith("ask each by itself")
    assert f"warning: {run_json(capsys, 'read', notes, *rest, '--json')['warning']}" == told
    assert fails(capsys, "ask", "q", *rest) == told.replace("warning", "error") + "\n"


def test_context_verbs(capsys: pytest.CaptureFixture[str], notes: Path, tiny_model: Path) -> None:
    context, archive, other = (notes.parent / name for name in ("ctx", "ctx.herd", "other"))
    model = ("--model", tiny_model)
    tokens = run_json(capsys, "read", notes, "--context", context, *model, "--json")["context"]["tokens"]
    shown = run_json(capsys, "context", "show", context, "--json")
    assert shown["tokens"] == tokens == sum(source["tokens"] for source in shown["sources"])
    assert [source["source"] for source in shown["sources"]] == ["notes/gate.txt", "notes/port.py"]
    assert run_json(capsys, "context", "verify", context, "--json")["ok"] is True
    assert run_json(capsys, "context", "compact", context, "--json")["dropped_chunks"] == 0
    assert run_json(capsys, "context", "export", context, archive, "--json")["bytes"] == archive.stat().st_size
    assert run_json(capsys, "context", "import", archive, other, "--json") == {
        "dir": str(other),
        "tokens": tokens,
        "sources": 2,
    }
    assert run_json(capsys, "context", "merge", context, other, "--json")["copied_tokens"] == 0
    assert shown["kv"] == "int8"
    assert "exists" in fails(capsys, "context", "export", context, archive)
    for verb in ("show", "verify", "compact"):
        assert run(["context", verb, str(context)]) == 0
        assert capsys.readouterr().out
        assert "holds no context" in fails(capsys, "context", verb, notes / "none")
    [segment] = context.glob("*.kv")
    data = bytearray(segment.read_bytes())
    data[-1] ^= 1
    segment.write_bytes(data)
    assert run(["context", "verify", str(context)]) == 1
    assert "herd context compact" in capsys.readouterr().err


def test_contexts_in_four_bits(capsys: pytest.CaptureFixture[str], notes: Path, tiny_model: Path) -> None:
    wide, narrow, model = notes.parent / "wide", notes.parent / "narrow", ("--model", tiny_model)
    read = ("read", notes, *model, "--json", "--context")
    run_json(capsys, *read, wide)
    assert run_json(capsys, *read, narrow, "--kv", "int4")["context"]["read_tokens"] > 0
    assert run_json(capsys, *read, narrow)["context"]["read_tokens"] == 0, "no format named: that of the context"
    assert f"compact {wide} --kv int4" in fails(capsys, *read, wide, "--kv", "int4")
    both = ("ask", "What is the code?", "--context", wide, "--context", narrow, *model, "--max-tokens", 2, "--json")
    assert run_json(capsys, *both)["citations"], "contexts of two formats are asked together"
    done = run_json(capsys, "context", "compact", wide, "--kv", "int4", "--json")
    assert done["bytes_after"] < done["bytes_before"]
    shown = [run_json(capsys, "context", "show", folder, "--json") for folder in (wide, narrow)]
    assert [s["kv"] for s in shown] == ["int4", "int4"]
    assert run(["context", "show", str(wide)]) == 0
    assert "K/V as int4" in capsys.readouterr().out
    assert "would not bring back" in fails(capsys, "context", "compact", wide, "--kv", "int8")
    assert "not 'int5'" in fails(capsys, *read, notes.parent / "new", "--kv", "int5")


def test_contexts_of_several_global_layers(
    capsys: pytest.CaptureFixture[str], notes: Path, several_model: Path
) -> None:
    exact, loose, model = notes.parent / "exact", notes.parent / "loose", ("--model", several_model)
    for context, how in ((exact, ()), (loose, ("--reading", "independent"))):
        assert run_json(capsys, "read", notes, "--context", context, *how, *model, "--json")["context"]["tokens"] > 0
    shown = [run_json(capsys, "context", "show", context, "--json") for context in (exact, loose)]
    assert [(s["reading"], s["global_layers"]) for s in shown] == [("sequential", 2), ("independent", 2)]
    assert shown[0]["kv_bytes_per_token"] == 2 * 2 * 2 * (8 + 2), "layers, K and V, heads, and numbers with their scale"
    assert run(["context", "show", str(exact)]) == 0
    assert "K/V as int8 of 2 global layers, sequential" in capsys.readouterr().out
    for context in (exact, loose):
        answer = run_json(capsys, "ask", "Which code?", notes, "--context", context, *model, "--json")
        assert answer["context"]["read_tokens"] == 0 and answer["citations"] and answer["quoted"]
        assert run(["context", "verify", str(context)]) == run(["context", "compact", str(context)]) == 0
        capsys.readouterr()
    message = fails(capsys, "read", notes, "--context", loose, "--reading", "sequential", *model)
    assert "was read with --reading independent, not sequential; leave it out" in message
    assert "not 'backwards'" in fails(capsys, "read", notes, "-c", notes.parent / "x", "--reading", "backwards", *model)
    assert "asked alone" in fails(capsys, "ask", "q", "--context", exact, "--context", loose, *model)
    assert "cannot be merged" in fails(capsys, "context", "merge", loose, exact)


def test_chat(
    capsys: pytest.CaptureFixture[str], notes: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chat(*args: object) -> list[dict[str, str]]:
        lines = iter(["Hello", "", "And you?"])
        monkeypatch.setattr("builtins.input", lambda prompt: _next_or_eof(lines))
        turns = run_json(capsys, "chat", "--model", tiny_model, "--max-tokens", 3, "--json", *args)
        assert isinstance(turns, list)
        return turns

    turns = chat()
    assert [t["role"] for t in turns] == ["user", "assistant"] * 2
    assert [t["content"] for t in turns[::2]] == ["Hello", "And you?"]
    drawn = ("--temperature", 2, "--top-k", 200, "--top-p", 0.99, "--min-p", 0.0001, "--repetition-penalty", 1.2)
    assert chat(*drawn, "--seed", 1) == chat(*drawn, "--seed", 1) != chat(*drawn, "--seed", 2)
    run(["read", str(notes), "--context", str(notes.parent / "ctx"), "--model", str(tiny_model)])
    capsys.readouterr()
    assert "citations" in chat("--context", notes.parent / "ctx")[1]


def test_info(capsys: pytest.CaptureFixture[str], tiny_model: Path) -> None:
    scout = run_json(capsys, "info", "scout", "--json")
    assert scout["parameters"] == SCOUT.num_parameters() == 107_769_861_120
    assert scout["layer_map"] == "12x(3xlE GE)"
    assert run_json(capsys, "info", "maverick", "--json")["active_parameters"] == MAVERICK.num_parameters(active=True)
    tiny = run_json(capsys, "info", tiny_model, "--json")
    assert tiny["layer_map"] == "ld GE ld" and tiny["weight_bytes"] >= 4 * tiny["parameters"]
    here = run_json(capsys, "info", "--json")
    assert here["torch"].startswith("2.13")
    assert run(["info", "scout"]) == 0
    assert "107,769,861,120" in capsys.readouterr().out


def test_info_lists_operations_by_what_does_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = {"attend": "reference (none)", "layers": "native (avx2)", "linear": "native (avx2)"}
    monkeypatch.setattr("herd.kernels.operations", lambda: done)
    assert run_json(capsys, "info", "--json")["operations"] == done
    assert run(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert lines == ["operations  native (avx2): layers, linear", "            reference (none): attend"]


def test_user_errors_are_one_line(capsys: pytest.CaptureFixture[str], notes: Path, tiny_model: Path) -> None:
    model = ("--model", tiny_model)
    assert "nothing to answer from" in fails(capsys, "ask", "q")
    assert "does not exist" in fails(capsys, "ask", "q", "--context", notes / "none", *model)
    assert "no such file" in fails(capsys, "read", notes / "none", "-c", notes.parent / "c", *model).lower()
    assert "is empty" in fails(capsys, "ask", "q", "--context", notes.parent / "c", *model)
    assert "not a folder" in fails(capsys, "ask", "q", notes, "--model", notes / "none")
    assert "holds no context" in fails(capsys, "ask", "q", notes, "--context", notes, *model)
    assert "PATH" in fails(capsys, "read", "--context", notes.parent / "c")
    assert "aks" in fails(capsys, "aks", "q")
    assert "temperature" in fails(capsys, "chat", "--temperature", "-1", *model)
    for option in ("--temperature", "--repetition-penalty"):
        assert "are greedy" in fails(capsys, "chat", option, "2", "--context", notes.parent / "c", *model)


def test_unexpected_failure_is_one_line_and_code_1(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("herd.cli.info.installation", lambda: 1 // 0)
    assert "ZeroDivisionError" in fails(capsys, "info", code=1)
    assert run(["--debug", "info"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_closed_pipe_is_quiet(tiny_model: Path) -> None:
    done = subprocess.run(
        f"{sys.executable} -m herd info scout | true; exit ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stderr


def test_upcycle_then_chat(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = write_gguf(tiny_llama(), tmp_path / "llama.gguf"), tmp_path / "llama4"
    args = ("upcycle", source, out, "--global-layer", 2, "--chunk", 32, "--experts", 2, "--expert-width", 8)
    made = run_json(capsys, *args, "--json")
    assert made["layer_map"] == "3xld GE 2xld" and made["experts"]["routed"] == 2
    assert "exists" in fails(capsys, *args)
    assert "use 1 to 4" in fails(capsys, *args[:2], tmp_path / "other", "--global-layer", 9, "--chunk", 32)
    lines = iter(["Hello"])
    monkeypatch.setattr("builtins.input", lambda prompt: _next_or_eof(lines))
    assert len(run_json(capsys, "chat", "--model", out, "--max-tokens", 2, "--json")) == 2


def test_train_and_eval_refuse_what_is_not_there(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path
) -> None:
    assert "none.toml" in fails(capsys, "train", tmp_path / "none.toml", "--run-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    options = ("--model", tiny_model, "--work-dir", tmp_path / "work")
    assert "no evaluation is called 'nedle'" in fails(capsys, "eval", "nedle", *options)
    assert "length" in fails(capsys, "eval", "needle", *options)
    assert "leave --length and --kv out" in fails(capsys, "eval", "perplexity", "--kv", "int4", *options)


def _next_or_eof(lines: Iterator[str]) -> str:
    try:
        return next(lines)
    except StopIteration:
        raise EOFError from None
