"""What this machine can do at most, measured: bytes read from memory, and operations of a matrix product.

Also what a model needs of both, as its config says.
"""

import torch

from herd.config import TextConfig
from herd.eval.limits import READ_BYTES, ROUNDS, median_seconds, read_bytes_per_s, weights_read

GEMM = 4096


def measure(threads: int, rounds: int = ROUNDS, gemm: int = GEMM, read_bytes: int = READ_BYTES) -> dict[str, float]:
    """Medians: bytes/s of a plain sum over memory, operations/s of products in bfloat16 and int8."""
    torch.set_num_threads(threads)
    half = torch.randn(gemm, gemm).bfloat16()
    whole = torch.randint(-127, 128, (gemm, gemm), dtype=torch.int8)
    operations = 2 * gemm**3
    return {
        "read_bytes_per_s": read_bytes_per_s(rounds, read_bytes),
        "bf16_ops_per_s": operations / median_seconds(lambda: half @ half, rounds),
        "int8_ops_per_s": operations / median_seconds(lambda: torch._int_mm(whole, whole), rounds),
    }


def decode_bytes(cfg: TextConfig, weight_bits: float, kv_bits: float, position: int) -> float:
    """Bytes that one token of one sequence must read: the weights it passes through, the keys and values it sees."""
    per_token = 2 * cfg.num_key_value_heads * cfg.head_dim
    seen = sum(_seen(cfg, layer, position) for layer in range(cfg.num_hidden_layers))
    return (weights_read(cfg) * weight_bits + seen * per_token * kv_bits) / 8


def prefill_operations(cfg: TextConfig, tokens: int) -> float:
    """Multiplications and additions of a prompt, the head for its last token only."""
    ends = 2 * cfg.vocab_size * cfg.hidden_size
    weights = 2 * (cfg.num_parameters(active=True) - ends) * tokens + ends
    pairs = sum(_pairs(cfg, layer, tokens) for layer in range(cfg.num_hidden_layers))
    return weights + 4 * cfg.num_attention_heads * cfg.head_dim * pairs


def _seen(cfg: TextConfig, layer: int, position: int) -> int:
    chunk = cfg.attention_chunk_size
    return (position % chunk if cfg.is_local(layer) and chunk else position) + 1


def _pairs(cfg: TextConfig, layer: int, tokens: int) -> float:
    """Of a query and a key that it sees."""
    chunk = cfg.attention_chunk_size if cfg.is_local(layer) else None
    whole, rest = divmod(tokens, chunk or tokens)
    return whole * (chunk or tokens) ** 2 / 2 + rest**2 / 2
