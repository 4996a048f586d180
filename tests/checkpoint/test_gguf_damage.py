"""A damaged GGUF file gives one clear error, whatever the damage, and never a hang."""

import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from herd.checkpoint.gguf_config import scaling_of
from herd.checkpoint.gguf_llama import read_gguf
from herd.config import RopeScaling
from herd.errors import CheckpointError
from tests.checkpoint.tiny_llamas import tiny_llama, write_gguf


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write_gguf(tiny_llama(num_hidden_layers=1), tmp_path_factory.mktemp("gguf") / "m.gguf")


def read_all(path):
    source = read_gguf(path)
    for name, shape in source.config.shapes().items():
        assert source.tensor(name).shape == shape


any_damage = settings(max_examples=150, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])


@any_damage
@given(data=st.data())
def test_truncated(tmp_path, good, data):
    length = data.draw(st.one_of(st.integers(0, good.stat().st_size - 1), st.integers(0, 6000)))
    path = tmp_path / "cut.gguf"
    path.write_bytes(good.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"cut\.gguf"):
        read_all(path)


@any_damage
@given(data=st.data())
def test_garbled(tmp_path, good, data):
    bad = bytearray(good.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.one_of(st.integers(0, 800), st.integers(0, len(bad) - 9)))
        value = data.draw(st.sampled_from([0, 1, 255, 2**16, 2**31, 2**32 - 1, 2**63, 2**64 - 1]))
        width, form = data.draw(st.sampled_from([(1, "B"), (4, "<I"), (8, "<Q")]))
        struct.pack_into(form, bad, at, value & (2 ** (8 * width) - 1))
    path = tmp_path / "bad.gguf"
    path.write_bytes(bad)
    try:
        read_all(path)
    except CheckpointError as error:
        assert "\n" not in str(error)


def test_other_files(tmp_path):
    path = tmp_path / "empty.gguf"
    path.touch()
    with pytest.raises(CheckpointError, match=r"empty.gguf is not a readable GGUF file"):
        read_gguf(path)
    path.write_bytes(b"PK" + bytes(100))
    with pytest.raises(CheckpointError, match="does not start with 'GGUF'"):
        read_gguf(path)


def test_unknown_splitting_rule(tmp_path):
    path = write_gguf(tiny_llama(), tmp_path / "m.gguf")
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(path.read_bytes().replace(b"smollm", b"unsung"))
    with pytest.raises(CheckpointError, match="by the rule 'unsung'"):
        read_gguf(bad)


def test_llama3_factors():
    """Factors of Llama 3.1 in GGUF files: 1 for fast channel pairs, 8 for slow ones, blended between."""
    factors = [1.0] * 29 + [1.2113, 1.5486, 2.0195, 2.7041, 3.7626, 5.5479] + [8.0] * 29
    assert scaling_of(factors, 500000.0) is None  # the blend must be the rule's, not merely similar
    rule = [1.0 / _kept(i) for i in range(64)]
    assert scaling_of(rule, 500000.0) == RopeScaling(8.0, 1.0, 4.0, 8192)


def _kept(pair: int) -> float:
    turns = 8192 * 500000.0 ** (-pair / 64) / 6.283185307179586
    smooth = min(max((turns - 1) / 3, 0), 1)
    return smooth + (1 - smooth) / 8
