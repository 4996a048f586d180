"""One rule for units: K, M, G are powers of 1000, Ki, Mi, Gi of 1024."""

import pytest

from herd.checkpoint.room import parse_bytes
from herd.errors import ConfigError
from herd.units import parse_number

SIZES = [
    ("80G", 80 * 10**9),
    ("3.35T", 3_350_000_000_000),
    ("96Gi", 96 << 30),
    ("96GiB", 96 << 30),
    ("1,000", 1000),
    ("64GB", 64 * 10**9),
    ("1.5g", 1_500_000_000),
    (" 2 KiB ", 2048),
    ("7", 7),
    (9, 9),
    ("800M", 800 * 10**6),
]


@pytest.mark.parametrize(("text", "number"), SIZES)
def test_the_same_number_wherever_it_is_asked_for(text: str | int, number: int) -> None:
    assert parse_number(text, "it") == parse_bytes(text) == number


def test_tokens_count_in_powers_of_two() -> None:
    assert parse_number("10M", "it", binary=True) == 10_485_760
    assert parse_number("128K", "it", binary=True) == 131_072
    assert parse_number("8192", "it", binary=True) == 8192


@pytest.mark.parametrize("text", ["", "G", "-1G", "0", "80X", "3X", "1e9", "nan", "1.2.3", "three"])
def test_what_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--memory is"):
        parse_number(text, "--memory")
