"""Logits equal those of Meta's reference code, for everything it can express (see meta_reference)."""

from typing import Any

import pytest
import torch

from herd.config import MAVERICK, SCOUT, RopeScaling, TextConfig
from herd.model import Transformer
from herd.model.rope import inverse_frequencies, temperature
from tests.model.meta_reference import Reference, load
from tests.model.tiny_models import CHUNK, LENGTHS, build, memory, tiny, tokens

# Scaling is fixed to wavelengths around 8192; with these thetas one of our four pairs lies beyond it (λ = 12,600) or
# in the blended band of 8/1/4 (λ = 4,900), which moves an angle by up to a tenth within the longest text.
BEYOND, BLENDED = 25_000.0, 7_000.0
SWITCHES: dict[str, dict[str, Any]] = {
    "scout-like": {"rope_scaling": RopeScaling(16.0, 1.0, 1.0, 8192), "rope_theta": BEYOND},
    "first scout's rope scaling": {"rope_scaling": RopeScaling(8.0, 1.0, 4.0, 8192), "rope_theta": BLENDED},
    "maverick-like": {"interleave_moe_layer_step": 2, "use_qk_norm": False},
    "llama-guard-4-like": {"attention_chunk_size": None, "nope_layer_interval": None, "num_local_experts": 0},
    "no qk norm": {"use_qk_norm": False},
    "no temperature": {"attn_temperature_tuning": False},
    "temperature at every token": {"floor_scale": 1},
    "all layers local": {"nope_layer_interval": None},
    "every second layer global": {"nope_layer_interval": 2},
    "all layers global": {"nope_layer_interval": 1},
    "MoE in every third layer": {"interleave_moe_layer_step": 3},
    "null chunk": {"attention_chunk_size": None},
    "chunk 3": {"attention_chunk_size": 3},
    "top-2": {"num_experts_per_tok": 2},
    "all experts": {"num_experts_per_tok": 4},
    "one kv head": {"num_key_value_heads": 1},
    "as many kv heads as query heads": {"num_key_value_heads": 4},
    "large eps": {"rms_norm_eps": 0.1},
}


def pair(cfg: TextConfig, max_length: int = 64) -> tuple[Transformer, Reference]:
    model = build(cfg)
    return model, Reference(cfg, model.state_dict(), max_length)


@pytest.mark.parametrize("switch", SWITCHES)
@torch.inference_mode()
def test_logits_equal_meta(switch: str) -> None:
    model, theirs = pair(tiny(**SWITCHES[switch]))
    for length in LENGTHS:
        ids = tokens(2, length)
        expected = theirs(ids)
        assert expected.std() > 0.5, "logits are large enough for a difference to show"
        for cache in (None, memory(model.config)):
            assert (model(ids, cache=cache) - expected).abs().max() <= 1e-4


@torch.inference_mode()
def test_scaled_rope_counts() -> None:
    """At these wavelengths a long text tells scaled from unscaled rope, so the comparison above means something."""
    ids = tokens(1, 300)
    for scaling, theta in ((RopeScaling(16.0, 1.0, 1.0, 8192), BEYOND), (RopeScaling(8.0, 1.0, 4.0, 8192), BLENDED)):
        cfg = tiny(rope_theta=theta, attention_chunk_size=512, rope_scaling=scaling)
        model, theirs = pair(cfg, 300)
        unscaled = Transformer(tiny(rope_theta=theta, attention_chunk_size=512)).eval()
        unscaled.load_state_dict(model.state_dict())
        expected = theirs(ids)
        assert (model(ids) - expected).abs().max() <= 1e-4
        assert (unscaled(ids) - expected).abs().max() > 1e-2


@torch.inference_mode()
def test_steps_equal_meta_within_one_chunk() -> None:
    """Meta's cache is right for single tokens as long as everything fits one chunk."""
    model, theirs = pair(tiny())
    ids = tokens(2, CHUNK)
    cache = memory(model.config)
    for start, stop in [(0, 3), *((i, i + 1) for i in range(3, CHUNK))]:
        expected = theirs(ids[:, start:stop], start)
        positions = torch.arange(start, stop).expand(2, -1)
        assert (model(ids[:, start:stop], positions, cache) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("cfg", [SCOUT, MAVERICK], ids=["scout", "maverick"])
def test_frequencies_and_temperature_equal_meta_at_full_size(cfg: TextConfig) -> None:
    scaling = cfg.rope_scaling or RopeScaling(1.0, 1.0, 1.0, 8192)
    theirs = load().precompute_freqs_cis(
        cfg.head_dim, 2, cfg.rope_theta, cfg.rope_scaling is not None, scaling.factor, scaling.high_freq_factor
    )
    # Angles of position 1 are the frequencies themselves.
    torch.testing.assert_close(inverse_frequencies(cfg), theirs[1].angle(), rtol=2e-6, atol=0)
    positions = torch.tensor([0, 8190, 8191, 16383, 10**6])
    # The formula of Meta's attention, in double precision.
    expected = 1 + 0.1 * torch.log(torch.floor((positions.double() + 1) / 8192) + 1)
    torch.testing.assert_close(temperature(positions, cfg), expected.float())
