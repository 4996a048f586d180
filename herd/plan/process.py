"""Memory of a process that runs a model with Herd's own engine on the CPU, by what `herd.load` and `Engine` allocate.

Letters: N tokens of a step, K experts of a token, E experts, D hidden size, G key/value heads, d head_dim, F width.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from herd.config import TextConfig
from herd.errors import ConfigError
from herd.formats import Bits, Weights, fitting_group
from herd.plan.weights import SCALE_BYTES

PANEL = 32  # outputs that are packed together, and tokens that have room together
GATES = 16  # that are packed together, followed by their ups
PROMPT_TOKENS = 1024  # of a step of the engine
LINE = 64  # bytes; each packed weight begins one
F32, BF16 = 4, 2  # bytes of a number
HEAP = 4  # one of so many bytes of a step is lost between buffers that the C library gives and takes back, as measured


@dataclass(frozen=True)
class Process:
    """Bytes above those of a process that has imported Herd and run a model of next to no size.

    experts: of weights and scales, those of routed experts. step: what a forward pass needs for a time. heap: what is
    lost between buffers of steps. packing: what packing a weight needs for a time, before there are keys and values.
    loading: all that is in memory when it is most while a Hugging Face folder is loaded: what is packed, a layer or the
    head as its file has it, and a copy of a weight. mapped: the embedding, of which those pages come into memory that
    are read; the system takes them back when it needs that for others. All else is the process's own.
    """

    weights: int
    scales: int
    experts: int
    norms_and_routers: int
    kv: int
    step: int
    heap: int
    packing: int
    loading: int
    mapped: int

    @property
    def own(self) -> int:
        """The most that it needs of its own at a time."""
        running = self.kv + self.step + self.heap
        return self.weights + self.scales + self.norms_and_routers + max(running, self.packing)

    @property
    def peak(self) -> int:
        """The most that it has in memory at a time, where the system takes nothing back."""
        return max(self.own + self.mapped, self.loading)


def process(cfg: TextConfig, weights: Weights, context: int, prompt_tokens: int = PROMPT_TOKENS) -> Process:
    """One that loads a bfloat16 checkpoint, packs it in these formats, and runs one sequence of so many tokens.

    ConfigError if the native library does not run such layers.
    """
    if cfg.head_dim % 64 or cfg.head_dim > 256:
        raise ConfigError(f"Herd's engine is planned for heads of 64, 128, 192 or 256 dimensions, not {cfg.head_dim}")
    stages, layers = list(_stages(cfg, weights)), range(cfg.num_hidden_layers)
    packed = [weight for stage in stages for weight in stage]
    chunk = min(cfg.attention_chunk_size or context, context)
    tokens = sum(_up(chunk if cfg.is_local(i) else context, PANEL) for i in layers)
    routers = sum(map(cfg.is_moe, layers)) * cfg.num_local_experts
    step = _step(cfg, weights, min(prompt_tokens, chunk))
    norms_and_routers = F32 * cfg.hidden_size * (2 * len(layers) + 1 + routers)
    return Process(
        weights=sum(w.weight_bytes for w in packed),
        scales=sum(w.scale_bytes for w in packed),
        experts=sum(w.weight_bytes + w.scale_bytes for w in packed if w.routed),
        norms_and_routers=norms_and_routers,
        kv=2 * BF16 * cfg.num_key_value_heads * cfg.head_dim * tokens,
        step=step,
        heap=step // HEAP,
        packing=max(w.stored for w in packed[:-1]),  # the head is packed as it is stored
        loading=norms_and_routers + _loading(stages),
        mapped=BF16 * cfg.vocab_size * cfg.hidden_size,
    )


class _Packed(NamedTuple):
    form: Bits
    outputs: int
    inputs: int
    copies: int = 1
    routed: bool = False

    @property
    def padded(self) -> int:
        """Outputs, filled up to whole panels."""
        return _up(self.outputs, PANEL)

    @property
    def stored(self) -> int:
        """Bytes of one copy in a checkpoint."""
        return self.outputs * self.inputs * BF16

    @property
    def weight_bytes(self) -> int:
        return self.copies * _up(self.padded * self.inputs * self.form.bits // 8, LINE)

    @property
    def scale_bytes(self) -> int:
        return self.copies * self.padded * _groups(self.inputs, self.form) * SCALE_BYTES


def _stages(cfg: TextConfig, weights: Weights) -> Iterator[list[_Packed]]:
    """Weights as they are packed: layer by layer, q, k and v in one, gate and up in one; the head last."""
    D, d, H, G = cfg.hidden_size, cfg.head_dim, cfg.num_attention_heads, cfg.num_key_value_heads
    for i in range(cfg.num_hidden_layers):
        attention, experts = weights.attention_of(cfg.is_local(i)).packed, cfg.num_local_experts if cfg.is_moe(i) else 0
        F = cfg.intermediate_size if experts else cfg.intermediate_size_mlp
        stage = [_Packed(attention, (H + 2 * G) * d, D), _Packed(attention, D, H * d)]
        for form, copies, routed in ((weights.shared.packed, 1, False), (weights.experts.packed, experts, True)):
            stage += [_Packed(form, 2 * _up(F, GATES), D, copies, routed), _Packed(form, D, F, copies, routed)]
        yield stage
    yield [_Packed(weights.head.packed, cfg.vocab_size, D)]


def _loading(stages: Iterable[list[_Packed]]) -> int:
    """The most of packed weights, those of a stage as they are stored, and a copy of one, at a time."""
    most = packed = 0
    for stage in stages:
        stored = 0
        for weight in stage:
            packed += weight.weight_bytes + weight.scale_bytes
            stored += weight.copies * weight.stored
            most = max(most, packed + stored + (weight.stored if len(stage) > 1 else 0))
    return most


def _step(cfg: TextConfig, weights: Weights, N: int) -> int:
    """What a forward pass over N tokens of one sequence needs for a time: the larger of layers and logits."""
    states = N * cfg.hidden_size * (BF16 + F32)  # embeddings, and what the layers make of them
    turns = F32 * N * (cfg.head_dim + 1)  # cosines and sines, and temperatures
    layers = N * max(_layer(cfg, weights, i) for i in range(cfg.num_hidden_layers))
    return states + turns + max(layers, F32 * cfg.vocab_size)


def _layer(cfg: TextConfig, weights: Weights, layer: int) -> int:
    """Buffers of one layer for a token (cpp/decoder.cpp): q, k, v and what attention gives, the states between
    products, and rows of activations as products take them."""
    moe = cfg.is_moe(layer)
    D, wide, E = cfg.hidden_size, cfg.num_attention_heads * cfg.head_dim, cfg.num_local_experts if moe else 0
    K = cfg.num_experts_per_tok if moe else 0
    F = _up(cfg.intermediate_size if moe else cfg.intermediate_size_mlp, GATES)
    qkv = wide + 2 * cfg.num_key_value_heads * cfg.head_dim
    states = qkv + wide + D + (1 + K) * F + K * D + E + 3 * K
    forms = (weights.attention_of(cfg.is_local(layer)), weights.shared, weights.experts)
    attention, shared, experts = (form.packed for form in forms)
    rows = _row(attention, D) + _row(attention, wide) + _row(shared, D) + _row(shared, F)
    return F32 * states + rows + K * (_row(experts, D) + _row(experts, F))


def _row(form: Bits, inputs: int) -> int:
    """A token's activations: bfloat16, or int8 with a scale and the begin of a sum for each group."""
    return BF16 * inputs if form.bits == 16 else inputs + 2 * F32 * _groups(inputs, form)


def _groups(inputs: int, form: Bits) -> int:
    """Scales of one output."""
    return inputs // fitting_group(inputs, form.group) if form.bits < 16 else 0


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
