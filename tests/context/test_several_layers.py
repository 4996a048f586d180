"""Models with several global layers: reading in sequence and asking is one forward pass; independent reading is not.

Shape suffixes: T tokens, G key/value heads, V vocabulary.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Llama4ForCausalLM, Llama4TextConfig

from herd import engine
from herd.config import TextConfig
from herd.context import forward, manifest, read, scan
from herd.context.cache import ContextCache, ContextRow
from herd.context.citations import cite
from herd.context.segment import INDEPENDENT, SEQUENTIAL, Spec, pack
from herd.context.store import NewChunk, NewSource, Store, chunk_hash, spec_for
from herd.errors import ContextError
from herd.kernels import attend, dequantize_kv
from herd.model import KVCache, KVRow, Transformer
from tests.context.test_exactness import CHUNK as WIDE_CHUNK
from tests.context.test_exactness import full_chunks
from tests.context.tiny_context import CHUNK, CONFIG, SEVERAL, Bytes, CountingModel, read_paths, several, tiny_model

LAYOUTS = {
    "3 of 5": SEVERAL,
    "2 of 4": replace(SEVERAL, num_hidden_layers=4, no_rope_layers=(1, 0, 0, 1)),
    "all": replace(SEVERAL, num_hidden_layers=2, no_rope_layers=(0, 0)),
}
QUESTION = list(b"where is line 7? \n answer: ")


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Sources of several chunks each, few of which are full."""
    folder = tmp_path / "src"
    folder.mkdir()
    for name, lines in (("a", 7), ("b", 1), ("c", 4)):
        (folder / name).write_text("".join(f"{name} {i * 37 % 100}\n" for i in range(lines)))
    return sorted(folder.iterdir())


def sequence(opened: Store) -> list[int]:
    """Chunks, as indices into the store's, in the order of the sequence."""
    with manifest.connect(opened.folder) as db:
        rows = [chunk for _, chunk in manifest.source_chunks(db)]
    place = {chunk.id: index for index, chunk in enumerate(opened.chunks)}
    return [place[row] for row in rows]


def plain_pass(model: Transformer, opened: Store) -> tuple[KVCache, KVRow]:
    """What the model remembers of the chunks in their order, each at the position it has in the context."""
    cache = KVCache(model.config)
    row = cache.open(opened.tokens + 64)
    for place, chunk in enumerate(sequence(opened)):
        ids = opened.ids(chunk)
        positions = place * CHUNK + torch.arange(len(ids))[None]
        model.states(torch.tensor([ids]), positions, cache.rows([row]))
    return cache, row


def ask(model: Transformer, cache: ContextCache | KVCache, row: KVRow, start: int) -> Tensor:
    """Logits [T, V] of the question."""
    positions = start + torch.arange(len(QUESTION))[None]
    return model(torch.tensor([QUESTION]), positions, cache.rows([row]))[0]


