"""What to change so that something fits that does not: the smallest change first."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any

from herd.plan.fit import Place, Plan, Setup
from herd.plan.memory import KV_FORMATS, kv_bytes_per_token
from herd.plan.weights import parse_weights, parts

_MOST = 1024  # devices
_SHOWN = 5
_GPU_WEIGHTS = ("fp8_mixed", "fp8", "int8", "int4_mixed", "int4", "int4:128")
_HERD_WEIGHTS = ("int8", "int4", "int4:128")


@dataclass(frozen=True)
class Change:
    """Some fields of a setup, and how one would say it."""

    fields: tuple[tuple[str, Any], ...]
    text: str

    @property
    def things(self) -> set[str]:
        """That are changed."""
        return {name for name, _ in self.fields}

    def applied(self, setup: Setup) -> Setup:
        return replace(setup, **dict(self.fields))

    def __add__(self, other: "Change") -> "Change":
        return Change(self.fields + other.fields, f"{self.text} and {other.text}")


def changes(plan: Plan) -> list[Change]:
    """Changes after which it fits, the smallest first; none if it fits.

    One thing that is changed is less than two, of which neither is enough alone. Of one thing, in this order and each
    the least that is enough: a narrower format of keys and values, a narrower one of weights, keys and values in host
    memory, more devices, experts in host memory, keys and values on disk, experts on disk, a shorter context.
    """
    if plan.fits:
        return []
    found, knobs = list[Change](), list[list[Change]]()
    for knob in filter(None, (list(offered(plan.setup)) for offered in _KNOBS)):
        alone = list(_least(plan, [knob], 1))
        found += alone
        knobs += [] if alone else [knob]
    if plan.longest:
        found.append(Change((("context", plan.longest),), f"a context of {plan.longest:,} tokens"))
    for size in (2, 3):
        if len(found) < 2:
            found += [
                more for more in _least(plan, knobs, size) if not any(less.things < more.things for less in found)
            ]
    return found[:_SHOWN]


def devices_needed(plan: Plan) -> int | None:
    """The fewest devices on which it fits as it is; None if there is no such number."""
    for change in [Change((("count", 1),), ""), *_counts(replace(plan.setup, count=1))]:
        if Plan(change.applied(plan.setup)).fits:
            return int(dict(change.fields)["count"])
    return None


def _least(plan: Plan, knobs: list[list[Change]], size: int) -> Iterator[Change]:
    """Of each `size` knobs, the combination with the fewest steps that is enough."""
    for chosen in combinations(knobs, size):
        most = _joined([knob[-1] for knob in chosen])
        if most is None or not Plan(most.applied(plan.setup)).fits:
            continue  # each step of a knob leaves more room
        for at in sorted(product(*map(range, map(len, chosen))), key=lambda at: (sum(at), at)):
            change = _joined([knob[i] for knob, i in zip(chosen, at, strict=True)])
            if change is not None and Plan(change.applied(plan.setup)).fits:
                yield change
                break


def _joined(some: list[Change]) -> Change | None:
    """All of them as one; None if two want the same thing."""
    if len(set.union(*(change.things for change in some))) < len(some):
        return None
    joined = some[0]
    for change in some[1:]:
        joined += change
    return joined


def _kv(s: Setup) -> Iterator[Change]:
    order = sorted(KV_FORMATS.values(), key=lambda form: -kv_bytes_per_token(s.cfg, form))
    now = kv_bytes_per_token(s.cfg, s.kv)
    for form in order:
        if kv_bytes_per_token(s.cfg, form) < now and (form.name != "fp8" or s.machine.fp8):
            where = " in a context folder" if s.machine.herd else ""
            yield Change((("kv", form),), f"keys and values {form.name}{where}")


def _weights(s: Setup) -> Iterator[Change]:
    def size(name: str) -> int:
        return sum(part.nbytes for part in parts(s.cfg, None, parse_weights(name)))

    names = _HERD_WEIGHTS if s.machine.herd else _GPU_WEIGHTS
    now = sum(part.nbytes for part in parts(s.cfg, None, s.weights))
    for name in sorted(names, key=size, reverse=True):
        if size(name) < now and (not name.startswith("fp8") or s.machine.fp8):
            yield Change((("weights", parse_weights(name)),), f"weights {name}")


def _counts(s: Setup) -> Iterator[Change]:
    each = s.machine.devices
    counts = [2**i for i in range(1, each) if 2**i < each] + list(range(each, _MOST + 1, each))
    if s.machine.interconnect:
        yield from (Change((("count", n),), f"{n} devices") for n in counts if n > s.count)


def _moved(field: str, what: str, place: Place) -> Callable[[Setup], Iterator[Change]]:
    def offered(s: Setup) -> Iterator[Change]:
        there = {"host": s.machine.host_memory, "disk": s.machine.disk}[place]
        if there and getattr(s, field) == "device" and not (s.machine.herd and field == "kv_in"):
            yield Change(((field, place),), f"{what} {'in host memory' if place == 'host' else 'on disk'}")

    return offered


_FAR, _EXPERTS = "keys and values of global layers", "routed experts"
_KNOBS: tuple[Callable[[Setup], Iterator[Change]], ...] = (
    _kv,
    _weights,
    _moved("kv_in", _FAR, "host"),
    _counts,
    _moved("experts_in", _EXPERTS, "host"),
    _moved("kv_in", _FAR, "disk"),
    _moved("experts_in", _EXPERTS, "disk"),
)
