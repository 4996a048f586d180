"""What fits where: a model, a machine and the choices between them become bytes on devices, hosts and disks."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from herd.config import TextConfig, VisionConfig
from herd.errors import ConfigError
from herd.plan.machines import Machine
from herd.plan.memory import KV_FORMATS, Kv, KvFormat, activations, kv, step_tokens
from herd.plan.process import BF16, PROMPT_TOKENS, Process, process
from herd.plan.weights import TITLES, Choice, parts

Place = Literal["device", "host", "disk"]
PLACES: tuple[Place, ...] = ("device", "host", "disk")
_STREAMED = 2  # pieces that are under way at a time, of what is not on the device


@dataclass(frozen=True)
class Setup:
    """A question to the planner. kv_in: where keys and values of global layers are; experts_in: routed experts.

    count: devices, which share all that can be divided (tensor parallelism). prompt_tokens: of a prompt in one forward
    pass, None: the usual number. ConfigError if the machine has not what this asks for.
    """

    model: str
    cfg: TextConfig
    vision: VisionConfig | None
    machine: Machine
    count: int
    weights: Choice
    kv: KvFormat
    context: int
    prompt_tokens: int | None = None
    kv_in: Place = "device"
    experts_in: Place = "device"

    def __post_init__(self) -> None:
        m = self.machine
        if self.count > 1 and not m.interconnect:
            raise ConfigError(f"{m.name} has no connection to others; plan 1 of it, or say how fast it is")
        for place in {self.kv_in, self.experts_in} - {"device"}:
            if not (m.host_memory and m.link if place == "host" else m.disk and m.disk_bandwidth):
                raise ConfigError(f"{m.name} has no {place}, or its speed is not known; leave all on the device")

    @property
    def step(self) -> int:
        """Tokens of a prompt in one forward pass."""
        asked = self.prompt_tokens or (PROMPT_TOKENS if self.machine.herd else None)
        return step_tokens(self.cfg, self.context, asked)

    @property
    def in_a_context(self) -> bool:
        """Whether keys and values of global layers are in a context folder: where Herd's engine has those of 8 or 4
        bits, and reads them through the page cache."""
        return self.machine.herd and self.kv.bits < 16

    @property
    def hosts(self) -> int:
        return -(-self.count // self.machine.devices)


@dataclass(frozen=True)
class Item:
    """Bytes that each device has of something, wherever they are. scale_bytes are among nbytes."""

    name: str
    format: str
    parameters: int
    nbytes: int
    scale_bytes: int
    place: Place


@dataclass(frozen=True)
class Plan:
    """What a setup takes."""

    setup: Setup

    @cached_property
    def items(self) -> list[Item]:
        """All that is kept, for one device."""
        s = self.setup
        name = "system and libraries" if s.machine.herd else "driver, libraries and waste"
        return [*(_herd(s) if s.machine.herd else _items(s)), _device(name, "", int(s.machine.reserved))]

    def bytes_in(self, place: Place) -> int:
        """Bytes on one device, or those of one host, of all its devices together."""
        each = sum(item.nbytes for item in self.items if item.place == place)
        return each if place == "device" else each * min(self.setup.count, self.setup.machine.devices)

    def room_in(self, place: Place) -> int:
        machine = self.setup.machine
        return {"device": int(machine.memory), "host": int(machine.host_memory), "disk": int(machine.disk)}[place]

    @cached_property
    def lacking(self) -> list[Place]:
        """Where it does not fit."""
        return [place for place in PLACES if self.bytes_in(place) > self.room_in(place)]

    @property
    def caches(self) -> bool:
        """Whether a context folder fits into memory beside all else."""
        free = self.room_in("device") - self.bytes_in("device")
        return kv(self.setup.cfg, self.setup.kv, self.setup.context)[0].nbytes <= free

    @property
    def fits(self) -> bool:
        return not self.lacking

    @cached_property
    def longest(self) -> int:
        """The longest context that fits, in tokens, at most the model's positions; 0: none."""
        low, high = 0, self.setup.cfg.max_position_embeddings
        if self.at(high).fits:
            return high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.at(middle).fits else (low, middle)
        return low

    def at(self, context: int) -> "Plan":
        """The same with another context."""
        return Plan(replace(self.setup, context=context))


