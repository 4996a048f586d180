"""Floating point operations of a forward pass: two for each multiplication of a matrix product that counts.

Norms, softmax, rotations and activation functions are not counted, as in PyTorch's FlopCounterMode.
"""

from dataclasses import dataclass, fields, replace

from herd.config import TextConfig, VisionConfig


@dataclass(frozen=True)
class Flops:
    """By part. attention: queries with keys and weights with values; projections: q, k, v and o."""

    projections: int = 0
    attention: int = 0
    router: int = 0
    routed_experts: int = 0
    shared_experts: int = 0
    dense: int = 0
    head: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, part.name) for part in fields(self))


def flops_per_token(cfg: TextConfig, context: int, *, head: bool = True) -> Flops:
    """One token that sees `context` tokens in global layers, itself included, and in local ones at most a chunk of
    them. head: its logits, too."""
    return _flops(cfg, 1, context, min(context, cfg.attention_chunk_size or context), int(head))


def flops_of_prompt(cfg: TextConfig, tokens: int) -> Flops:
    """A prompt from position 0 on, each token of which sees those before it and itself, with the logits of the last."""
    chunk = min(cfg.attention_chunk_size or tokens, tokens)
    chunks, rest = divmod(tokens, chunk)
    return _flops(cfg, tokens, _causal(tokens), chunks * _causal(chunk) + _causal(rest), 1)


def flops_of_reading(cfg: TextConfig, tokens: int) -> Flops:
    """As `flops_of_prompt` to the keys and values of the last global layer, where Herd stops when it reads a context.

    With one global layer no token sees those of other chunks, and so this grows with the tokens, not their square.
    """
    chunk = min(cfg.attention_chunk_size or tokens, tokens)
    chunks, rest = divmod(tokens, chunk)
    last = cfg.global_layers[-1] if cfg.global_layers else cfg.num_hidden_layers - 1
    below = _flops(cfg, tokens, _causal(tokens), chunks * _causal(chunk) + _causal(rest), 0, last)
    kv = tokens * 4 * cfg.hidden_size * cfg.num_key_value_heads * cfg.head_dim
    return replace(below, projections=below.projections + kv)


def flops_per_tile(cfg: VisionConfig, hidden_size: int) -> int:
    """Encoder, adapter and projector over one tile of an image."""
    D, F, patches, S = cfg.hidden_size, cfg.intermediate_size, cfg.grid**2, cfg.grid**2 + 1
    block = S * (4 * D * D + 2 * D * F) + 2 * S * S * D
    embed = patches * cfg.num_channels * cfg.patch_size**2 * D
    adapter = D * cfg.shuffled * cfg.projector_input_dim + cfg.projector_input_dim * cfg.projector_output_dim
    after = cfg.tokens_per_tile * (adapter + cfg.vision_output_dim * hidden_size)
    return 2 * (embed + cfg.num_hidden_layers * block + after)


def _causal(tokens: int) -> int:
    """Pairs of a token and one that it sees."""
    return tokens * (tokens + 1) // 2


def _flops(
    cfg: TextConfig, tokens: int, global_pairs: int, local_pairs: int, logits: int, count: int | None = None
) -> Flops:
    """count: only the lowest of the layers."""
    D, H, G, d = cfg.hidden_size, cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
    layers = range(cfg.num_hidden_layers if count is None else count)
    moe, local = sum(map(cfg.is_moe, layers)), sum(map(cfg.is_local, layers))
    pairs = local * local_pairs + (len(layers) - local) * global_pairs
    expert = 6 * D * cfg.intermediate_size
    return Flops(
        projections=tokens * len(layers) * 4 * D * d * (H + G),
        attention=pairs * 4 * H * d,
        router=tokens * moe * 2 * D * cfg.num_local_experts,
        routed_experts=tokens * moe * cfg.num_experts_per_tok * expert,
        shared_experts=tokens * moe * expert,
        dense=tokens * (len(layers) - moe) * 6 * D * cfg.intermediate_size_mlp,
        head=logits * 2 * D * cfg.vocab_size,
    )
