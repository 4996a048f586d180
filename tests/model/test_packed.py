"""Models that the native library runs, against the same weights in PyTorch's layers.

Shape suffixes: B batch, T tokens, D hidden, V vocabulary.
"""

from copy import deepcopy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from herd import kernels
from herd.config import TextConfig
from herd.formats import Format, Weights
from herd.model import KVCache, Transformer
from herd.model.cache import KVRows
from herd.model.quantized import pack_halves, quantize
from tests.model.tiny_models import build, memory, tiny, tokens

pytestmark = pytest.mark.skipif(
    not kernels.runs_layers(torch.empty(0), 64), reason="the native library is not used on this machine"
)

CHUNK = 40  # more than a panel of 32 tokens, and no multiple of one
CONFIG = tiny(
    hidden_size=72,
    num_hidden_layers=5,
    head_dim=64,
    intermediate_size=40,
    intermediate_size_mlp=104,
    num_experts_per_tok=2,
    moe_layers=(1, 3, 4),
    no_rope_layers=(1, 1, 0, 1, 0),
    attention_chunk_size=CHUNK,
)
GROUP = 24
Pair = tuple[Transformer, Transformer]  # packed, and in PyTorch


def pair(bits: int, cfg: TextConfig = CONFIG) -> Pair:
    model = decisive(build(cfg))
    ours, theirs = deepcopy(model), model
    weights = Weights.all(Format(f"int{bits}", GROUP))
    with pytest.MonkeyPatch.context() as patch:
        if bits == 16:
            pack_halves(ours.bfloat16())
            # What is packed holds activations in float32.
            ours.float(), theirs.bfloat16().float()
        else:
            quantize(ours, weights)
            patch.setenv("HERD_KERNELS", "reference")
            quantize(theirs, weights)
    assert ours.packed is not None and theirs.packed is None
    return ours, theirs


def decisive(model: Transformer) -> Transformer:
    """Each token says which experts it wants, so that rounding does not send it to others."""
    E = model.config.num_local_experts
    with torch.no_grad():
        for token, row_D in enumerate(model.model.embed_tokens.weight):
            row_D[:E] = 0
            row_D[token % E], row_D[(token + 1) % E] = 16, 8
        for block in model.blocks:
            block.post_attention_layernorm.weight[:E] = 1
            if (router := getattr(block.feed_forward, "router", None)) is not None:
                router.weight.zero_().fill_diagonal_(0.5)
            if not block.self_attn.local:  # less sharp: softmax makes more of what rounding changed
                block.self_attn.q_proj.weight *= 0.3
    return model


@pytest.fixture(scope="module", params=[16, 8, 4])
def bits(request: pytest.FixtureRequest) -> int:
    """Of weights."""
    return request.param


@pytest.fixture(scope="module")
def both(bits: int) -> Pair:
    return pair(bits)


def compare(found_BTD: Tensor, expected_BTD: Tensor) -> None:
    """Tokens differ by little of what they are: keys and values are in bfloat16, which in 8 and 4 bits rounds many
    activations to the next of 127 codes. What attends to another token, or is another, differs by half and more."""
    off_BT = (found_BTD - expected_BTD).norm(dim=-1) / expected_BTD.norm(dim=-1)
    assert float(off_BT.max()) < 0.1, f"off by {float(off_BT.max()):.2g}"
    assert float(off_BT.median()) < 0.03, f"most are off by {float(off_BT.median()):.2g}"


def positions(start: int, *counts: int) -> Tensor:
    """Of rows that have so many tokens from the same position on, padded to the longest with -1."""
    here_T = torch.arange(max(counts))
    return torch.where(here_T < torch.tensor(counts)[:, None], here_T + start, -1)


