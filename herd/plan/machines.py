"""Machines: what they hold and how fast they are. The known ones are in machines.toml."""

import tomllib
from dataclasses import dataclass, fields
from importlib.resources import files
from typing import Any

from herd.errors import ConfigError
from herd.units import parse_number


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
