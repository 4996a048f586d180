"""The closed-form start finds repeated text at once, on states that are codes of tokens and noise."""

import math

import pytest
import torch
from torch import Tensor

from herd.config import TextConfig
from herd.model.transformer import Block
from herd.train.construct import SHARP, construct, erase, look_back
from herd.train.grown import _fixed_weights

VOCABULARY, DIM, HEAD, CODED = 200, 320, 64, 100
CONFIG = TextConfig(
    vocab_size=VOCABULARY,
    hidden_size=DIM,
    num_hidden_layers=2,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=HEAD,
    intermediate_size=200,
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
        self.ids = torch.randint(VOCABULARY, (4096,))
        self.sample = self.states(self.ids)
        unembedding, first = torch.randn(VOCABULARY, DIM), self.states(torch.tensor([VOCABULARY]))[0]
        construct(self.local, self.top, self.sample, self.ids, unembedding, first)

    def states(self, ids: Tensor) -> Tensor:
        return self.codes[ids] + 0.03 * torch.randn(len(ids), DIM)


@pytest.fixture(scope="module")
def world() -> World:
    with torch.no_grad():
        return World()


@torch.no_grad()
def test_a_repeated_run_finds_the_token_after_it(world: World) -> None:
    context = torch.randint(VOCABULARY, (600,), generator=torch.Generator().manual_seed(7))
    for after in (100, 333, 590):
        run = context[after - 7 : after]
        question = torch.cat([torch.tensor([VOCABULARY]), torch.randint(VOCABULARY, (12,)), run])
        keys, _ = key_value(world, context)
        own_keys, _ = key_value(world, question)
        query = world.top.self_attn.query(after_local(world, question), positions(question))[0, -1]
        k = torch.cat([keys, own_keys]).repeat_interleave(3, 1)
        mass_HN = (torch.einsum("hd,nhd->hn", query, k) / math.sqrt(HEAD)).softmax(-1)
        assert (mass_HN[:6, after] > 0.5).all(), mass_HN[:, after]  # the two groups that match runs
        assert (mass_HN[:6].argmax(-1) == after).all()


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
    attn, mean = world.local.self_attn, world.sample.mean(0)
    constant = torch.zeros(DIM)
    constant[0] = 1.0
    look_back(attn, constant)
    typical = mean / mean.pow(2).mean().sqrt()
    weights_HTT = _fixed_weights(attn, typical / typical[0], 128)
    for head, offset in enumerate(SHARP):
        rows = torch.arange(offset, 128)
        looked_at = weights_HTT[head, rows, rows - offset]
        assert (looked_at > 0.9).all(), (head, looked_at.min())


@torch.no_grad()
def test_erase_takes_away_what_the_local_layer_writes() -> None:
    world = World()
    ids = torch.randint(VOCABULARY, (1024,), generator=torch.Generator().manual_seed(3))
    x = world.states(ids).view(1, 1024, DIM)
    at = torch.arange(1024).unsqueeze(0)
    erase(world.local, world.top, world.sample[:2048])
    written = world.local.self_attn(world.local.input_layernorm(x), at, None)
    shared = world.top.feed_forward.shared_expert
    left = written + shared(world.top.post_attention_layernorm(x + written))
    assert left.norm() < written.norm() / 5
