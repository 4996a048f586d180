"""Angles and temperature against the numbers of spec §13, and positions reduced modulo the chunk."""

import pytest
import torch

from herd.config import MAVERICK, SCOUT, RopeScaling
from herd.model.rope import inverse_frequencies, rope_angles, temperature
from tests.model.tiny_models import tiny


def test_unscaled_frequencies() -> None:
    expected = {
        0: 1.0,
        1: 0.8146172338565447,
        34: 9.384738703573802e-4,
        35: 7.644969883171747e-4,
        63: 2.455140791131609e-6,
    }
    inv_freq = inverse_frequencies(MAVERICK)
    assert (inv_freq.shape, inv_freq.dtype) == ((64,), torch.float32)
    for i, value in expected.items():
        assert inv_freq[i].item() == pytest.approx(value, rel=1e-7)


def test_scouts_frequencies_have_a_hard_threshold() -> None:
    plain, scaled = inverse_frequencies(MAVERICK), inverse_frequencies(SCOUT)
    assert torch.equal(scaled[:35], plain[:35])
    torch.testing.assert_close(scaled[35:], plain[35:] / 16)
    assert scaled[35].item() == pytest.approx(4.778106176982342e-5, rel=1e-7)
    assert scaled[63].item() == pytest.approx(1.534462994457256e-7, rel=1e-7)


def test_the_first_scouts_frequencies_are_blended_in_between() -> None:
    plain = inverse_frequencies(MAVERICK)
    cfg = tiny(head_dim=128, rope_theta=500000.0, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192))
    ratio = inverse_frequencies(cfg) / plain
    assert (ratio[:29] == 1).all()
    assert ((ratio[29:35] > 1 / 8) & (ratio[29:35] < 1)).all()
    assert (ratio[29:35].diff() < 0).all()
    torch.testing.assert_close(ratio[35:], torch.full((29,), 1 / 8))


def test_temperature_table() -> None:
    table = {
        0: 1.0,
        8190: 1.0,
        8191: 1.06931,
        16383: 1.10986,
        32767: 1.16094,
        65535: 1.21972,
        131071: 1.28332,
        262143: 1.34965,
        1048575: 1.48598,
        10485759: 1.71554,
    }
    factor = temperature(torch.tensor([list(table)]), SCOUT)
    assert factor.dtype == torch.float32
    torch.testing.assert_close(factor, torch.tensor([list(table.values())]), rtol=0, atol=6e-6)
    assert temperature(torch.tensor([-1]), SCOUT).item() == 1, "padding"


def test_angles_use_positions_modulo_the_chunk() -> None:
    inv_freq = inverse_frequencies(SCOUT)
    near = torch.arange(8192)[None]
    far = near + 8192 * 1279  # up to 10,485,759
    assert torch.equal(rope_angles(far, inv_freq, 8192), rope_angles(near, inv_freq, 8192))
    exact = (near.double().unsqueeze(-1) * inv_freq.double()).float()
    assert (rope_angles(near, inv_freq, 8192) - exact).abs().max() < 1e-3, "float32 of angles up to 8191 radians"
    # Without a chunk the position itself counts.
    assert (rope_angles(far, inv_freq, None)[..., 0] == far).all()


def test_angles_keep_rows_apart() -> None:
    inv_freq = torch.tensor([1.0, 0.5])
    angles = rope_angles(torch.tensor([[0, 9], [3, 4]]), inv_freq, 8)
    assert angles.tolist() == [[[0, 0], [1, 0.5]], [[3, 1.5], [4, 2]]]
