"""Machines: what they hold and how fast they are. The known ones are in machines.toml."""

import re
import tomllib
from dataclasses import dataclass, fields
from importlib.resources import files
from typing import Any

from herd.errors import ConfigError

_DECIMAL = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}


@dataclass(frozen=True)
class Machine:
    """One device of a host with `devices` of them; see machines.toml for the fields. 0: there is no such thing."""

    name: str
    title: str
    memory: float
    bandwidth: float
    bf16: float
    fp8: float = 0
    int8: float = 0
    reserved: float = 0
    link: float = 0
    interconnect: float = 0
    network: float = 0
    devices: int = 1
    host_memory: float = 0
    disk: float = 0
    disk_bandwidth: float = 0
    compute_share: float = 1
    bandwidth_share: float = 1
    herd: bool = False


def parse_number(text: str, what: str, *, binary: bool = False) -> int:
    """`80G`, `1.5T` or `96Gi` as a number; binary: K, M and so on are powers of 1024. ConfigError if it is none."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(?:([KMGTP])(i?)B?|B)?", text.replace(",", ""), re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise ConfigError(f"{what} is {text!r}; give a number above 0, such as 80G, 3.35T or 128K")
    unit = (found[2] or "").upper()
    factor = 1024 ** "_KMGTP".index(unit) if unit and (found[3] or binary) else _DECIMAL[unit]
    return round(float(found[1]) * factor)


def machine(name: str) -> Machine:
    """A known machine. ConfigError with the known names if it is none."""
    table = _table()
    if name not in table:
        raise ConfigError(f"no machine is called {name!r}; known: {', '.join(table)}")
    numbers = [f.name for f in fields(Machine) if f.type is float]
    values: dict[str, Any] = {
        k: parse_number(v, f"{k} of {name}") if k in numbers and isinstance(v, str) else v
        for k, v in table[name].items()
    }
    return Machine(name, **values)


def machines() -> list[str]:
    """Names of the known machines."""
    return list(_table())


def _table() -> dict[str, dict[str, str | float | bool]]:
    return tomllib.loads(files("herd.plan").joinpath("machines.toml").read_text("utf-8"))
