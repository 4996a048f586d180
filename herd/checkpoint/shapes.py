"""Names and shapes of all tensors of a model, as Hugging Face has them (spec §6.1), and which part of it each is.

Shape letters: D hidden, V vocabulary, E experts, F width of an expert or dense layer, P projector.
"""

from typing import Literal

from herd.config import TextConfig, VisionConfig
from herd.errors import CheckpointError

Shapes = dict[str, tuple[int, ...]]
Part = Literal[
    "attention", "routed_experts", "shared_experts", "dense", "embeddings_and_head", "norms_and_router", "vision"
]
VISION_PREFIXES = ("vision_model.", "multi_modal_projector.")
MAX_LAYERS = 4096  # more are taken for damage, before anything is made for each of them
_SIZE_LIMIT = 1 << 48  # values of a tensor; real ones have up to 2^34


def text_shapes(cfg: TextConfig) -> Shapes:
    """Of the text model; without the head if it is tied to the embedding. CheckpointError for absurd sizes."""
    D, V, E = cfg.hidden_size, cfg.vocab_size, cfg.num_local_experts
    q, kv = cfg.num_attention_heads * cfg.head_dim, cfg.num_key_value_heads * cfg.head_dim
    attention: Shapes = {"q_proj": (q, D), "k_proj": (kv, D), "v_proj": (kv, D), "o_proj": (D, q)}
    shapes: Shapes = {"model.embed_tokens.weight": (V, D)}
    for i in range(cfg.num_hidden_layers):
        layer, F = f"model.layers.{i}.", cfg.intermediate_size if cfg.is_moe(i) else cfg.intermediate_size_mlp
        shapes |= {f"{layer}self_attn.{name}.weight": shape for name, shape in attention.items()}
        mlp = f"{layer}feed_forward."
        if cfg.is_moe(i):
            shapes[f"{mlp}router.weight"] = (E, D)
            shapes[f"{mlp}experts.gate_up_proj"] = (E, D, 2 * F)
            shapes[f"{mlp}experts.down_proj"] = (E, F, D)
            mlp += "shared_expert."
        shapes |= {f"{mlp}gate_proj.weight": (F, D), f"{mlp}up_proj.weight": (F, D), f"{mlp}down_proj.weight": (D, F)}
        shapes |= {f"{layer}input_layernorm.weight": (D,), f"{layer}post_attention_layernorm.weight": (D,)}
    shapes["model.norm.weight"] = (D,)
    if not cfg.tie_word_embeddings:
        shapes["lm_head.weight"] = (V, D)
    return _possible(shapes)


def vision_shapes(cfg: VisionConfig, hidden_size: int) -> Shapes:
    """Of the image encoder and the projector into a decoder of this hidden_size. CheckpointError for absurd sizes."""
    if cfg.num_hidden_layers > MAX_LAYERS:
        raise CheckpointError(
            f"the image encoder has {cfg.num_hidden_layers:,} layers; at most {MAX_LAYERS:,} can be read"
        )
    D, F, P = cfg.hidden_size, cfg.intermediate_size, cfg.projector_input_dim
    shapes: Shapes = {
        "patch_embedding.linear.weight": (D, cfg.num_channels * cfg.patch_size**2),
        "class_embedding": (D,),
        "positional_embedding_vlm": (cfg.grid**2 + 1, D),
    }
    norms = ["layernorm_pre", "layernorm_post"]
    for i in range(cfg.num_hidden_layers):
        layer = f"model.layers.{i}."
        for part in "qkvo":
            shapes |= {f"{layer}self_attn.{part}_proj.weight": (D, D), f"{layer}self_attn.{part}_proj.bias": (D,)}
        shapes |= {f"{layer}mlp.fc1.weight": (F, D), f"{layer}mlp.fc1.bias": (F,)}
        shapes |= {f"{layer}mlp.fc2.weight": (D, F), f"{layer}mlp.fc2.bias": (D,)}
        norms += [f"{layer}input_layernorm", f"{layer}post_attention_layernorm"]
    shapes |= {f"{norm}.{part}": (D,) for norm in norms for part in ("weight", "bias")}
    shapes |= {"vision_adapter.mlp.fc1.weight": (P, D * cfg.shuffled)}
    shapes |= {"vision_adapter.mlp.fc2.weight": (cfg.projector_output_dim, P)}
    shapes = {f"vision_model.{name}": shape for name, shape in shapes.items()}
    shapes["multi_modal_projector.linear_1.weight"] = (hidden_size, cfg.vision_output_dim)
    return _possible(shapes)


def part_of(name: str) -> Part:
    """The part of the model that a tensor belongs to."""
    if name.startswith(VISION_PREFIXES):
        return "vision"
    if "norm" in name or name.endswith("router.weight"):
        return "norms_and_router"
    for word, part in _PARTS.items():
        if word in name:
            return part
    return "embeddings_and_head"


_PARTS: dict[str, Part] = {
    ".self_attn.": "attention",
    ".experts.": "routed_experts",
    ".shared_expert.": "shared_experts",
    ".feed_forward.": "dense",
}


def _possible(shapes: Shapes) -> Shapes:
    for name, shape in shapes.items():
        values = 1
        for size in shape:
            values *= size
        if values > _SIZE_LIMIT:
            raise CheckpointError(f"the configuration gives {name} {values:,} values, more than any model has")
    return shapes
