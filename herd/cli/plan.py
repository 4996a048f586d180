"""`herd plan`: what a model takes on a machine, before anything loads."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from herd.cli.output import JsonFlag, examples, print_json
from herd.config import PRESETS, VISION, TextConfig, VisionConfig
from herd.errors import ConfigError
from herd.plan.advice import Change, changes, devices_needed
from herd.plan.fit import PLACES, Item, Place, Plan, Setup, herd_process
from herd.plan.flops import flops_per_tile, flops_per_token
from herd.plan.machines import Machine, machine, machines
from herd.plan.memory import parse_kv
from herd.plan.process import Process
from herd.plan.times import Time, decode, prefill
from herd.plan.weights import KNOWN, parse_weights
from herd.units import parse_number

NAME = "plan"
EXAMPLES = examples(
    "herd plan scout --context 10M --gpu h100-80g --weights int4 --kv int4",
    "herd plan behemoth-assumed --context 1M --gpu b200 --count 16 --weights fp8 --kv fp8",
    "herd plan ./my-model --context 128K --gpu cpu --weights int8 --json",
    "herd plan maverick --context 128K --memory 96G --bandwidth 1.8T --flops 500T --weights int4",
)
_PLACED = "device, host (its memory) or disk."


def command(
    model: Annotated[str, typer.Argument(metavar="NAME|DIR", help=f"cria, {', '.join(PRESETS)}, or a model folder.")],
    context: Annotated[str, typer.Option(help="Tokens, like 128K or 10M. Default: the model's positions.")] = "",
    gpu: Annotated[str, typer.Option(metavar="NAME", help=f"{', '.join(machines())}.")] = "",
    count: Annotated[int, typer.Option(help="Devices that share the model.")] = 1,
    weights: Annotated[str, typer.Option(metavar="FORMAT", help=f"{KNOWN}.")] = "bf16",
    kv: Annotated[str, typer.Option(metavar="FORMAT", help="Keys and values: bf16, fp8, int8 or int4.")] = "bf16",
    kv_in: Annotated[str, typer.Option(help=f"Where keys and values of global layers are: {_PLACED}")] = "device",
    experts_in: Annotated[str, typer.Option(help=f"Where routed experts are: {_PLACED}")] = "device",
    prefill_chunk: Annotated[str, typer.Option(help="Tokens of a prompt in one forward pass.")] = "",
    memory: Annotated[str, typer.Option(help="Bytes of a device, like 80G; instead of the machine's.")] = "",
    bandwidth: Annotated[str, typer.Option(help="Bytes/s of its memory, like 3.35T.")] = "",
    flops: Annotated[str, typer.Option(help="FLOP/s in bf16 and all other formats, like 989T.")] = "",
    host_memory: Annotated[str, typer.Option(help="Bytes of a host, of all its devices together.")] = "",
    link: Annotated[str, typer.Option(help="Bytes/s between host and a device.")] = "",
    interconnect: Annotated[str, typer.Option(help="Bytes/s that a device sends to others.")] = "",
    as_json: JsonFlag = False,
) -> None:
    """Say what a model takes on a machine: bytes by part, what fits where, how long it takes, what to change."""
    cfg, vision = _model(model)
    stated = {"memory": memory, "bandwidth": bandwidth, "flops": flops, "host_memory": host_memory, "link": link}
    stated["interconnect"] = interconnect
    if count < 1:
        raise ConfigError(f"--count is {count}; a model needs at least 1 device")
    tokens = parse_number(context, "--context", binary=True) if context else cfg.max_position_embeddings
    if tokens > cfg.max_position_embeddings:
        raise ConfigError(f"--context is {tokens:,} tokens; {model} has {cfg.max_position_embeddings:,} positions")
    plan = Plan(
        Setup(
            model=model,
            cfg=cfg,
            vision=vision,
            machine=_machine(gpu, {k: v for k, v in stated.items() if v}),
            count=count,
            weights=parse_weights(weights),
            kv=parse_kv(kv),
            context=tokens,
            prompt_tokens=parse_number(prefill_chunk, "--prefill-chunk", binary=True) if prefill_chunk else None,
            kv_in=_place(kv_in, "--kv-in"),
            experts_in=_place(experts_in, "--experts-in"),
        )
    )
    print_json(_json(plan)) if as_json else _print(plan)


def _model(name: str) -> tuple[TextConfig, VisionConfig | None]:
    if name in PRESETS and not Path(name).exists():
        return PRESETS[name], None if name.startswith("behemoth") else VISION  # whose encoder nobody has described
    from herd.checkpoint import open_weights
    from herd.checkpoint.files import read_json
    from herd.checkpoint.names import find_model

    if name != "cria" and not Path(name).exists():
        raise ConfigError(f"no model is called {name!r}; known: cria, {', '.join(PRESETS)}, or give a model folder")
    folder = find_model(name).folder
    if (folder / "config.json").exists():  # the weights may be elsewhere
        raw = read_json(folder / "config.json")
        return TextConfig.from_hf(raw), VisionConfig.from_hf(raw)
    with open_weights(folder) as weights:
        return weights.text, weights.vision


def _machine(name: str, stated: dict[str, str]) -> Machine:
    """A known machine, a stated one, or a known one with some numbers as stated."""
    numbers: dict[str, Any] = {k: parse_number(v, f"--{k.replace('_', '-')}") for k, v in stated.items()}
    if "flops" in numbers:
        rate = numbers.pop("flops")
        numbers |= {"bf16": rate, "fp8": rate, "int8": rate, "compute_share": 1.0}
    if "bandwidth" in numbers:
        numbers["bandwidth_share"] = 1.0
    if "memory" in numbers:
        numbers["reserved"] = 0
    if name:
        known = machine(name)
        return replace(known, title=f"{known.title} with other numbers" if numbers else known.title, **numbers)
    if missing := [f"--{k}" for k in ("memory", "bandwidth", "flops") if k not in stated]:
        raise ConfigError(f"a machine is missing; give --gpu ({', '.join(machines())}), or also {', '.join(missing)}")
    return Machine("stated", "stated machine", devices=8 if "interconnect" in numbers else 1, **numbers)


def _place(text: str, option: str) -> Place:
    for place in PLACES:
        if place == text:
            return place
    raise ConfigError(f"{option} is {text!r}; it can be {', '.join(PLACES)}")


def _json(plan: Plan) -> dict[str, Any]:
    s = plan.setup
    places = {place: {"bytes": plan.bytes_in(place), "room": plan.room_in(place)} for place in PLACES}
    image = None if s.vision is None else flops_per_tile(s.vision, s.cfg.hidden_size)
    return {
        "model": s.model,
        "machine": asdict(s.machine),
        "count": s.count,
        "weights": s.weights.name,
        "kv": s.kv.name,
        "context": s.context,
        "prefill_chunk": s.step,
        "items": [asdict(item) for item in plan.items],
        "places": places,
        "fits": plan.fits,
        "longest_context": plan.longest,
        "devices_needed": devices_needed(plan),
        "changes": [_change(plan, change) for change in changes(plan)],
        "process": asdict(need) | {"own": need.own, "peak": need.peak} if (need := _process(s)) else None,
        "flops": {"token": asdict(flops_per_token(s.cfg, s.context)), "image_tile": image},
        "prefill": _time(prefill(plan)),
        "decode": _time(decode(plan)),
    }


def _change(plan: Plan, change: Change) -> dict[str, Any]:
    after = Plan(change.applied(plan.setup))
    return {"text": change.text, "prefill_s": prefill(after).seconds, "decode_s": decode(after).seconds}


def _process(s: Setup) -> Process | None:
    return herd_process(s) if s.machine.herd else None


def _time(time: Time) -> dict[str, Any]:
    return {**asdict(time), "seconds": time.seconds, "bound_by": time.bound_by}


def _print(plan: Plan) -> None:
    s = plan.setup
    on = f"{s.count} x {s.machine.title}" if s.count > 1 else s.machine.title
    print(f"{s.model} on {on}: {s.context:,} tokens, weights {s.weights.name}, keys and values {s.kv.name}\n")
    each = "bytes of each" if s.count > 1 else "bytes"
    _table([("", "parameters", "format", each, "where"), *map(_row, plan.items)], "<><><")
    print()
    rooms = [_room(plan, place) for place in PLACES if plan.bytes_in(place)]
    _table([("", "needed", "there is", ""), *rooms], "<>><")
    print()
    longest, needed = plan.longest, devices_needed(plan)
    answers = [("longest context", f"{longest:,} tokens" if longest else "none")]
    if s.machine.interconnect:
        answers.append(("devices needed", str(needed or "no number is enough")))
    answers.append(("reading it all", _duration(prefill(plan))))
    answers.append(("each token after", _duration(decode(plan))))
    _table(answers, "<<")
    print("\n" + _verdict(plan))


def _row(item: Item) -> tuple[str, ...]:
    numbers = f"{item.parameters:,}" if item.parameters else ""
    return item.name, numbers, item.format, f"{item.nbytes:,}", item.place


def _room(plan: Plan, place: Place) -> tuple[str, ...]:
    need, room = plan.bytes_in(place), plan.room_in(place)
    name = {"device": "on each device", "host": "in a host's memory", "disk": "on a host's disk"}[place]
    return name, _gb(need), _gb(room), "" if need <= room else f"{_gb(need - room)} too much"


def _verdict(plan: Plan) -> str:
    if plan.fits:
        return "It fits."
    found = [_told(plan, change) for change in changes(plan)]
    if not found:
        return "It does not fit, and no change of up to three things makes it fit."
    others = f" Others: {'; '.join(found[1:])}." if found[1:] else ""
    return f"It does not fit. The smallest change that would: {found[0]}.{others}"


def _told(plan: Plan, change: Change) -> str:
    """A change and what it leads to."""
    return f"{change.text} ({_seconds(decode(Plan(change.applied(plan.setup))).seconds)} a token)"


def _duration(time: Time) -> str:
    return f"{_seconds(time.seconds)}, bound by {time.bound_by}"


def _seconds(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1e3:,.1f} ms"
    if seconds < 120:
        return f"{seconds:,.1f} s"
    return f"{seconds / 60:,.1f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:,.2f} GB"


def _table(rows: Sequence[tuple[str, ...]], sides: str) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)).rstrip())
