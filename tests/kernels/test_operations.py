"""What `herd info` says of the operations is what they are."""

import inspect

import pytest
import torch

from herd import kernels
from herd.formats import Format
from herd.kernels import native, reference


def by(start: str) -> set[str]:
    """Operations that are done by what begins so."""
    return {name for name, how in kernels.operations().items() if how.startswith(start)}


def test_all_operations_are_listed() -> None:
    offered = {name for name in kernels.__all__ if inspect.isfunction(getattr(reference, name, None))}
    assert set(kernels.operations()) == offered | {"layers"}
    assert {"attend_parts", "linear", "rms_norm"} < offered


def test_what_is_called_native_has_a_native_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_choice", lambda: kernels._Choice(True, "some"))
    two = {name for name in kernels.operations() if hasattr(native, name) and hasattr(reference, name)}
    assert by("native (some)") == two | {"layers"}
    assert by("reference (no native version)") == set(kernels.operations()) - two - {"layers"}


def test_what_is_called_reference_is_what_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERD_KERNELS", "reference")
    assert not by("native")
    assert {"layers", "linear"} < by("reference (HERD_KERNELS)")
    assert not kernels.runs_layers(torch.empty(0), 64)
    assert isinstance(kernels.pack(torch.randn(4, 8), Format("int8", 8)), reference.PlainWeight)
    assert all(getattr(kernels, name) is getattr(reference, name) for name in by("reference (no native version)"))


def test_layers_are_called_native_where_they_are_run() -> None:
    assert ("layers" in by("native")) == kernels.runs_layers(torch.empty(0), 64)