@torch.inference_mode()
@pytest.mark.parametrize("length", [1, 7, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
def test_whole_sequences(both: Pair, length: int) -> None:
    ours, theirs = both
    ids = tokens(2, length)
    compare(ours(ids), theirs(ids))


@torch.inference_mode()
@pytest.mark.parametrize("first", [1, 31, CHUNK])
def test_pieces_then_single_tokens(both: Pair, first: int) -> None:
    """Over the end of a chunk and of the next, with a cache; PyTorch's layers see the whole sequence at once."""
    ours, theirs = both
    ids, cache = tokens(2, 2 * CHUNK + 6), memory(CONFIG, 2, 2 * CHUNK + 6)
    ends = sorted({0, first, 33, CHUNK, CHUNK + 17, 2 * CHUNK, *range(2 * CHUNK, 2 * CHUNK + 7)})
    found = [ours(ids[:, a:b], positions(a, b - a, b - a), cache) for a, b in pairwise(ends)]
    compare(torch.cat(found, 1), theirs(ids))


@torch.inference_mode()
def test_rows_of_different_lengths(both: Pair) -> None:
    """Padded, each row is what it is alone, whatever stands in the padding; a row may have nothing new."""
    ours, theirs = both
    ids, seen, cache = tokens(3, CHUNK), [0, 0, 0], memory(CONFIG, 3, CHUNK)
    whole = theirs(ids)
    for counts in ((9, 1, 4), (1, 20, 0), (1, 1, 1), (5, 0, 33)):
        new_BT = torch.full((3, max(counts)), 96)
        here_BT = torch.full_like(new_BT, -1)
        for row, count in enumerate(counts):
            new_BT[row, :count] = ids[row, seen[row] : seen[row] + count]
            here_BT[row, :count] = torch.arange(count) + seen[row]
        found = ours(new_BT, here_BT, cache)
        assert found.isfinite().all()
        real = [(found[row, :n], whole[row, seen[row] : seen[row] + n]) for row, n in enumerate(counts)]
        compare(*(torch.cat(parts) for parts in zip(*real, strict=True)))
        seen = [a + b for a, b in zip(seen, counts, strict=True)]


@torch.inference_mode()
def test_one_row_of_several_sequences(both: Pair) -> None:
    """Side by side without padding, as the engine gives them."""
    ours, theirs = both
    cache, ids = KVCache(CONFIG, torch.bfloat16), tokens(3, 37)
    rows, seen = [cache.open(37) for _ in range(3)], [0, 0, 0]
    for counts in ((30, 2, 7), (1, 1, 1), (1, 34, 29)):
        spans = [range(a, a + n) for a, n in zip(seen, counts, strict=True)]
        new = torch.cat([row[span.start : span.stop] for row, span in zip(ids, spans, strict=True)])
        here = torch.tensor([position for span in spans for position in span])
        found = ours(new[None], here[None], cache.rows(rows, counts))[0]
        whole = [theirs(row[None])[0, span.start : span.stop] for row, span in zip(ids, spans, strict=True)]
        compare(found, torch.cat(whole))
        seen = [span.stop for span in spans]


class Asked(KVRows):
    """Answers for global layers itself, as a context does; local layers see only the rows."""

    def own(self, layer: int) -> KVRows | None:
        return self if CONFIG.is_local(layer) else None


@torch.inference_mode()
def test_a_cache_that_attends_itself_in_some_layers(both: Pair) -> None:
    ours, theirs = both
    ids = tokens(2, CHUNK + 3)
    cache = Asked(memory(CONFIG, 2, CHUNK + 3, torch.bfloat16).rows)
    found = [
        ours(ids[:, a:b], positions(a, b - a, b - a), cache) for a, b in pairwise([0, 30, CHUNK, CHUNK + 1, CHUNK + 3])
    ]
    compare(torch.cat(found, 1), theirs(ids))


@torch.inference_mode()
@pytest.mark.parametrize("length", [1, 33, CHUNK])
def test_reading_chunks_on_their_own(bits: int, length: int) -> None:
    """With one global layer; what stands right of a row changes nothing in it."""
    ours, theirs = pair(bits, replace(CONFIG, no_rope_layers=(1, 1, 1, 0, 1)))
    ids = tokens(3, length)
    for found, expected in zip(ours.read(ids, 2 * CHUNK), theirs.read(ids, 2 * CHUNK), strict=True):
        compare(found.flatten(2), expected.flatten(2))
    padded = torch.cat([ids, tokens(3, CHUNK - length, seed=2)], 1)
    for found, again in zip(ours.read(ids), ours.read(padded), strict=True):
        assert torch.equal(found, again[:, :length])


@torch.inference_mode()
def test_reading_chunks_one_after_the_other(both: Pair) -> None:
    """With several global layers, the cache attends for those below the last."""
    ids = tokens(1, 2 * CHUNK + 9)
    caches = (memory(CONFIG, 1, 130, torch.bfloat16), memory(CONFIG, 1, 130))
    for first in range(0, ids.shape[1], CHUNK):
        chunk = ids[:, first : first + CHUNK]
        found, expected = (model.read(chunk, first, cache) for model, cache in zip(both, caches, strict=True))
        for our_part, their_part in zip(found, expected, strict=True):
            compare(our_part.flatten(2), their_part.flatten(2))


def test_layers_and_head_are_given_up(both: Pair) -> None:
    ours, theirs = both
    left = {name for name, _ in ours.named_parameters()}
    assert left == {"model.embed_tokens.weight", "model.norm.weight"}
    assert len(theirs.blocks) == CONFIG.num_hidden_layers


@pytest.mark.parametrize("change", [{"head_dim": 16}, {"intermediate_size": 41}])
def test_what_the_library_does_not_run_stays_as_it_is(change: dict[str, int]) -> None:
    model = build(replace(CONFIG, **change))
    pack_halves(model)
    assert model.packed is None and len(model.blocks) == CONFIG.num_hidden_layers


@torch.inference_mode()
def test_more_than_there_is_room_for_is_refused(both: Pair) -> None:
    ours, ids = both[0], tokens(1, CHUNK + 1)
    with pytest.raises(AssertionError, match="41 tokens in memory for 40"):
        cache = memory(CONFIG, 1, CHUNK)
        ours(ids[:, :CHUNK], positions(0, CHUNK), cache)
        ours(ids[:, CHUNK:], positions(CHUNK, 1), cache)
    with pytest.raises(AssertionError, match="of one attention chunk"):
        ours(ids, positions(0, CHUNK + 1), memory(CONFIG, 1, CHUNK + 1))
