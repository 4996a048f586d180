"""Configuration of a Llama 4 in GGUF metadata (spec §6.3).

llama.cpp has no keys for much of it: chunks of 8192, every fourth layer global, temperature, and QK-norm unless there
are 128 experts are fixed in its code. A sliding window of 0 means no chunked or global layers, and no temperature.
"""

import math
from collections.abc import Sequence

from herd.checkpoint.gguf_file import GgufFile
from herd.checkpoint.shapes import MAX_LAYERS
from herd.config import RopeScaling, TextConfig, VisionConfig
from herd.errors import CheckpointError

ARCHITECTURE, VISION_ARCHITECTURE, PROJECTOR = "llama4", "clip", "llama4"
CHUNK, INTERVAL, FLOOR, SCALE = 8192, 4, 8192, 0.1
EXPERTS_WITHOUT_QK_NORM = 128
ROPE_FACTORS = "rope_freqs.weight"


def read_text_config(file: GgufFile) -> TextConfig:
    """CheckpointError if the file holds another architecture, or one that Herd's Llama 4 has not."""
    architecture = file.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise CheckpointError(f"{file.path} holds a {architecture!r} model; expected {ARCHITECTURE!r}")

    def whole(name: str, default: int | None = None) -> int:
        return file.whole(f"llama4.{name}", default)

    layers, heads, hidden = (whole(n) for n in ("block_count", "attention.head_count", "embedding_length"))
    if not 0 < layers <= MAX_LAYERS or heads < 1:
        raise CheckpointError(
            f"{file.path} has {layers} layers and {heads} heads; there must be some, and not too many"
        )
    head_dim, full = whole("attention.key_length", hidden // heads), whole("attention.sliding_window", CHUNK) == 0
    for name, wanted in (("attention.value_length", head_dim), ("rope.dimension_count", head_dim)):
        if whole(name, wanted) != wanted:
            raise CheckpointError(f"{file.path} has {name} {whole(name)}; of Llama 4 it is the head size {head_dim}")
    if (pattern := file.get("llama4.attention.sliding_window_pattern", INTERVAL)) != INTERVAL:
        raise CheckpointError(f"{file.path} has sliding_window_pattern {pattern}; of Llama 4 it is {INTERVAL}")
    if (kind := file.get("llama4.rope.scaling.type", "none")) != "none":
        raise CheckpointError(f"{file.path} scales RoPE by {kind!r}; Llama 4 has only {ROPE_FACTORS}")
    theta, experts = file.number("llama4.rope.freq_base", 500000.0), whole("expert_count", 0)
    scaling = None
    if ROPE_FACTORS in file.tensors:
        scaling = scaling_of(file.values(ROPE_FACTORS).flatten().tolist(), theta)
        if scaling is None:
            raise CheckpointError(f"{file.path} scales RoPE by factors that are not the llama3 rule")
    eos = [file.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return TextConfig(
        vocab_size=file.shape("token_embd.weight")[0],
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=whole("attention.head_count_kv", heads),
        head_dim=head_dim,
        intermediate_size=whole("expert_feed_forward_length", 0),
        intermediate_size_mlp=whole("feed_forward_length", 0),
        num_local_experts=experts,
        num_experts_per_tok=whole("expert_used_count", 1),
        max_position_embeddings=whole("context_length"),
        interleave_moe_layer_step=whole("interleave_moe_layer_step", 1),
        nope_layer_interval=None if full else INTERVAL,
        attention_chunk_size=None if full else CHUNK,
        rope_theta=theta,
        rope_scaling=scaling,
        use_qk_norm=experts != EXPERTS_WITHOUT_QK_NORM,
        rms_norm_eps=file.number("llama4.attention.layer_norm_rms_epsilon"),
        attn_temperature_tuning=not full,
        floor_scale=FLOOR,
        attn_scale=SCALE,
        tie_word_embeddings="output.weight" not in file.tensors,
        bos_token_id=file.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=tuple(dict.fromkeys(i for i in eos if isinstance(i, int))),
        pad_token_id=file.get("tokenizer.ggml.padding_token_id"),
    )


def read_vision_config(file: GgufFile) -> VisionConfig:
    """Of an `mmproj` file. CheckpointError if it is for another model."""
    if file.get("clip.projector_type", file.get("clip.vision.projector_type")) != PROJECTOR:
        raise CheckpointError(f"{file.path} holds another projector than Llama 4's")

    def whole(name: str) -> int:
        return file.whole(f"clip.vision.{name}")

    scale = whole("projector.scale_factor")
    if scale < 1:
        raise CheckpointError(f"{file.path} has scale_factor {scale}; it must be at least 1")
    out = file.shape("mm.model.mlp.2.weight")[0]
    return VisionConfig(
        hidden_size=whole("embedding_length"),
        num_hidden_layers=whole("block_count"),
        num_attention_heads=whole("attention.head_count"),
        intermediate_size=whole("feed_forward_length"),
        image_size=whole("image_size"),
        patch_size=whole("patch_size"),
        norm_eps=file.number("clip.vision.attention.layer_norm_epsilon"),
        pixel_shuffle_ratio=1 / scale,
        vision_output_dim=out,
        projector_input_dim=out,
        projector_output_dim=out,
    )


def scaling_of(factors: Sequence[float], theta: float) -> RopeScaling | None:
    """The llama3 rule that gives these divisors per channel pair, or None: GGUF files store only the divisors.

    Rules that were released: low 1, high 4 or 1, original length 8192. Without a blend (high 1) other lengths are
    found, too: any that lies between the last pair that is kept and the first that is not says the same.
    """
    if not factors or not all(math.isfinite(factor) and factor > 0 for factor in factors):
        return None
    changed = [i for i, factor in enumerate(factors) if factor != 1]
    rules = [RopeScaling(max(factors), 1.0, high, 8192) for high in (1.0, 4.0)]
    rules += [
        RopeScaling(max(factors), 1.0, 1.0, max(int(_wavelength(i, len(factors), theta)), 1)) for i in changed[:1]
    ]
    for rule in rules:
        wanted = divisors(rule, theta, len(factors))
        if all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(factors, wanted, strict=True)):
            return rule
    return None


def divisors(rule: RopeScaling, theta: float, pairs: int) -> list[float]:
    """What the rule divides the frequency of each channel pair by (spec §2.2)."""
    low, high, found = rule.low_freq_factor, rule.high_freq_factor, list[float]()
    for i in range(pairs):
        turns = rule.original_max_position_embeddings / _wavelength(i, pairs, theta)
        keep = float(turns > low) if high == low else min(max((turns - low) / (high - low), 0.0), 1.0)
        found.append(1 / (keep + (1 - keep) / rule.factor))
    return found


def _wavelength(pair: int, pairs: int, theta: float) -> float:
    return 2 * math.pi * theta ** (pair / pairs)
