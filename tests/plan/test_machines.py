"""Machines as data."""

import pytest

from herd.errors import ConfigError
from herd.plan.machines import machine, machines


@pytest.mark.parametrize("name", machines())
def test_every_machine_is_whole(name: str) -> None:
    found = machine(name)
    assert found.title and found.memory > found.reserved >= 0 and found.bandwidth and found.bf16
    assert 0 < found.compute_share <= 1 and 0 < found.bandwidth_share <= 1
    assert not found.host_memory or found.link
    assert not found.disk or found.disk_bandwidth
    assert found.devices == 1 or (found.interconnect and found.network)


def test_the_known_machines_are_there() -> None:
    assert {"h100-80g", "h200", "b200", "mi300x", "mac-m4-max", "mac-m3-ultra", "laptop", "cpu"} == set(machines())
    assert machine("h100-80g").memory == 81559 * 2**20 and machine("h100-80g").bandwidth == 3.35e12


def test_an_unknown_machine_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'h100'; known: h100-80g, h200, b200"):
        machine("h100")