@pytest.mark.parametrize("bounds", [{}, {"SEGMENT_TOKENS": 60}, {"_COMMIT_S": 0.0}], ids=["at once", "parts", "chunks"])
@pytest.mark.parametrize("config", LAYOUTS.values(), ids=LAYOUTS.keys())
@torch.inference_mode()
def test_a_sequence_equals_one_forward_pass(
    tmp_path: Path, files: list[Path], config: TextConfig, bounds: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in bounds.items():
        monkeypatch.setattr(read, name, value)
    model, opened = tiny_model(config), Store.open(tmp_path / "ctx", several(dtype="float32", config=config))
    read_paths(opened, *files, model=model)
    assert len(opened.chunks) > 5 and min(chunk.tokens for chunk in opened.chunks) < CHUNK
    assert (len(opened.segments) > 1) == bool(bounds)
    plain, row = plain_pass(model, opened)

    layers = config.global_layers
    kvs = [opened.kv(chunk) for chunk in sequence(opened)]
    for place, layer in enumerate(layers):
        for kept, theirs_SGd in zip(("k_GNd", "v_GNd"), row.remembered(layer), strict=True):
            ours_GSd = torch.cat([getattr(kv.layer(place, len(layers)), kept) for kv in kvs], 1)
            torch.testing.assert_close(ours_GSd.transpose(0, 1), theirs_SGd, rtol=1e-4, atol=1e-4)

    cache = ContextCache([opened], config)
    assert cache.start_position == len(opened.chunks) * CHUNK
    ours_TV = ask(model, cache, cache.open(64), cache.start_position)
    theirs_TV = ask(model, plain, row, cache.start_position)
    torch.testing.assert_close(ours_TV, theirs_TV, rtol=1e-4, atol=1e-4)
    wrong_TV = ask(model, cache, cache.open(64), cache.start_position + CHUNK)
    assert (wrong_TV - theirs_TV).abs().max() > 0.01, "these weights tell positions apart"


@torch.inference_mode()
def test_a_sequence_equals_transformers(tmp_path: Path) -> None:
    """Of full chunks, so that positions have no gaps, on software we did not write; also token after token."""
    config = replace(SEVERAL, attention_chunk_size=WIDE_CHUNK)
    model, opened = tiny_model(config), Store.open(tmp_path / "ctx", several(dtype="float32", config=config))
    read_paths(opened, *full_chunks(tmp_path / "src", 5), model=model)
    ids = [i for chunk in sequence(opened) for i in opened.ids(chunk)]
    assert len(ids) == 5 * WIDE_CHUNK
    as_theirs = Llama4TextConfig.from_dict(config.to_hf())
    theirs = Llama4ForCausalLM._from_config(as_theirs, attn_implementation="eager").eval()
    theirs.load_state_dict(model.state_dict())
    cache = ContextCache([opened], config)
    ours_TV = ask(model, cache, cache.open(64), cache.start_position)
    theirs_TV = theirs(torch.tensor([ids + QUESTION]), use_cache=False).logits[0, len(ids) :]
    assert (ours_TV - theirs_TV).abs().max() <= 1e-4
    answer = engine.generate(model, [QUESTION], max_tokens=8, cache=cache)[0]
    expected = list(QUESTION)
    for _ in answer:
        expected.append(int(theirs(torch.tensor([ids + expected]), use_cache=False).logits[0, -1].argmax()))
    assert answer == expected[len(QUESTION) :]


class _Kept:
    """A cache that sees the chunks before as they are kept and, exactly, the chunk itself; by brute force."""

    def __init__(self, opened: Store, before: list[int], config: TextConfig) -> None:
        self.opened, self.before, self.config = opened, before, config
        self.own: list[tuple[Tensor, Tensor]] = []

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        mask = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril()
        if not self.config.is_local(layer):
            layers, place = len(self.config.global_layers), self.config.global_layers.index(layer)
            self.own.append((k[0], v[0]))
            kvs = [self.opened.kv(chunk).layer(place, layers) for chunk in self.before]
            past_k = [dequantize_kv(kv.k_GNd, kv.k_scale_GN, torch.float32).transpose(0, 1) for kv in kvs]
            past_v = [dequantize_kv(kv.v_GNd, kv.v_scale_GN, torch.float32).transpose(0, 1) for kv in kvs]
            k, v = torch.cat([*past_k, k[0]])[None], torch.cat([*past_v, v[0]])[None]
            mask = torch.cat([torch.ones(q.shape[1], k.shape[1] - q.shape[1], dtype=torch.bool), mask], 1)
        return attend(q, k, v, mask[None])[0]


@pytest.mark.parametrize("kv", ["int8", "int4"])
@pytest.mark.parametrize("head_dim", [8, 64])
@torch.inference_mode()
def test_a_chunk_sees_those_before_it_as_they_are_kept(
    tmp_path: Path, files: list[Path], kv: str, head_dim: int
) -> None:
    """So a read that was interrupted goes on with what it would have seen."""
    config = replace(SEVERAL, head_dim=head_dim)
    model, opened = tiny_model(config), Store.open(tmp_path / "ctx", several(dtype=kv, config=config))
    read_paths(opened, *files, model=model)
    order = sequence(opened)
    for place, chunk in enumerate(order):
        ids, kept = opened.ids(chunk), opened.kv(chunk)
        before = [opened.kv(other) for other in order[:place]]
        ours = forward.read_after(model, ids, several(dtype="float32", config=config), place, before)
        cache = _Kept(opened, order[:place], config)
        model.states(torch.tensor([ids]), place * CHUNK + torch.arange(len(ids))[None], cache)
        k_TGd, v_TGd = (torch.cat(x, 1) for x in zip(*cache.own, strict=True))
        torch.testing.assert_close(ours.k_GNd, k_TGd.transpose(0, 1), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.v_GNd, v_TGd.transpose(0, 1), rtol=1e-4, atol=1e-4)
        # Where a number lies between two codes, the order of a sum decides which is taken.
        again = pack(ours.k_GNd.transpose(0, 1), ours.v_GNd.transpose(0, 1), opened.spec)
        assert all((a != b).float().mean() < 0.001 for a, b in zip(again.arrays(), kept.arrays(), strict=True))


@torch.inference_mode()
def test_independent_reading_reads_each_chunk_as_if_it_were_alone(tmp_path: Path, files: list[Path]) -> None:
    model = tiny_model(SEVERAL)
    opened = Store.open(tmp_path / "ctx", several(INDEPENDENT, "float32"))
    read_paths(opened, *files, model=model)
    for chunk in range(len(opened.chunks)):
        row = KVCache(SEVERAL).open(CHUNK)
        model.states(torch.tensor([opened.ids(chunk)]), None, KVCache(SEVERAL).rows([row]))
        for place, layer in enumerate(SEVERAL.global_layers):
            kv = opened.kv(chunk).layer(place, 3)
            for ours_GSd, theirs_SGd in zip((kv.k_GNd, kv.v_GNd), row.remembered(layer), strict=True):
                torch.testing.assert_close(ours_GSd.transpose(0, 1), theirs_SGd, rtol=1e-4, atol=1e-4)

    exact = Store.open(tmp_path / "exact", several(dtype="float32"))
    read_paths(exact, *files, model=model)
    caches = [ContextCache([store], SEVERAL) for store in (opened, exact)]
    approximate_TV, exact_TV = (ask(model, cache, cache.open(64), cache.start_position) for cache in caches)
    assert (approximate_TV - exact_TV).abs().max() > 0.01, "an approximation, as the documents say"

    counting = CountingModel(SEVERAL)
    files[0].write_text(files[0].read_text().replace("a 37", "a 99"))
    read_paths(opened, *files, model=counting)
    assert counting.rows == 1, "an edit costs only its chunks"


@torch.inference_mode()
def test_with_one_global_layer_both_readings_are_the_same(tmp_path: Path, files: list[Path]) -> None:
    assert several(SEQUENTIAL, config=CONFIG) == several(INDEPENDENT, config=CONFIG) == Spec("tiny", 2, 8, CHUNK)
    opened = Store.open(tmp_path / "ctx", several(config=CONFIG))
    with manifest.connect(opened.folder) as db:
        assert set(manifest.read_meta(db)) == {"format", "fingerprint", "kv_heads", "head_dim", "chunk", "dtype"}
    read_paths(opened, *files)
    assert Store.open(tmp_path / "ctx", several(INDEPENDENT, config=CONFIG)).tokens == opened.tokens > 0


def test_a_context_keeps_its_reading_and_says_so(tmp_path: Path) -> None:
    Store.open(tmp_path / "ctx", several(INDEPENDENT))
    assert Store.open(tmp_path / "ctx", several(), any_reading=True).spec.reading == INDEPENDENT
    with pytest.raises(ContextError, match=r"--reading independent, not sequential; leave it out, or read .* another"):
        Store.open(tmp_path / "ctx", several())
    with pytest.raises(ContextError, match="sequential or independent, not 'backwards'"):
        several("backwards")
    with pytest.raises(ContextError, match="not 'backwards'"):
        several("backwards", config=CONFIG)
    with pytest.raises(ContextError, match="with one global layer"):
        Spec("x", 1, 8, 8, "int8", 1, SEQUENTIAL)
    with pytest.raises(ContextError, match="0 global layers"):
        spec_for(replace(CONFIG, no_rope_layers=(1, 1, 1, 1)), "x")


def opposed(folder: Path) -> tuple[ContextCache, list[Store]]:
    """Two sources of one chunk each. In the first global layer the keys of chunk n point along axis n, in the second
    along axis 1 - n, in the third nowhere."""
    store = Store.open(folder, several(INDEPENDENT))
    with store.writer() as writer:
        batch = []
        for n, text in enumerate((b"# s0:1\none\n", b"# s1:1\ntwo\n")):
            k_TGd = torch.zeros(len(text), 6, 8)
            k_TGd[:, 0:2, n], k_TGd[:, 2:4, 1 - n] = 10.0, 10.0
            batch.append((NewChunk(chunk_hash("tiny", list(text)), list(text), 1, 1), pack(k_TGd, k_TGd, store.spec)))
        writer.commit(batch, [NewSource(f"s{n}", None, "", [batch[n][0].hash]) for n in range(2)])
    store.refresh()
    return ContextCache([store], SEVERAL), [store]


def look(cache: ContextCache, row: ContextRow, axis: int, at: int) -> None:
    """One token that looks along an axis, in each global layer, its own key far away from where it looks."""
    q, k = torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 2, 8)
    q[..., axis], k[..., axis] = 6.0, -10.0
    rows = cache.rows([row])
    for layer in SEVERAL.global_layers:
        rows.attend(layer, q, k, k, torch.tensor([[cache.start_position + at]]))


