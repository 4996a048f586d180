"""Numbers as people write them: `80G` is 80 * 10^9, `96Gi` 96 * 2^30, of memory, disks and rates alike."""

import re

from herd.errors import ConfigError

_UNITS = "_KMGTP"


def parse_number(text: str | int, what: str, *, binary: bool = False) -> int:
    """`80G`, `1.5T` or `96Gi` as a number, with or without a B behind it. ConfigError if it is none.

    what: its name, for the error. binary: K, M and so on are powers of 1024, too, as tokens are counted: a context of
    128K has 131,072.
    """
    said = str(text).strip().replace(",", "")
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGTP])(i?)B?|B)?", said, re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise ConfigError(f"{what} is {text!r}; give a number above 0, such as 80G (10^9), 96Gi (2^30) or 3.35T")
    base = 1024 if found[3] or binary else 1000
    return round(float(found[1]) * base ** (_UNITS.index(found[2].upper()) if found[2] else 0))
