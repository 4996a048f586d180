"""Tests of the native library are run for every instruction set that this machine has."""

from collections.abc import Iterator

import pytest

from herd.kernels import native


@pytest.fixture(scope="module", params=["portable", "avx2", "avx512", "neon"])
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    library, level = native.load()
    if library is None:
        pytest.skip(level)
    if not library.herd_use_level(request.param.encode()):
        pytest.skip(f"not an instruction set of this machine: {request.param}")
    yield request.param
    library.herd_use_level(level.encode())