def test_attention_is_averaged_over_layers(tmp_path: Path) -> None:
    """Two of three layers look at one chunk each; the third at all tokens alike."""
    cache, [store] = opposed(tmp_path / "ctx")
    row = cache.open(8)
    look(cache, row, 0, 0)
    first, second = (chunk.tokens for chunk in store.chunks)
    masses = row.chunk_mass(0.0)
    for chunk, tokens in enumerate((first, second)):
        # Logits of 21 against -21 and 0: all of one layer's attention, and a share of the third's.
        assert masses[store, chunk] == pytest.approx((1 + tokens / store.tokens) / 3, abs=0.01)
        assert float(row.token_mass(store, chunk).sum()) == pytest.approx(masses[store, chunk], rel=1e-5)
    assert row.mass == pytest.approx(sum(masses.values()), rel=1e-5)
    assert row.looked_at(0.2) == [(store, 0), (store, 1)]
    look(cache, row, 5, 1)
    assert row.mass == pytest.approx(2 * 1.0, abs=0.1), "looks are summed"
    assert row.looked_at(0.9) == [], "the last look went everywhere"


@torch.inference_mode()
def test_citations_and_answers_do_not_depend_on_company(tmp_path: Path, files: list[Path]) -> None:
    model, opened = tiny_model(SEVERAL), Store.open(tmp_path / "ctx", several())
    read_paths(opened, *files, model=model)
    prompts = [QUESTION, list(b"?"), list(b"a somewhat longer question about line 3 that spans chunks: ")]

    def answers(prompts: list[list[int]], pieces: int) -> list[tuple[list[int], ContextRow]]:
        asking = engine.Engine(model, cache=ContextCache([opened], SEVERAL), prompt_tokens=pieces)
        rows = []
        for number, prompt in enumerate(prompts):
            asking.submit(engine.Request(prompt, 6))
            rows.append(asking.row(number))
        tokens = list(engine.stream(asking))
        return [([t.id for t in tokens if t.request == n], row) for n, row in enumerate(rows)]  # type: ignore[misc]

    for (ids, row), prompt in zip(answers(prompts, 7), prompts, strict=True):
        [(alone_ids, alone)] = answers([prompt], 1024)
        assert ids == alone_ids
        assert cite(row, Bytes()) == cite(alone, Bytes()) != []
        assert row.mass == pytest.approx(alone.mass, rel=1e-5)
        assert 0 < row.mass < 6.01, "six looks, averaged over layers and heads"


