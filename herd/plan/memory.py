"""Bytes of keys, values and activations on one of some GPUs.

Letters: T tokens of a step, D hidden size, H query heads, G key/value heads, d head_dim, F width of an expert.
"""

from dataclasses import dataclass
from typing import NamedTuple

from herd.config import TextConfig
from herd.errors import ConfigError
from herd.plan.weights import heads, share

STEP = 8192  # tokens of a prompt that a GPU sees at a time, where the model has no attention chunk


class KvFormat(NamedTuple):
    """Of keys and values. scale_bytes: of each key and each value of a head."""

    name: str
    bits: int
    scale_bytes: int


# int8 and int4 as in contexts (docs/context-format.md); fp8 has one scale for all, which does not count.
_KNOWN = (KvFormat("bf16", 16, 0), KvFormat("int8", 8, 2), KvFormat("fp8", 8, 0), KvFormat("int4", 4, 2))
KV_FORMATS = {form.name: form for form in _KNOWN}


def parse_kv(text: str) -> KvFormat:
    """A format by name; ConfigError with the known ones if it is none."""
    if text not in KV_FORMATS:
        raise ConfigError(f"keys and values cannot be {text!r}; known: {', '.join(KV_FORMATS)}")
    return KV_FORMATS[text]


@dataclass(frozen=True)
class Kv:
    """Keys and values of some layers: how many of these there are, for how many tokens each, and the bytes."""

    layers: int
    tokens: int
    weight_bytes: int
    scale_bytes: int

    @property
    def nbytes(self) -> int:
        return self.weight_bytes + self.scale_bytes


def kv(cfg: TextConfig, form: KvFormat, context: int, gpus: int = 1) -> tuple[Kv, Kv]:
    """Those of global layers and of local ones, which never hold more than an attention chunk (spec §9)."""
    chunk = min(cfg.attention_chunk_size or context, context)
    local = cfg.num_hidden_layers - len(cfg.global_layers)
    return _kv(cfg, form, len(cfg.global_layers), context, gpus), _kv(cfg, form, local, chunk, gpus)


def _kv(cfg: TextConfig, form: KvFormat, layers: int, tokens: int, gpus: int) -> Kv:
    vectors = 2 * heads(cfg, gpus)[1] * layers * tokens
    return Kv(layers, tokens, vectors * cfg.head_dim * form.bits // 8, vectors * form.scale_bytes)


def kv_bytes_per_token(cfg: TextConfig, form: KvFormat, gpus: int = 1) -> int:
    """What each token adds for good: keys and values of global layers."""
    return _kv(cfg, form, len(cfg.global_layers), 1, gpus).nbytes


def step_tokens(cfg: TextConfig, context: int, asked: int | None) -> int:
    """Tokens of a prompt in one forward pass: an attention chunk, unless another number is asked for."""
    return min(asked or cfg.attention_chunk_size or STEP, context)


def activations(cfg: TextConfig, tokens: int, gpus: int = 1) -> int:
    """Of one forward pass in bf16 with fused attention: what one layer needs at most at a time, and a token's logits.

    x, the normed x and what is added to it, [T, D] each; beside them either q, k, v and what attention gives, or the
    inner states of the feed-forward block: gate, up and their product [T, F] of the shared expert, and of the routed
    one with its input and output [T, D] for each of a token's experts; or those of a dense block.
    """
    (H, G), k = heads(cfg, gpus), cfg.num_experts_per_tok
    D, layers = cfg.hidden_size, range(cfg.num_hidden_layers)
    attention = (2 * H + 2 * G) * cfg.head_dim
    F, wide = share(cfg.intermediate_size, gpus), share(cfg.intermediate_size_mlp, gpus)
    experts = 3 * F + k * (3 * F + 2 * D) if any(map(cfg.is_moe, layers)) else 0
    dense = 0 if all(map(cfg.is_moe, layers)) else 3 * wide
    return 2 * tokens * (3 * D + max(attention, experts, dense)) + 4 * share(cfg.vocab_size, gpus)
