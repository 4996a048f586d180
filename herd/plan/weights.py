"""Bytes of weights and their scales, by part and format, for a whole model or for one of several GPUs that share it."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from herd.config import TextConfig, VisionConfig
from herd.errors import ConfigError
from herd.formats import BF16, FP8, Format, Weights, fitting_group, parse

SCALE_BYTES = 4  # float32
PARTS = ("embedding", "attention", "routed_experts", "shared_experts", "dense", "head", "router", "norms", "vision")
TITLES = {part: part.replace("_", " ") for part in PARTS}
_FIELDS = {"routed_experts": "experts", "shared_experts": "shared", "dense": "shared"}


@dataclass(frozen=True)
class Choice:
    """Formats of a model's weights. released: as Meta's loader makes them, where dense blocks stay in bf16 and, with
    fp8, so do the routed experts of the first and the last layer (spec §7)."""

    name: str
    formats: Weights
    released: bool = False

    def of(self, part: str, cfg: TextConfig, layer: int) -> Format:
        """The format of a part in one layer of a model."""
        ends = (0, cfg.num_hidden_layers - 1)
        if self.released and (part == "dense" or (self.formats.experts == FP8 and layer in ends)):
            return BF16
        if part == "attention":
            return self.formats.attention_of(cfg.is_local(layer))
        return self.formats.formats.get(_FIELDS.get(part, part), BF16)


_INT4 = Format("int4", 128)
_RELEASED = {"int4_mixed": Weights(experts=_INT4, shared=_INT4), "fp8_mixed": Weights(experts=FP8)}
KNOWN = "bf16, int8, int4, int4:32 (groups of 32), fp8, such as experts=int4,head=int8, int4_mixed or fp8_mixed"


def parse_weights(text: str) -> Choice:
    """What a name stands for; ConfigError with the known ones if it is none."""
    if text in _RELEASED:
        return Choice(text, _RELEASED[text], released=True)
    try:
        return Choice(text, parse(text))
    except ConfigError as error:
        raise ConfigError(f"{error}; or as released, {' or '.join(_RELEASED)}") from None


class Matrix(NamedTuple):
    """Some matrices of one kind. layer None: outside of the layers."""

    part: str
    layer: int | None
    outputs: int
    inputs: int
    copies: int = 1


def matrices(cfg: TextConfig, gpus: int = 1) -> Iterator[Matrix]:
    """The matrices that each of some GPUs holds: heads, widths and vocabulary are divided among them, the rest not.

    Key/value heads cannot be divided further than one each. Where a number does not divide evenly, those of the GPU
    with the most.
    """
    D, d, V = cfg.hidden_size, cfg.head_dim, share(cfg.vocab_size, gpus)
    H, G = heads(cfg, gpus)
    yield Matrix("embedding", None, V, D)
    for i in range(cfg.num_hidden_layers):
        yield Matrix("attention", i, H * d, D)
        yield Matrix("attention", i, G * d, D, 2)
        yield Matrix("attention", i, D, H * d)
        if cfg.is_moe(i):
            F = share(cfg.intermediate_size, gpus)
            yield Matrix("router", i, cfg.num_local_experts, D)
            for part, copies in (("routed_experts", cfg.num_local_experts), ("shared_experts", 1)):
                yield Matrix(part, i, F, D, 2 * copies)
                yield Matrix(part, i, D, F, copies)
        else:
            F = share(cfg.intermediate_size_mlp, gpus)
            yield Matrix("dense", i, F, D, 2)
            yield Matrix("dense", i, D, F)
        yield Matrix("norms", i, 2, D)
    yield Matrix("norms", None, 1, D)
    if not cfg.tie_word_embeddings:
        yield Matrix("head", None, V, D)


def share(number: int, gpus: int) -> int:
    """The most that one of some GPUs gets."""
    return -(-number // gpus)


def heads(cfg: TextConfig, gpus: int) -> tuple[int, int]:
    """Query and key/value heads of the GPU with the most: beyond one GPU for each key/value head, these are kept more
    than once."""
    G = share(cfg.num_key_value_heads, gpus)
    if gpus > cfg.num_key_value_heads:
        return share(cfg.num_attention_heads, gpus), G
    return G * (cfg.num_attention_heads // cfg.num_key_value_heads), G


@dataclass(frozen=True)
class Part:
    """Weights of one kind: how many, in which format (several: +), and their bytes without scales and of scales."""

    name: str
    parameters: int
    format: str
    weight_bytes: int
    scale_bytes: int

    @property
    def nbytes(self) -> int:
        return self.weight_bytes + self.scale_bytes


@functools.cache
def parts(cfg: TextConfig, vision: VisionConfig | None, weights: Choice, gpus: int = 1) -> tuple[Part, ...]:
    """What one of some GPUs holds, in the order of PARTS. Images' encoder and projector are bf16, and divided."""
    found: dict[str, list[Part]] = {}
    for m in matrices(cfg, gpus):
        form, numbers = weights.of(m.part, cfg, m.layer or 0), m.outputs * m.inputs * m.copies
        scales = m.outputs * m.copies * _scales(m.inputs, form) * SCALE_BYTES
        found.setdefault(m.part, []).append(Part(m.part, numbers, str(form), numbers * form.bits // 8, scales))
    if vision is not None:
        numbers = share(vision.num_parameters(cfg.hidden_size), gpus)
        found["vision"] = [Part("vision", numbers, str(BF16), 2 * numbers, 0)]
    return tuple(_sum(found[name]) for name in PARTS if name in found)


def _sum(rows: list[Part]) -> Part:
    numbers, nbytes, scales = (
        sum(column) for column in zip(*((p.parameters, p.weight_bytes, p.scale_bytes) for p in rows), strict=True)
    )
    return Part(rows[0].name, numbers, "+".join(dict.fromkeys(p.format for p in rows)), nbytes, scales)


def _scales(inputs: int, form: Format) -> int:
    """Scales of one output."""
    return inputs // fitting_group(inputs, form.group) if form.whole else int(form == FP8)