@torch.inference_mode()
def test_a_chunk_s_mass_is_what_the_model_gives_it(tmp_path: Path, files: list[Path]) -> None:
    """Against softmax over all keys, computed here from a plain pass."""
    model, opened = tiny_model(SEVERAL), Store.open(tmp_path / "ctx", several(dtype="float32"))
    read_paths(opened, *files, model=model)
    cache = ContextCache([opened], SEVERAL)
    row = cache.open(64, len(QUESTION))
    assert isinstance(row, ContextRow)
    ask(model, cache, row, cache.start_position)
    plain, its = plain_pass(model, opened)
    seen = dict.fromkeys(range(len(opened.chunks)), 0.0)

    class Spy:
        def __init__(self) -> None:
            self.rows = plain.rows([its])

        def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
            out = self.rows.attend(layer, q, k, v, positions)
            if not SEVERAL.is_local(layer):
                keys = its.remembered(layer)[0].repeat_interleave(2, 1)
                weights = torch.einsum("hd,shd->hs", q[0, -1], keys).div(8**0.5).softmax(-1).mean(0) / 3
                start = 0
                for chunk in sequence(opened):
                    seen[chunk] += float(weights[start : (start := start + opened.chunks[chunk].tokens)].sum())
            return out

    model(torch.tensor([QUESTION]), cache.start_position + torch.arange(len(QUESTION))[None], Spy())
    masses = row.chunk_mass(0.0)
    assert {chunk: masses[opened, chunk] for chunk in seen} == pytest.approx(seen, abs=1e-4)
    assert row.missed <= scan.MISSED


@torch.inference_mode()
def test_what_is_left_out_is_the_most_of_any_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, _ = opposed(tmp_path / "ctx")
    row, shares = cache.open(8), iter([0.1, 0.7, 0.3])
    real = scan.attend_parts

    def leaving_out(*args: object) -> object:
        found = real(*args)  # type: ignore[arg-type]
        return replace(found, left_out_GR=torch.full_like(found.left_out_GR, next(shares)))

    monkeypatch.setattr(scan, "attend_parts", leaving_out)
    look(cache, row, 0, 0)
    assert row.missed == pytest.approx(0.7)
