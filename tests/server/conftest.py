"""Servers of tiny models."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import herd
from tests.server.served import Served, serving


@pytest.fixture(scope="session")
def model(tiny_model: Path) -> herd.Model:
    return herd.load(tiny_model)


@pytest.fixture(scope="session")
def served(model: herd.Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One without keys, for all tests."""
    with serving(model, tmp_path_factory.mktemp("served"), max_body=1 << 20, max_upload=4 << 20) as it:
        yield it
