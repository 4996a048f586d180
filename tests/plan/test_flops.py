"""FLOPs by formula against what PyTorch counts while the model runs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from herd.config import MAVERICK, SCOUT, VISION, TextConfig
from herd.model import Transformer
from herd.plan.flops import flops_of_prompt, flops_of_reading, flops_per_tile, flops_per_token
from tests.model.tiny_models import memory, tiny

MODELS = {
    "experts": tiny(),
    "dense-and-two-experts": tiny(interleave_moe_layer_step=2, num_experts_per_tok=2),
    "no-chunks": tiny(attention_chunk_size=None),
}


@pytest.mark.parametrize("cfg", MODELS.values(), ids=MODELS)
@torch.inference_mode()
def test_a_token_costs_what_torch_counts(cfg: TextConfig) -> None:
    context = 2 * (cfg.attention_chunk_size or 4)
    # PyTorch does not count its grouped products of experts, which it has for up to 32 bits.
    model, cache = Transformer(cfg).eval().double(), memory(cfg, rows=1, dtype=torch.float64)
    at = torch.arange(context).unsqueeze(0)
    model(torch.zeros(1, context - 1, dtype=torch.long), at[:, :-1], cache)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 1, dtype=torch.long), at[:, -1:], cache)
    assert counter.get_total_flops() == flops_per_token(cfg, context).total


@pytest.mark.parametrize("cfg", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("tokens", [1, 3, 4, 13])
def test_a_prompt_costs_what_its_tokens_cost(cfg: TextConfig, tokens: int) -> None:
    chunk = cfg.attention_chunk_size or tokens
    pairs = 4 * cfg.num_attention_heads * cfg.head_dim
    local = sum(cfg.is_local(i) for i in range(cfg.num_hidden_layers))
    expected = 0
    for p in range(tokens):
        one = flops_per_token(cfg, p + 1, head=p == tokens - 1)
        # A chunk begins anew in local layers, where `flops_per_token` counts a whole one.
        expected += one.total - local * pairs * (min(p + 1, chunk) - (p % chunk + 1))
    assert flops_of_prompt(cfg, tokens).total == expected


@pytest.mark.parametrize("interval", [4, 2])
@torch.inference_mode()
def test_reading_costs_what_torch_counts(interval: int) -> None:
    cfg = tiny(nope_layer_interval=interval, num_hidden_layers=7)
    model, cache = Transformer(cfg).eval().double(), memory(cfg, rows=1, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        model.read(torch.zeros(1, 8, dtype=torch.long), cache=cache)
    # It multiplies each query with all keys of its block, of which half are not yet to be seen.
    layers = cfg.global_layers[-1]
    hidden = layers * 4 * cfg.num_attention_heads * cfg.head_dim * 8 * 7 // 2
    assert counter.get_total_flops() == flops_of_reading(cfg, 8).total + hidden


def test_reading_with_one_global_layer_is_linear() -> None:
    cfg = tiny(num_hidden_layers=7)
    assert flops_of_reading(cfg, 100 * 8).total == 100 * flops_of_reading(cfg, 8).total
    several = tiny(num_hidden_layers=8)
    assert flops_of_reading(several, 100 * 8).total > 100 * flops_of_reading(several, 8).total


def test_products_with_weights_cost_two_a_parameter() -> None:
    for cfg in (SCOUT, MAVERICK):
        norms = cfg.hidden_size * (2 * cfg.num_hidden_layers + 1)
        embedding = cfg.vocab_size * cfg.hidden_size
        flops = flops_per_token(cfg, 1)
        assert flops.total - flops.attention == 2 * (cfg.num_parameters(active=True) - norms - embedding)


def test_a_tile_costs_two_a_weight_and_token() -> None:
    D, S, hidden = VISION.hidden_size, 577, SCOUT.hidden_size
    blocks = 34 * (2 * S * (4 * D * D + 2 * D * 5632) + 4 * S * S * D)
    rest = 576 * 588 * D + 144 * (4 * D * 4096 + 4096 * 4096 + 4096 * hidden)
    assert flops_per_tile(VISION, hidden) == blocks + 2 * rest
