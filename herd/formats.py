"""Formats of weights, chosen for each part of a model by name: `int4`, `int8:128`, `experts=int4,head=int8`."""

import re
from dataclasses import dataclass, fields
from typing import NamedTuple

from herd.errors import ConfigError

GROUP = 64  # inputs that share a scale where no number is given: perplexity rises with it, and speed, too (LOG 15)
_BITS = {"bf16": 16, "fp8": 8, "int8": 8, "int4": 4}


class Bits(NamedTuple):
    """How the native library packs a weight: in 8 or 4 bits with a scale for each `group` of inputs, or bfloat16."""

    bits: int
    group: int


class Format(NamedTuple):
    """How the numbers of a weight are kept: as they are (bf16), as whole numbers of steps (int8, int4), of which each
    output has one for every `group` of inputs, or in e4m3 (fp8), with a scale for each output."""

    kind: str
    group: int = 0

    @property
    def bits(self) -> int:
        return _BITS[self.kind]

    @property
    def whole(self) -> bool:
        """Whether numbers are whole numbers of steps."""
        return self.group > 0

    @property
    def packed(self) -> Bits:
        """As the native library has it, which knows no fp8: the numbers are rounded to it and packed in bfloat16."""
        return Bits(self.bits if self.whole else 16, self.group)

    def __str__(self) -> str:
        return f"{self.kind}:{self.group}" if self.whole else self.kind


BF16, FP8 = Format("bf16"), Format("fp8")


@dataclass(frozen=True)
class Weights:
    """Formats of routed experts, of shared experts and dense feed-forward blocks, of attention in local and in global
    layers, and of the head.

    Embeddings, routers and norms stay as they are.
    """

    experts: Format = BF16
    shared: Format = BF16
    attention: Format = BF16
    global_attention: Format = BF16
    head: Format = BF16

    @classmethod
    def all(cls, form: Format) -> "Weights":
        return cls(form, form, form, form, form)

    def attention_of(self, local: bool) -> Format:
        return self.attention if local else self.global_attention

    @property
    def formats(self) -> dict[str, Format]:
        """By name of the part."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def uniform(self) -> Format | None:
        """The format that all parts have, if there is one."""
        return self.head if len(set(self.formats.values())) == 1 else None

    def __str__(self) -> str:
        usual = dict.fromkeys(self.formats, BF16) | {"global_attention": self.attention}
        named = (f"{part}={form}" for part, form in self.formats.items() if form != usual[part])
        return str(self.uniform or ",".join(named))


def parse(text: str) -> Weights:
    """What a name stands for. Parts that it does not name have the format that stands first, or else bf16; attention of
    global layers is as that of local ones. ConfigError if it is no name."""
    first, *named = text.split(",")
    rest, named = (BF16, [first, *named]) if "=" in first else (_format(first), named)
    parts: dict[str, Format] = {}
    known = Weights.all(rest).formats
    for item in named:
        part, _, form = item.partition("=")
        if part not in known:
            raise ConfigError(f"a model has no part {part!r} to choose a format for; its parts: {', '.join(known)}")
        if part in parts:
            raise ConfigError(f"weights {text!r} name {part} twice; name each part once")
        parts[part] = _format(form)
    return Weights(**{**known, "global_attention": parts.get("attention", rest), **parts})


def fitting_group(inputs: int, most: int) -> int:
    """The largest group of at most so many inputs that they can be cut into. ConfigError if there is none: inputs that
    are no multiple of 8."""
    groups = [group for group in range(8, min(most, inputs) + 1, 8) if inputs % group == 0]
    if not groups:
        raise ConfigError(f"a layer has {inputs} inputs; int8 and int4 need a multiple of 8")
    return groups[-1]


def _format(text: str) -> Format:
    kind, colon, group = text.partition(":")
    if kind in ("bf16", "fp8") and not colon:
        return Format(kind)
    if kind in ("int8", "int4") and (not colon or re.fullmatch(r"[1-9]\d*", group)):
        form = Format(kind, int(group) if colon else GROUP)
        if form.group < 8:
            raise ConfigError(f"weights {text!r} have groups of {group} inputs; use 8 or more")
        return form
    raise ConfigError(f"weights cannot be {text!r}; use bf16, int8, int4, such as int4:32 (groups of 32), or fp8")
