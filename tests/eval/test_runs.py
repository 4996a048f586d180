"""Whole evaluations with a tiny random model: they end, write JSON, and count what they asked."""

import json
import shutil
from pathlib import Path

import pytest

import herd
from herd import eval as evaluation
from herd.context.scan import MISSED
from herd.context.store import Store
from herd.errors import ConfigError, HerdError
from herd.eval import asking, baselines, context, corpus, decode, lookup, needle, perplexity

PACKAGES = ("asyncio", "http")


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> herd.Model:
    """The tiny model with chunks of 1,024 bytes, so that questions find their evidence in one chunk."""
    folder = tmp_path_factory.mktemp("model") / "long"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_chunk_size": 1024}))
    return herd.load(folder)


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "MAX_TOKENS", 4)
    monkeypatch.setattr(baselines, "RAG_TOKENS", 2)
    monkeypatch.setattr(baselines, "TOP", 2)


def test_needle_writes_what_it_found(model: herd.Model, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "needle.json"
    notes: list[str] = []
    result = evaluation.run(
        "needle", model, lengths=["4K", 2048], trials=4, out=out, workdir=tmp_path, progress=notes.append, seed=3
    )
    assert json.loads(out.read_text()) == result
    assert result["command"] == "herd eval needle --length 4K,2048 --trials 4 --seed 3 --model long"
    assert [one["length"] for one in result["results"]] == [4096, 2048]
    for one, summary in zip(result["results"], evaluation.summary(result), strict=True):
        assert one["context_tokens"] >= one["length"] and len(one["trial_rows"]) == 4
        assert one["exact"] == 0 and "trial_rows" not in summary
    assert any("questions answered" in note for note in notes)
    assert str(tmp_path) not in out.read_text()


def test_contexts_in_four_bits_are_kept_apart(model: herd.Model, tmp_path: Path) -> None:
    read = {}
    for kv in ("int8", "int4"):
        result = evaluation.run(
            "needle", model, lengths=[2048], trials=2, workdir=tmp_path, progress=lambda note: None, kv=kv
        )
        read[result["command"]] = [(one["kv"], one["read_tokens"] > 0) for one in result["results"]]
    command, model_ = "herd eval needle --length 2048 --trials 2 --seed 0", "--model long"
    assert read == {f"{command} {model_}": [("int8", True)], f"{command} --kv int4 {model_}": [("int4", True)]}


def test_lookup_measures_model_absent_and_baselines(model: herd.Model, tmp_path: Path) -> None:
    result = lookup.lookup(model, PACKAGES, 60_000, 4, tmp_path, lambda note: None, absent=5, base=model)
    assert result["questions"] == 4 and len(result["rows"]) == 4
    assert result["absent"]["questions"] == 5 and result["absent"]["right"] == 0
    assert set(result["baselines"]) == {"bm25", "rag"} and len(result["baselines"]["rag"]["rows"]) == 4
    again = lookup.lookup(model, PACKAGES, 60_000, 4, tmp_path, lambda note: None, absent=5)
    assert again["read_tokens"] == 0 and again["rows"] == result["rows"]


def test_perplexity_of_the_same_weights_is_the_same(model: herd.Model) -> None:
    result = perplexity.perplexity(model, model, 2, lambda note: None, window=64)
    assert result["change_percent"] == 0 and result["tokens"] == 128
    after_bos = result["after_bos"]
    assert after_bos["change_percent"] == 0 and after_bos["perplexity"] != result["perplexity"]
    with pytest.raises(ConfigError, match="chunk"):
        perplexity.perplexity(model, None, 1, lambda note: None, window=4096)


def test_cost_of_a_context(model: herd.Model, tmp_path: Path) -> None:
    result = evaluation.run("context", model, lengths=["4K"], workdir=tmp_path, progress=lambda note: None)
    (one,) = result["results"]
    assert one["context_tokens"] >= 4096 and one["bytes_per_token"] > 0 and one["read_tokens_per_s"] > 0
    assert 0 < one["edit_read_tokens"] <= 4096
    assert one["peak_memory_gb"]["ask"] > 0 and one["second_ask_first_token_s"] > 0
    assert one["decode_tokens"] == 64 and one["decode_tokens_per_s"] > 0 and one["decode_read_share"] >= 0
    assert 0 <= one["missed_mass"] <= MISSED
    (again,) = evaluation.run("context", model, lengths=["4K"], workdir=tmp_path, progress=lambda note: None)["results"]
    assert (again["read_s"], again["bytes_per_token"]) == (one["read_s"], one["bytes_per_token"])
    assert again["edit_read_tokens"] > 0, "another edit"
    next(tmp_path.rglob("context-int8.json")).unlink()
    with pytest.raises(HerdError, match="remove"):
        evaluation.run("context", model, lengths=["4K"], workdir=tmp_path, progress=lambda note: None)


def test_decoding_reads_keys_and_weights_and_ends_nowhere_early(
    model: herd.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("Ada keeps the north gate.\n" * 200)
    herd.Context.open(tmp_path / "ctx", model).read([tmp_path / "a.txt"])
    monkeypatch.setattr(decode.limits, "read_bytes_per_s", lambda: 1e9)
    monkeypatch.setattr(model.tokenizer, "eos_ids", list(range(0, 259, 2)))  # half of all tokens would end it
    result = decode.decode(model, tmp_path / "ctx", "Who keeps the gate?", 80)
    assert result["decode_tokens"] == 80 and 0 <= result["missed_mass"] <= MISSED
    cfg, store = model.config, Store.open(tmp_path / "ctx")
    keys = store.tokens * cfg.num_key_value_heads * (cfg.head_dim + 2)  # a byte for a number, two for a scale
    assert decode.read_bytes(model, store) == keys + 4 * cfg.num_parameters(active=True)


def test_the_edit_is_one_more_line() -> None:
    assert context.edit("def a():\n    pass\n\n\ndef b():\n    pass\n", 20251).count("MARK = 20251\ndef b") == 1
    assert context.edit("x = 1\n", 1).startswith("x = 1\nHERD")


@pytest.mark.parametrize("ignored", [{"lengths": ["8K"]}, {"lengths": [], "kv": "int4"}, {"lengths": [], "kv": "int8"}])
def test_perplexity_refuses_what_only_a_context_has(
    ignored: dict[str, object], model: herd.Model, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="without a context; leave --length and --kv out"):
        evaluation.run("perplexity", model, trials=1, workdir=tmp_path, **ignored)


@pytest.mark.parametrize(("name", "lengths"), [("context", ["4K"]), ("perplexity", [])])
def test_free_answers_only_where_answers_are_judged(
    name: str, lengths: list[str], model: herd.Model, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="leave --free out"):
        evaluation.run(name, model, lengths=lengths, trials=1, workdir=tmp_path, quote=False)


@pytest.mark.parametrize(
    ("ignored", "option"),
    [({"trials": 1}, "--trials"), ({"with_base": False}, "--no-base"), ({"quote": False}, "--free")],
)
def test_a_context_refuses_what_it_would_ignore(
    ignored: dict[str, object], option: str, model: herd.Model, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"leave {option} out"):
        evaluation.run("context", model, lengths=["4K"], workdir=tmp_path, **ignored)


@pytest.mark.parametrize(("name", "most"), [("needle", 1_045_760), ("lookup", 1_046_016), ("context", 1_046_016)])
def test_a_length_without_room_for_a_question_is_refused_before_anything_is_read(
    name: str, most: int, model: herd.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = {"trials": 2} if name == "needle" else {}
    for reads in ("package_files", "fill"):
        monkeypatch.setattr(corpus, reads, lambda *_: pytest.fail("something was read"))
    for lengths in (["1M"], ["4K", most + 1]):
        with pytest.raises(ConfigError, match=f"1,048,576 positions, .* leave {most:,} for a context"):
            evaluation.run(name, model, lengths=lengths, workdir=tmp_path, **trials)
    corpus.check_room(model, most, 2 * needle.MOST_TOKENS if name == "needle" else 0)


def test_contexts_that_go_on_with_filler_are_read_once(
    model: herd.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages, tokens = ("json",), 60_000
    monkeypatch.setattr(corpus, "FILLER", ("concurrent",))
    quiet = {"workdir": tmp_path, "progress": lambda note: None}
    needles = needle.needle(model, tokens, 4, packages=packages, **quiet)
    assert needles["filler"] == ["json", "concurrent"] and needles["read_tokens"] == needles["context_tokens"]
    asked = lookup.lookup(model, packages, tokens, 0, absent=2, **quiet)
    assert asked["filler"] == ["concurrent"] and tokens <= asked["context_tokens"] < tokens + 1024
    assert asked["read_tokens"] < asked["context_tokens"]
    with pytest.raises(HerdError, match="remove"):
        context.context(model, tokens, packages=packages, **quiet)


@pytest.mark.parametrize(
    ("name", "lengths", "trials"), [("nothing", ["8K"], 1), ("needle", [], 1), ("needle", ["8K"], 0)]
)
def test_wrong_use_is_told(name: str, lengths: list[str], trials: int, model: herd.Model, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        evaluation.run(name, model, lengths=lengths, trials=trials, workdir=tmp_path)
