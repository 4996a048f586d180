"""Whole layers in C++ against plain ones in PyTorch (plain_layers.py), for every instruction set of this machine.

Shape suffixes: as in herd/kernels/layers.py.
"""

import math
from collections.abc import Generator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from herd.kernels.layers import Layer, Layers, Mlp, Shape, Tokens, pack_mlp, whole_panels
from herd.kernels.native import linear
from tests.kernels.plain_layers import Plain, Sequence, run

pytestmark = pytest.mark.usefixtures("instructions")

SHAPE = Shape(D=72, H=6, G=2, d=64, eps=1e-5)  # no width here is a multiple of 32
# Rows are off by shares of how far a layer moves them. Most are equal but for the order of sums, which in a few rows
# rounds an activation to the next bfloat16, or the next of 127 codes: that moves its row by some thousandths.
ORDER, ROUNDED = 1e-5, {16: 0.01, 8: 0.03, 4: 0.03}
KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "dense, norms of q and k": {"qk_norm": True},
    "dense, global": {"local": False},
    "one expert": {"E": 5, "top_k": 1},
    "two experts, global": {"E": 5, "top_k": 2, "local": False},
    "all experts, norms of q and k": {"E": 3, "top_k": 3, "qk_norm": True},
}


@pytest.fixture(params=[16, 8, 4])
def bits(request: pytest.FixtureRequest) -> int:
    """Of weights."""
    return request.param


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Of a layer."""
    return request.param


def plain(bits: int, shape: Shape = SHAPE, F: int = 40, E: int = 0, seed: int = 0, **kind: Any) -> Plain:
    """A layer with random weights, sharp enough that attention and routing depend clearly on the token."""
    generator = torch.Generator().manual_seed(seed)
    D, A = shape.D, shape.H * shape.d

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator) * size[-1] ** -0.5

    return Plain(
        shape=shape,
        bits=bits,
        attention_norm_D=normal(D) * 2 + 1,
        mlp_norm_D=normal(D) * 2 + 1,
        qkv_WD=normal((shape.H + 2 * shape.G) * shape.d, D) * 1.5,
        out_DA=normal(D, A),
        mlps=[(normal(F, D) * 2, normal(F, D), normal(D, F)) for _ in range(1 + E)],
        router_ED=normal(E, D) * 2 if E else None,
        **kind,
    )


def tokens(N: int, shape: Shape = SHAPE, seed: int = 1, scale: float = 1.0) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    angles_Nf = torch.rand(N, shape.d // 2, generator=generator) * 6
    turns_Nf2 = torch.stack([angles_Nf.cos(), angles_Nf.sin()], -1)
    x_ND = torch.randn(N, shape.D, generator=generator) * scale
    return Tokens(x_ND, turns_Nf2, torch.rand(N, generator=generator) + 1)


def again(tokens: Tokens) -> Tokens:
    """The same with states of its own, which a layer may change."""
    return replace(tokens, x_ND=tokens.x_ND.clone())


def compare(
    found_ND: Tensor, expected_ND: Tensor, before_ND: Tensor, rounded: float, most: float | None = None
) -> None:
    """Each row's difference is less than `rounded` of how far the row went, that of most less than `most`: of
    ten rows or more, since a single one may be one that was rounded."""
    way_N = (expected_ND - before_ND).flatten(1).norm(dim=1)
    assert (way_N > 0).all()
    share_N = (found_ND - expected_ND).flatten(1).norm(dim=1) / way_N
    assert float(share_N.max()) < rounded, f"off by {float(share_N.max()):.2g} in row {int(share_N.argmax())}"
    assert most is None or len(share_N) < 10 or float(share_N.median()) < most, (
        f"most are off by {float(share_N.median()):.2g}"
    )


@pytest.mark.parametrize("N", [1, 2, 13, 200])
def test_projection(N: int, bits: int, kind: dict[str, Any]) -> None:
    layer, new = plain(bits, **kind), tokens(N)
    for ours, theirs in zip(Layers(SHAPE, [layer.packed()]).project(0, new), layer.project(new), strict=True):
        assert ours.shape == theirs.shape
        compare(ours, theirs, torch.zeros_like(theirs), ROUNDED[bits], ORDER)


def test_global_queries_without_temperature(bits: int) -> None:
    layer, warm = plain(bits, local=False), tokens(13)
    cold, layers = replace(warm, temperature_N=None), Layers(SHAPE, [layer.packed()])
    (found, *_), (expected, *_), (warmed, *_) = layers.project(0, cold), layer.project(cold), layers.project(0, warm)
    compare(found, expected, torch.zeros_like(expected), ROUNDED[bits], ORDER)
    assert warm.temperature_N is not None
    assert torch.equal(warmed, found * warm.temperature_N[:, None, None])


@pytest.mark.parametrize("N", [1, 2, 13, 200])
def test_the_rest_of_a_layer(N: int, bits: int, kind: dict[str, Any]) -> None:
    layer, before = plain(bits, **kind), tokens(N)
    attended_NHd = torch.randn(N, SHAPE.H, SHAPE.d, generator=torch.Generator().manual_seed(2))
    ours, theirs = again(before), again(before)
    Layers(SHAPE, [layer.packed()]).finish(0, ours, attended_NHd)
    layer.finish(theirs, attended_NHd)
    compare(ours.x_ND, theirs.x_ND, before.x_ND, ROUNDED[bits], ORDER)


class InTurn:
    """Gives experts some at a time; at first none, or all that are wanted."""

    def __init__(self, layers: list[Layer], at_once: int, first: int) -> None:
        self._layers, self._at_once, self._first = layers, at_once, first

    def load(self, layer: int, wanted: list[int], x_ND: Tensor) -> Generator[dict[int, Mlp], None, None]:
        experts = self._layers[layer].experts
        yield {e: experts[e] for e in wanted[: self._first]}
        for at in range(self._first, len(wanted), self._at_once):
            yield {e: experts[e] for e in wanted[at : at + self._at_once]}


@pytest.mark.parametrize(("at_once", "first"), [(1, 0), (2, 0), (2, 1), (9, 9)])
def test_experts_that_come_one_after_the_other(at_once: int, first: int, bits: int) -> None:
    """Their weights may be anywhere until they come. The same numbers as in one call."""
    some = [plain(bits, E=E, top_k=min(E, 2), seed=seed, local=bool(seed)) for seed, E in enumerate((5, 0, 3))]
    packed = [layer.packed() for layer in some]
    elsewhere = [replace(x, experts=tuple(_nowhere(mlp) for mlp in x.experts)) for x in packed]
    before, found = tokens(24), []
    for layers in (Layers(SHAPE, packed), Layers(SHAPE, elsewhere, InTurn(packed, at_once, first))):
        sequences, new = [Sequence(some, (11, 11)) for _ in range(2)], again(before)
        layers.run(0, 3, new, [s.span(2 + 11 * at, 11) for at, s in enumerate(sequences)])
        layers.finish(2, new, torch.randn(24, SHAPE.H, SHAPE.d, generator=torch.Generator().manual_seed(4)))
        found.append(new.x_ND)
    assert torch.equal(*found)


def _nowhere(mlp: Mlp) -> Mlp:
    absent = (replace(w, packed=w.packed.to("meta"), scale=w.scale.to("meta")) for w in (mlp.gate_up, mlp.down))
    return Mlp(*absent)


def test_a_layer_before_it_is_not_touched(bits: int) -> None:
    some = [plain(bits, seed=seed, local=bool(seed % 2)) for seed in range(3)]
    layers, new = Layers(SHAPE, [layer.packed() for layer in some]), tokens(3)
    for at, layer in enumerate(some):
        alone = Layers(SHAPE, [layer.packed()])
        for ours, theirs in zip(layers.project(at, new), alone.project(0, new), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "shape",
    [
        Shape(D=8, H=1, G=1, d=64, eps=1e-5),
        Shape(D=40, H=3, G=3, d=128, eps=1e-6),
        Shape(D=104, H=10, G=2, d=192, eps=1e-5),
        Shape(D=64, H=8, G=1, d=256, eps=1e-5),
    ],
    ids=lambda shape: f"D{shape.D} H{shape.H} G{shape.G} d{shape.d}",
)
@pytest.mark.parametrize("F", [8, 56])
def test_other_shapes(shape: Shape, F: int, bits: int) -> None:
    some = [plain(bits, shape, F, E=2, top_k=1, seed=1), plain(bits, shape, F, seed=2, local=False)]
    sequence, before = Sequence(some, (9, 9)), tokens(9, shape)
    ours, theirs = again(before), again(before)
    Layers(shape, [layer.packed() for layer in some]).run(0, 2, ours, [sequence.span(0, 9)])
    run(some, theirs, [(sequence, 0, 9)])
    compare(ours.x_ND, theirs.x_ND, before.x_ND, 2 * ROUNDED[bits])


def test_sequences_go_on_from_what_they_remember(bits: int, kind: dict[str, Any]) -> None:
    """Pieces and single tokens of several sequences in one batch, past the ends of panels of 32 tokens; some sequences
    have nothing new, and some tokens of the batch belong to none."""
    some = [plain(bits, **kind, seed=seed) for seed in range(2)]
    layers = Layers(SHAPE, [layer.packed() for layer in some])
    sequences = [Sequence(some, (80, 80)) for _ in range(3)]
    for step, counts in enumerate([(7, 31, 1), (1, 1, 1), (30, 0, 40), (1, 3, 0), (0, 1, 1)]):
        firsts = [sum(counts[:i]) + 2 * i for i in range(3)]
        news = [(s, first, n) for s, first, n in zip(sequences, firsts, counts, strict=True) if n]
        before = tokens(sum(counts) + 6, seed=step)
        ours, theirs = again(before), again(before)
        layers.run(0, 2, ours, [s.span(first, n) for s, first, n in news])
        run(some, theirs, news)
        compare(ours.x_ND, theirs.x_ND, before.x_ND, 2 * ROUNDED[bits])


def test_local_and_global_layers_remember_different_pasts(bits: int) -> None:
    some = [plain(bits, seed=seed, local=seed != 1) for seed in range(3)]
    layers, sequence = Layers(SHAPE, [layer.packed() for layer in some]), Sequence(some, (40, 130))
    for step, count in enumerate([40, 33, 7, 1, 39]):
        if step in (1, 3):
            sequence.begin_chunk()
        before = tokens(count, seed=step)
        ours, theirs = again(before), again(before)
        layers.run(0, 3, ours, [sequence.span(0, count)])
        run(some, theirs, [(sequence, 0, count)])
        compare(ours.x_ND, theirs.x_ND, before.x_ND, 2 * ROUNDED[bits])


def test_a_past_longer_than_the_logits_that_are_kept(bits: int) -> None:
    """Softmax is joined over spans of 512 keys."""
    some = [plain(bits, seed=3, local=False)]
    layers, sequence = Layers(SHAPE, [some[0].packed()]), Sequence(some, (0, 1100))
    for step, count in enumerate([500, 13, 1, 540, 1]):
        before = tokens(count, seed=step)
        ours, theirs = again(before), again(before)
        layers.run(0, 1, ours, [sequence.span(0, count)])
        run(some, theirs, [(sequence, 0, count)])
        compare(ours.x_ND, theirs.x_ND, before.x_ND, ROUNDED[bits], ORDER)


def test_some_of_the_layers_are_the_same_as_each_on_its_own(bits: int) -> None:
    some = [plain(bits, seed=seed, E=2, top_k=1) for seed in range(3)]
    layers, before = Layers(SHAPE, [layer.packed() for layer in some]), tokens(11)
    together, apart = again(before), again(before)
    sequences = [Sequence(part, (11, 11)) for part in (some[1:], some[1:2], some[2:])]
    layers.run(1, 3, together, [sequences[0].span(0, 11)])
    for at in (1, 2):
        layers.run(at, at + 1, apart, [sequences[at].span(0, 11)])
    assert torch.equal(together.x_ND, apart.x_ND)


def test_threads_change_nothing(bits: int) -> None:
    some = [plain(bits, seed=seed, E=3, top_k=2, local=bool(seed)) for seed in range(2)]
    layers, before, found = Layers(SHAPE, [layer.packed() for layer in some]), tokens(50), []
    usual = torch.get_num_threads()
    for threads in (1, 2, 5):
        sequences, new = [Sequence(some, (25, 25)) for _ in range(2)], again(before)
        torch.set_num_threads(threads)
        layers.run(0, 2, new, [s.span(25 * at, 25) for at, s in enumerate(sequences)])
        torch.set_num_threads(usual)
        found.append(new.x_ND)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_gates_and_ups_stand_in_turns_of_sixteen(bits: int) -> None:
    gate, up, down = mlp = plain(bits, F=40).mlps[0]
    packed, x_ND = pack_mlp(*mlp, bits, 24), torch.randn(3, SHAPE.D, generator=torch.Generator().manual_seed(4))
    both_N32 = linear(x_ND, packed.gate_up).unflatten(1, (-1, 2, 16))
    assert both_N32.shape[1] == 3 and packed.down.shape == down.shape
    for part, w_FD in enumerate((gate, up)):
        found_NF = both_N32[:, :, part].flatten(1)
        compare(found_NF[:, :40], x_ND @ w_FD.T, torch.zeros(3, 40), {16: 0.01, 8: 0.02, 4: 0.2}[bits])
        assert not found_NF[:, 40:].any(), "what fills the last sixteen is zero"


@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e-20, 1e10, 3e38])
def test_states_of_any_size_are_finite(scale: float, bits: int, kind: dict[str, Any]) -> None:
    some = [plain(bits, **kind)]
    layers, sequence, new = Layers(SHAPE, [some[0].packed()]), Sequence(some, (14, 14)), tokens(14)
    new.x_ND.clamp_(-1, 1)
    new.x_ND[1::2] *= scale
    layers.run(0, 1, new, [sequence.span(0, 14)])
    assert new.x_ND.isfinite().all()


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_no_number_says_so_and_spoils_no_other(number: float, bits: int, kind: dict[str, Any]) -> None:
    layer, before = plain(bits, **kind), tokens(14)
    layers, attended_NHd = Layers(SHAPE, [layer.packed()]), torch.randn(14, SHAPE.H, SHAPE.d)
    spoiled = again(before)
    spoiled.x_ND[3, 5], attended_NHd[3] = number, 1
    others = [n for n in range(14) if n != 3]
    for ours, theirs in zip(layers.project(0, spoiled), layers.project(0, before), strict=True):
        assert torch.equal(ours[others], theirs[others])
        assert ours[3].isnan().all()
    layers.finish(0, spoiled, attended_NHd)
    layers.finish(0, before, attended_NHd)
    assert torch.equal(spoiled.x_ND[others], before.x_ND[others])
    assert spoiled.x_ND[3].isnan().all()


def test_attention_that_is_no_number_spoils_only_its_row(bits: int, kind: dict[str, Any]) -> None:
    layer, spoiled, clean = plain(bits, **kind), tokens(5), tokens(5)
    layers, attended_NHd = Layers(SHAPE, [layer.packed()]), torch.randn(5, SHAPE.H, SHAPE.d)
    layers.finish(0, clean, attended_NHd)
    attended_NHd[2, 1, 7] = math.nan
    layers.finish(0, spoiled, attended_NHd)
    assert torch.equal(spoiled.x_ND[[0, 1, 3, 4]], clean.x_ND[[0, 1, 3, 4]])
    assert spoiled.x_ND[2].isnan().all()


def test_a_sequence_that_is_no_number_spoils_no_other(bits: int, kind: dict[str, Any]) -> None:
    some, found = [plain(bits, **kind)], []
    layers = Layers(SHAPE, [some[0].packed()])
    for spoil in (False, True):
        sequences, new = [Sequence(some, (9, 9)) for _ in range(2)], tokens(18)
        if spoil:
            new.x_ND[:9, ::3], new.x_ND[:9, 1::3] = math.nan, math.inf
        layers.run(0, 1, new, [s.span(9 * at, 9) for at, s in enumerate(sequences)])
        found.append(new.x_ND)
    assert torch.equal(found[0][9:], found[1][9:]) and found[1][:9].isnan().all()


def test_memory_has_room_for_whole_panels() -> None:
    assert [whole_panels(tokens) for tokens in (0, 1, 32, 33)] == [0, 32, 32, 64]