def _items(s: Setup) -> list[Item]:
    """On GPUs, for an engine with fused attention."""
    items = [
        Item(TITLES[p.name], p.format, p.parameters, p.nbytes, p.scale_bytes, _place(s, p.name))
        for p in parts(s.cfg, s.vision, s.weights, s.count)
    ]
    far, near = kv(s.cfg, s.kv, s.context, s.count)
    items += [_far(s, far), _near(s, s.kv, near)]
    items.append(_device(f"activations ({s.step:,} tokens)", "bf16", activations(s.cfg, s.step, s.count)))
    pieces = []
    if s.kv_in != "device":  # a step's worth of tokens of one layer
        pieces.append(kv(s.cfg, s.kv, s.step, s.count)[0].nbytes // max(len(s.cfg.global_layers), 1))
    if s.experts_in != "device":  # an expert
        pieces.append(next((item.nbytes for item in items if item.name == TITLES["routed_experts"]), 0) // _experts(s))
    if pieces:
        items.append(_device("under way from host or disk", "", _STREAMED * sum(pieces)))
    return items


def _herd(s: Setup) -> list[Item]:
    """In a process of Herd's own engine, with weights as it packs them. Experts on disk are in a packed folder, and as
    many of them in memory as there is room for, at least one."""
    n, need = s.cfg.num_parameters(), herd_process(s)
    kept, scales = need.weights + need.scales, need.scales
    disk = Item("checkpoint, with the embedding", "bf16", n, BF16 * n, 0, "disk")
    one = list[Item]()
    if s.experts_in == "disk":
        kept, scales = kept - need.experts, 0
        disk = Item("routed experts, in a packed folder", str(s.weights.formats.experts), 0, need.experts, 0, "disk")
        one.append(_device("one expert", disk.format, need.experts // _experts(s)))
    items = [
        Item("packed weights", s.weights.name, n if disk.parameters else 0, kept, scales, "device"),
        *one,
        _device("norms and routers", "fp32", need.norms_and_routers),
    ]
    if s.in_a_context:
        bf16 = KV_FORMATS["bf16"]
        items += [_far(s, kv(s.cfg, s.kv, s.context)[0]), _near(s, bf16, kv(s.cfg, bf16, s.context)[1])]
    else:
        items.append(_device("keys and values", "bf16", need.kv))
    return [*items, _device(f"activations ({s.step:,} tokens)", "fp32", need.step), disk]


def herd_process(s: Setup) -> Process:
    """The process of Herd's own engine. ConfigError if it does not run such a setup."""
    if s.kv.name == "fp8" or s.kv_in != "device":
        raise ConfigError("Herd's engine has keys and values in memory as bf16, or in a context as int8 or int4")
    if s.weights.released:
        raise ConfigError(f"Herd's engine does not pack {s.weights.name}; use such as experts=int4:128,shared=int4:128")
    return process(s.cfg, s.weights.formats, s.context, s.step)


def _experts(s: Setup) -> int:
    """Routed experts of all layers; 1 where there are none."""
    return max(sum(map(s.cfg.is_moe, range(s.cfg.num_hidden_layers))) * s.cfg.num_local_experts, 1)


def _far(s: Setup, far: Kv) -> Item:
    place: Place = "disk" if s.in_a_context else s.kv_in
    return Item(f"keys and values, {_layers(far, 'global')}", s.kv.name, 0, far.nbytes, far.scale_bytes, place)


def _near(s: Setup, form: KvFormat, near: Kv) -> Item:
    return Item(f"keys and values, {_layers(near, 'local')}", form.name, 0, near.nbytes, near.scale_bytes, "device")


def _layers(some: Kv, kind: str) -> str:
    return f"{some.layers} {kind} layer{'' if some.layers == 1 else 's'}"


def _place(s: Setup, part: str) -> Place:
    return s.experts_in if part == "routed_experts" else "device"


def _device(name: str, form: str, nbytes: int) -> Item:
    return Item(name, form, 0, nbytes, 0, "device")
