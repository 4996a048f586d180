"""Machines as data, and numbers with units."""

import pytest

from herd.errors import ConfigError
from herd.plan.machines import machine, machines, parse_number


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


@pytest.mark.parametrize(
    ("text", "number"),
    [("80G", 80e9), ("3.35T", 3.35e12), ("96Gi", 96 * 2**30), ("96GiB", 96 * 2**30), ("1,000", 1000), ("64GB", 64e9)],
)
def test_numbers_have_units(text: str, number: float) -> None:
    assert parse_number(text, "it") == number


def test_tokens_count_in_powers_of_two() -> None:
    assert parse_number("10M", "it", binary=True) == 10_485_760
    assert parse_number("128K", "it", binary=True) == 131_072
    assert parse_number("8192", "it", binary=True) == 8192


@pytest.mark.parametrize("text", ["", "G", "-1G", "0", "80X", "1e9", "nan", "80 G", "1.2.3"])
def test_what_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--memory is"):
        parse_number(text, "--memory")
