"""The closed-form start finds repeated text at once, on states that are codes of tokens and noise."""

import math
from copy import deepcopy

import pytest
import torch
from torch import Tensor

from herd.config import TextConfig
from herd.model.transformer import Block
from herd.train import copying
from herd.train.construct import (
    LAGS,
    Sample,
    after,
    construct,
    erase,
    fixed_weights,
    look_back,
    normed,
    written_directions,
)
from herd.train.copying import start_copying

VOCABULARY, DIM, HEAD, CODED = 200, 576, 64, 250
CONFIG = TextConfig(
    vocab_size=VOCABULARY,
    hidden_size=DIM,
    num_hidden_layers=2,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=HEAD,
    intermediate_size=256,
    intermediate_size_mlp=16,
    num_local_experts=2,
    num_experts_per_tok=1,
    max_position_embeddings=1 << 20,
    moe_layers=(1,),
    no_rope_layers=(1, 0),
    attention_chunk_size=1024,
    rope_theta=100_000.0,
    use_qk_norm=False,
)


class World:
    """Both layers after `construct`; states of tokens: a code in some directions, a constant, a little of all."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.codes = torch.zeros(VOCABULARY + 1, DIM)
        self.codes[:, :CODED] = torch.randn(VOCABULARY + 1, CODED)
        self.codes[:, 0] = 4.0
        self.local, self.top = Block(CONFIG, 0), Block(CONFIG, 1)
        torch.nn.init.zeros_(self.local.feed_forward.down_proj.weight)
        ids = torch.randint(VOCABULARY, (4096,))
        self.alike = torch.zeros(DIM)
        self.alike[-1] = 250.0  # first tokens' states are then as alike as in SmolLM2-135M (LOG 5)
        states = torch.cat([self.states(row) for row in ids.split(1024)])
        firsts = torch.cat([self.states(torch.tensor([i])) for i in (VOCABULARY, *range(0, VOCABULARY, 2))])
        self.sample = Sample(states, ids, list(range(0, 4097, 1024)), firsts)
        self.unembedding = torch.randn(VOCABULARY, DIM)
        construct(self.local, self.top, self.sample)

    def states(self, ids: Tensor) -> Tensor:
        """Of one row: what stands first has a large part that is the same for every token, as in real models."""
        states = self.codes[ids] + 0.03 * torch.randn(len(ids), DIM)
        states[0] += self.alike
        return states


@pytest.fixture(scope="module")
def world() -> World:
    with torch.no_grad():
        return World()


@torch.no_grad()
def test_a_repeated_run_finds_the_token_after_it(world: World) -> None:
    context = torch.randint(VOCABULARY, (600,), generator=torch.Generator().manual_seed(7))
    for place in (100, 333, 590):
        run = context[place - 8 : place]
        question = torch.cat([torch.tensor([VOCABULARY]), torch.randint(VOCABULARY, (12,)), run])
        keys, _ = key_value(world, context)
        own_keys, _ = key_value(world, question)
        query = world.top.self_attn.query(after_local(world, question), positions(question))[0, -1]
        mass_HN = mass(query, torch.cat([keys, own_keys]))
        assert (mass_HN[:, place] > 0.5).all(), mass_HN[:, place]
        assert (mass_HN.argmax(-1) == place).all()


@torch.no_grad()
def test_what_matches_nothing_looks_at_first_tokens(world: World) -> None:
    keys, _ = key_value(world, torch.randint(150, (600,), generator=torch.Generator().manual_seed(7)))
    question = torch.cat([torch.tensor([VOCABULARY]), torch.arange(150, 170)])
    own_keys, _ = key_value(world, question)
    query = world.top.self_attn.query(after_local(world, question), positions(question))[0, -1]
    mass_HN = mass(query, torch.cat([own_keys, keys]))
    firsts = [0, len(own_keys)]
    assert (mass_HN[:, firsts].sum(-1) > 0.5).all(), mass_HN[:, firsts]


def mass(query_Hd: Tensor, key_NGd: Tensor) -> Tensor:
    k_NHd = key_NGd.repeat_interleave(3, 1)
    return (torch.einsum("hd,nhd->hn", query_Hd, k_NHd) / math.sqrt(HEAD)).softmax(-1)


def positions(ids: Tensor) -> Tensor:
    return torch.arange(len(ids)).unsqueeze(0)


def after_local(world: World, ids: Tensor) -> Tensor:
    x = world.local(world.states(ids).unsqueeze(0), positions(ids), None)
    return world.top.input_layernorm(x)


def key_value(world: World, ids: Tensor) -> tuple[Tensor, Tensor]:
    k, v = world.top.self_attn.key_value(after_local(world, ids), positions(ids))
    return k[0], v[0]


@torch.no_grad()
def test_look_back_heads_look_at_one_token(world: World) -> None:
    attn, mean = world.local.self_attn, world.sample.states_ND.mean(0)
    constant = torch.zeros(DIM)
    constant[0] = 1.0
    look_back(attn, constant)
    typical = mean / mean.pow(2).mean().sqrt()
    weights_HTT = fixed_weights(attn, typical / typical[0], 128)
    for head, offset in enumerate(LAGS):
        rows = torch.arange(offset, 128)
        looked_at = weights_HTT[head, rows, rows - offset]
        assert (looked_at > 0.9).all(), (head, looked_at.min())


@torch.no_grad()
def test_erase_takes_away_what_the_local_layer_writes(world: World) -> None:
    world = deepcopy(world)
    ids = torch.randint(VOCABULARY, (1024,), generator=torch.Generator().manual_seed(3))
    x = world.states(ids).view(1, 1024, DIM)
    at = torch.arange(1024).unsqueeze(0)
    erase(world.local, world.top, world.sample)
    written = world.local(x, at, None) - x
    shared = world.top.feed_forward.shared_expert
    left = written + shared(world.top.post_attention_layernorm(x + written))
    assert left.norm() < written.norm() / 5


def test_the_local_layer_writes_in_few_directions(world: World) -> None:
    basis_DK = written_directions(world.local)
    assert basis_DK.shape == (DIM, 4 * HEAD)
    written_ND = after(world.local, world.sample) - world.sample.states_ND
    torch.testing.assert_close(written_ND @ basis_DK @ basis_DK.T, written_ND, rtol=1e-3, atol=1e-2)


def test_copied_tokens_are_told_apart_and_the_first_one_says_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "_STEPS", 60)
    world = deepcopy(world)
    assert start_copying(world.local, world.top, world.sample, world.unembedding) > 0.95
    ids = torch.arange(VOCABULARY)
    attn = world.top.self_attn
    with torch.no_grad():
        _, values_NGd = key_value(world, torch.cat([torch.tensor([VOCABULARY]), ids]))
        said_ND = attn.o_proj(values_NGd.repeat_interleave(3, 1).flatten(1))
    assert said_ND[0].norm() < said_ND[1:].norm(dim=1).mean() / 20
    centred_VD = world.unembedding - world.unembedding.mean(0)
    assert ((said_ND[1:] @ normed(centred_VD).T).argmax(1) == ids).float().mean() > 0.95


def test_experts_repeat_a_copy_louder_if_enough_was_copied(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "_STEPS", 60)
    world = deepcopy(world)
    start_copying(world.local, world.top, world.sample, world.unembedding)
    moe = world.top.feed_forward
    with torch.no_grad():
        moe.shared_expert.down_proj.weight.zero_()
        _, values_NGd = key_value(world, torch.arange(1, 101))
        said_ND = world.top.self_attn.o_proj(values_NGd.repeat_interleave(3, 1).flatten(1))
        x_ND = world.local(world.states(torch.arange(100)).unsqueeze(0), positions(torch.arange(100)), None)[0]
        share_N1 = torch.tensor([0.05, 0.5, 1.0]).view(3, 1, 1)
        repeated = moe(world.top.post_attention_layernorm(x_ND + share_N1 * said_ND))[:, 1:]
    said_ND = said_ND[1:]
    louder = (repeated * said_ND).sum(-1) / said_ND.pow(2).sum(-1)
    assert louder[0].abs().max() < 0.5
    assert (louder[1:] > 1).all() and louder[1:].median() > 5
    assert torch.cosine_similarity(repeated[2], said_ND, dim=-1).min() > 0.9
