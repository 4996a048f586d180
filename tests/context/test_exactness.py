"""Reading chunk by chunk and asking gives what one full causal forward pass gives, on software we did not write."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Llama4ForCausalLM, Llama4TextConfig

from herd import engine
from herd.context import scan
from herd.context.cache import ContextCache, ContextRow
from herd.context.citations import cite
from herd.context.limits import start_position, too_long
from herd.context.store import Store, spec_for
from herd.kernels import attend, dequantize_kv
from herd.model import Transformer
from tests.context.tiny_context import CONFIG, Bytes, put, read_paths, spec, tiny_model

CHUNK = 48
WIDE = replace(CONFIG, attention_chunk_size=CHUNK)

QUESTION = list(b"where is line 7? \n answer: ")


def full_chunks(folder: Path, count: int) -> list[Path]:
    """Files that each fill one chunk of 48: a header (`# name:1` and a line end) and two lines, of 16 bytes each."""
    folder.mkdir()
    paths = [folder / f"source{i:05}" for i in range(count)]
    for i, path in enumerate(paths):
        path.write_text(f"line {i} is {i * 79 % 1000:03}".ljust(15)[:15] + "\n" + "and a long tail\n")
    return paths


def asked(model: Transformer, cache: ContextCache) -> torch.Tensor:
    """Logits [1, T, V] of the question."""
    positions = torch.arange(len(QUESTION))[None] + cache.start_position
    return model(torch.tensor([QUESTION]), positions, cache.rows([cache.open(len(QUESTION))]))


@pytest.mark.parametrize("chunks", [1, 6])
@torch.inference_mode()
def test_a_context_equals_one_forward_pass_of_transformers(tmp_path: Path, chunks: int) -> None:
    model = tiny_model(WIDE)
    opened = Store.open(tmp_path / "ctx", spec_for(WIDE, "tiny", "float32"))
    read_paths(opened, *full_chunks(tmp_path / "src", chunks), model=model)
    ids = [i for chunk in range(len(opened.chunks)) for i in opened.ids(chunk)]
    assert len(ids) == chunks * CHUNK, "every chunk is full, so positions have no gaps"

    theirs = Llama4ForCausalLM._from_config(
        Llama4TextConfig.from_dict(WIDE.to_hf()), attn_implementation="eager"
    ).eval()
    theirs.load_state_dict(model.state_dict())
    cache = ContextCache([opened], WIDE)
    ours_TV = asked(model, cache)[0]
    theirs_TV = theirs(torch.tensor([ids + QUESTION]), use_cache=False).logits[0, len(ids) :]
    assert (ours_TV - theirs_TV).abs().max() <= 1e-4

    answer = engine.generate(model, [QUESTION], max_tokens=12, cache=ContextCache([opened], WIDE))[0]
    expected = list(QUESTION)
    for _ in answer:
        logits_V = theirs(torch.tensor([ids + expected]), use_cache=False).logits[0, -1]
        expected.append(int(logits_V.argmax()))
    assert answer == expected[len(QUESTION) :]


@torch.inference_mode()
def test_several_contexts_count_as_one(tmp_path: Path) -> None:
    model = tiny_model(WIDE)
    places = full_chunks(tmp_path / "src", 5)
    whole, first, second = (Store.open(tmp_path / n, spec_for(WIDE, "tiny", "float32")) for n in ("w", "a", "b"))
    read_paths(whole, *places, model=model)
    read_paths(first, *places[:2], model=model)
    read_paths(second, *places[2:], model=model)
    logits = []
    for stores in ([whole], [first, second]):
        cache = ContextCache(stores, WIDE)
        logits.append(asked(model, cache))
    assert len(second.chunks) == 3 and cache.start_position == 5 * CHUNK
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("room", [1, 20, 40])
@torch.inference_mode()
def test_where_a_question_stands_decides_its_temperature_only(tmp_path: Path, room: int) -> None:
    """So short chunks may be asked about that have no whole attention chunk of positions each."""
    opened = Store.open(tmp_path / "ctx", spec())
    read_paths(opened, *full_chunks(tmp_path / "src", 5)[1:], *full_chunks(tmp_path / "more", 3))
    assert opened.tokens % 32 != 0 < opened.tokens < opened.end_position == len(opened.chunks) * 32
    positions = opened.end_position - 10  # not enough for a whole chunk each
    starts, logits = [], []
    for short in (CONFIG, replace(CONFIG, max_position_embeddings=positions)):
        for tempered in (True, False):
            cfg = replace(short, attn_temperature_tuning=tempered)
            cache = ContextCache([opened], cfg, room=room)
            starts.append(cache.start_position)
            logits.append(asked(tiny_model(cfg), cache))
    assert starts[0] == opened.end_position
    assert opened.tokens <= starts[2] <= positions - room < starts[2] + 32 and starts[2] % 32 == 0
    torch.testing.assert_close(logits[1], logits[3], rtol=0, atol=1e-5)
    assert (logits[0] - logits[2]).abs().max() > 1e-4


def test_a_question_never_starts_before_as_many_positions_as_tokens(tmp_path: Path) -> None:
    """Nor elsewhere than behind all chunks while there is room there, whatever it needs."""
    opened = Store.open(tmp_path / "ctx", spec())
    put(opened, "a", [bytes([i]) * 20 for i in range(10)])  # 200 tokens, 10 chunks of 32 positions
    opened.refresh()
    places = [(1000, 1), (330, 10), (330, 11), (320, 1), (300, 1), (300, 60), (300, 90), (224, 1)]
    starts = [start_position([opened], positions, room) for positions, room in places]
    assert starts == [320, 320, 288, 288, 288, 224, 224, 224]
    assert too_long([opened], 225) is None and too_long([opened], 224) is not None
    assert start_position([opened, opened], 1000) == 640 and start_position([opened, opened], 512) == 480


@torch.inference_mode()
def test_a_glance_looks_at_what_the_last_token_of_a_whole_prompt_looks_at(tmp_path: Path) -> None:
    """In whatever pieces and company the prompts come."""
    model = tiny_model(WIDE)
    opened = Store.open(tmp_path / "ctx", spec("tiny", "int8"))
    read_paths(opened, *full_chunks(tmp_path / "src", 6), model=model)
    cache = ContextCache([opened], WIDE, room=40)

    def looked(memory: ContextCache, prompts: list[list[int]], tokens: int) -> list[ContextRow]:
        its = engine.Engine(model, cache=memory, prompt_tokens=tokens)
        rows = [its.row(its.submit(engine.Request(prompt, 1))) for prompt in prompts]
        assert len(list(engine.stream(its))) == len(prompts)
        return [row for row in rows if isinstance(row, ContextRow)]

    prompts = [QUESTION, QUESTION[:9], [7]]
    whole = looked(cache, prompts, 100)
    for tokens in (100, 5):
        for glance, row in zip(looked(cache.glances(), prompts, tokens), whole, strict=True):
            masses = [dict(its.chunk_mass(0.0)) for its in (glance, row)]
            assert masses[0].keys() == masses[1].keys() and row.mass > 0.01
            assert all(abs(masses[0][place] - mass) < 1e-5 for place, mass in masses[1].items())


def test_questions_asked_together_get_the_answers_they_get_alone(tmp_path: Path) -> None:
    model = tiny_model()
    opened = Store.open(tmp_path / "ctx", spec())
    read_paths(opened, *full_chunks(tmp_path / "src", 5), model=model)
    prompts = [QUESTION, list(b"?"), list(b"a somewhat longer question about line 3 that spans chunks: ")]
    cache = ContextCache([opened], CONFIG)
    together = engine.generate(model, prompts, max_tokens=6, cache=cache)
    alone = [engine.generate(model, [prompt], max_tokens=6, cache=cache)[0] for prompt in prompts]
    assert together == alone


@pytest.mark.parametrize("prompt_tokens", [5, 1024])
def test_citations_do_not_depend_on_company(tmp_path: Path, prompt_tokens: int) -> None:
    """Nor on the pieces in which a question was read."""
    model = tiny_model()
    opened = Store.open(tmp_path / "ctx", spec())
    read_paths(opened, *full_chunks(tmp_path / "src", 5), model=model)
    prompts = [QUESTION, list(b"?"), list(b"a somewhat longer question about line 3 that spans chunks: ")]

    def ask(prompts: list[list[int]], prompt_tokens: int) -> list[ContextRow]:
        asking = engine.Engine(model, cache=ContextCache([opened], CONFIG), rows=2, prompt_tokens=prompt_tokens)
        found = []
        for number, prompt in enumerate(prompts):
            asking.submit(engine.Request(prompt, 6))
            row = asking.row(number)
            assert isinstance(row, ContextRow)
            found.append(row)
        assert sum(token.finish == "length" for token in engine.stream(asking)) == len(prompts)
        return found

    for row, prompt in zip(ask(prompts, prompt_tokens), prompts, strict=True):
        [alone] = ask([prompt], 1024)
        assert cite(row, Bytes()) == cite(alone, Bytes()) != []
        assert row.mass == pytest.approx(alone.mass, rel=1e-5)
        assert row.missed == pytest.approx(alone.missed, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("kv", ["int8", "int4"])
def test_a_scan_equals_attention_over_all_live_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int, kv: str
) -> None:
    """Also with chunks that no source uses any more, and runs of several chunks."""
    monkeypatch.setattr(scan, "PART_TOKENS", 40)
    opened = Store.open(tmp_path / "ctx", spec(dtype=kv))
    put(opened, "a", [b"one" * 3, b"two" * 5, b"gone", b"three" * 4, b"\x00" * 30])
    put(opened, "b", [b"four" * 2])
    put(opened, "a", [b"one" * 3, b"two" * 5, b"three" * 4, b"\x00" * 30])
    opened.refresh()
    torch.manual_seed(0)
    q_GRd = (torch.randn(2, rows, 8) * 0.02).to(dtype)
    found = scan.scan(q_GRd, scan.parts(scan.runs(opened))[0])
    kvs = [opened.kv(i) for i in range(len(opened.chunks))]
    k = torch.cat([dequantize_kv(kv.k_GNd, kv.k_scale_GN, torch.float32) for kv in kvs], 1)
    v = torch.cat([dequantize_kv(kv.v_GNd, kv.v_scale_GN, torch.float32) for kv in kvs], 1)
    # The reference scales by 1/sqrt(d) itself and wants [B, T, H, d].
    q = q_GRd.float().transpose(0, 1)[None] * 8**0.5
    out, lse = attend(q, k.transpose(0, 1)[None], v.transpose(0, 1)[None], None)
    torch.testing.assert_close(found.out_GRd, out[0].transpose(0, 1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.lse_GR, lse[0].T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.lse_KGR.logsumexp(0), found.lse_GR, rtol=1e-5, atol=1e-5)
    assert len(found.lse_KGR) > 1


def test_an_empty_context_is_no_context(tmp_path: Path) -> None:
    model, opened = tiny_model(), Store.open(tmp_path / "ctx", spec())
    cache = ContextCache([opened], CONFIG)
    assert cache.start_position == 0
    torch.testing.assert_close(asked(model, cache), model(torch.tensor([QUESTION])))
