"""How long reading a prompt and answering take, from a machine's rates: formulas in docs/plan.md."""

from dataclasses import dataclass

from herd.formats import FP8, Format
from herd.plan.fit import Plan, Setup
from herd.plan.flops import Flops, flops_of_prompt, flops_of_reading, flops_per_token
from herd.plan.memory import kv, kv_bytes_per_token
from herd.plan.weights import parts, share


@dataclass(frozen=True)
class Time:
    """Seconds of what goes on side by side (arithmetic, reading memory, moving what is on host or disk), and of what
    the others wait for (talk between devices, experts that are fetched when they are chosen)."""

    compute: float
    memory: float
    moving: float
    waiting: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory, self.moving) + self.waiting

    @property
    def bound_by(self) -> str:
        """What takes longest."""
        named = {"compute": self.compute, "memory": self.memory, "moving": self.moving, "waiting": self.waiting}
        return max(named, key=named.__getitem__)


def prefill(plan: Plan) -> Time:
    """The whole context as one prompt, from nothing."""
    s = plan.setup
    steps, moved = share(s.context, s.step), 0.0
    if s.in_a_context:
        moved += kv(s.cfg, s.kv, s.context)[0].nbytes / _rate(s, "disk")
    elif s.kv_in != "device":  # each step's tokens go there, and all before them come back
        past = s.step * steps * (steps - 1) // 2 + s.context
        moved += past * kv_bytes_per_token(s.cfg, s.kv, s.count) / _rate(s, s.kv_in)
    weights, routed, _ = _weight_bytes(s)
    if s.experts_in != "device":  # a step needs all of them
        moved += steps * routed / _rate(s, s.experts_in)
    memory = steps * (weights + routed) / _bandwidth(s)
    flops = flops_of_reading(s.cfg, s.context) if s.in_a_context else flops_of_prompt(s.cfg, s.context)
    return Time(_compute(s, flops), memory, moved, s.context * _talk(s))


def decode(plan: Plan) -> Time:
    """One token at the end of the context."""
    s = plan.setup
    weights, _, active = _weight_bytes(s)
    far, near = (part.nbytes for part in kv(s.cfg, s.kv, s.context, s.count))
    if s.in_a_context:  # where of values only those are read that matter, which are few
        far //= 2
    read, moved, waiting = weights + active + far + near, 0.0, _talk(s)
    if s.kv_in != "device" or (s.in_a_context and not plan.caches):
        moved = far / _rate(s, "disk" if s.in_a_context else s.kv_in)
    if s.experts_in != "device":  # which one is known only when a layer has chosen
        waiting += active / _rate(s, s.experts_in)
    return Time(_compute(s, flops_per_token(s.cfg, s.context)), read / _bandwidth(s), moved, waiting)


def _compute(s: Setup, flops: Flops) -> float:
    """Each part at the rate of its format, attention and router in bf16."""
    middle = s.cfg.num_hidden_layers // 2
    of = {"projections": "attention"}
    seconds = 0.0
    for part, count in vars(flops).items():
        form = s.weights.of(of.get(part, part), s.cfg, middle)
        rate = s.machine.bf16 if part in ("attention", "router") else _flops(s, form)
        seconds += count / rate
    return seconds / (s.count * s.machine.compute_share)


def _flops(s: Setup, form: Format) -> float:
    """FLOP/s of products with weights of a format: fp8 with activations in fp8 and, in Herd's engine, 8 and 4 bits with
    activations in int8; else bf16."""
    if s.machine.herd and form.whole:
        return s.machine.int8 or s.machine.bf16
    return (s.machine.fp8 if form == FP8 else 0) or s.machine.bf16


def _weight_bytes(s: Setup) -> tuple[int, int, int]:
    """Of one device: what every token reads but for routed experts; all routed experts; those that one token reads."""
    found = {p.name: p.nbytes for p in parts(s.cfg, None, s.weights, s.count)}
    routed = found.pop("routed_experts", 0)
    if not s.cfg.tie_word_embeddings:
        del found["embedding"]  # of which a token reads one row
    active = routed * s.cfg.num_experts_per_tok // max(s.cfg.num_local_experts, 1)
    return sum(found.values()), routed, active


def _bandwidth(s: Setup) -> float:
    return s.machine.bandwidth * s.machine.bandwidth_share


def _rate(s: Setup, place: str) -> float:
    """Bytes/s to one device from host or disk."""
    return s.machine.link if place == "host" else s.machine.disk_bandwidth


def _talk(s: Setup) -> float:
    """Seconds a token in which devices add up what each has of attention and feed-forward block, in rings."""
    if s.count == 1:
        return 0
    each = 2 * s.cfg.num_hidden_layers * s.cfg.hidden_size * 2 * 2 * (s.count - 1) / s.count
    rate = s.machine.interconnect if s.hosts == 1 else s.machine.network
    return each / rate if rate else 0
