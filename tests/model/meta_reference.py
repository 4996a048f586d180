"""Meta's own Llama 4 model (llama-models 0.3.0, a test dependency) in one process, with our weights.

Meta's code is written for many GPUs: fairscale's parallel layers are replaced by their single-process meaning while it
is imported, and `.cuda()` by nothing while it is built.

What it holds for: one forward of more than one token from position 0, of any length. Later forwards are only right
while everything fits one chunk and a single token is given (spec §2.4): it builds its masks without the start position.
It cannot express: MoE layers or RoPE layers as lists, a tied head, heads whose widths do not add up to hidden_size,
rope scaling with another low factor or original length than 1 and 8192, FFN widths other than by its own formula.
"""

import functools
import importlib
import importlib.metadata
import sys
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from herd.config import TextConfig, VisionConfig

VERSION = "0.3.0"


class _Linear(nn.Linear):
    """fairscale's column- and row-parallel linear layers for one process."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True, **_: Any) -> None:
        super().__init__(inputs, outputs, bias=bias)


class _Embedding(nn.Embedding):
    def __init__(self, rows: int, width: int, **_: Any) -> None:
        super().__init__(rows, width)


def _stand_ins() -> dict[str, ModuleType]:
    root = "fairscale.nn.model_parallel"
    modules = {name: ModuleType(name) for name in ("fairscale", "fairscale.nn", root)}
    contents: dict[str, dict[str, Any]] = {
        "initialize": {"get_model_parallel_world_size": lambda: 1},
        "layers": {"ColumnParallelLinear": _Linear, "RowParallelLinear": _Linear, "VocabParallelEmbedding": _Embedding},
        "mappings": {"reduce_from_model_parallel_region": lambda x: x},
    }
    for name, values in contents.items():
        module = ModuleType(f"{root}.{name}")
        module.__dict__.update(values)
        setattr(modules[root], name, module)
        modules[module.__name__] = module
    return modules


@functools.cache
def load() -> ModuleType:
    """The module llama_models.llama4.model. Fails, never skips, if the package is missing or another version."""
    fix = f"pip install --no-deps llama-models=={VERSION}"
    try:
        found = importlib.metadata.version("llama-models")
    except importlib.metadata.PackageNotFoundError:
        raise AssertionError(f"Meta's reference is not installed: {fix}") from None
    assert found == VERSION, f"Meta's reference is {found}: {fix}"
    stand_ins = _stand_ins()
    sys.modules.update(stand_ins)
    try:
        importlib.import_module("llama_models.llama4.vision.embedding")
        return importlib.import_module("llama_models.llama4.model")
    finally:
        for name in stand_ins:
            del sys.modules[name]


def arguments(cfg: TextConfig, max_length: int) -> dict[str, Any]:
    """Meta's ModelArgs for a config it can express."""
    assert cfg.head_dim * cfg.num_attention_heads == cfg.hidden_size
    assert cfg.moe_layers is None and cfg.no_rope_layers is None and not cfg.tie_word_embeddings
    scaling = cfg.rope_scaling
    if scaling:
        assert (scaling.low_freq_factor, scaling.original_max_position_embeddings) == (1, 8192)
    moe = {
        "num_experts": cfg.num_local_experts,
        "top_k": cfg.num_experts_per_tok,
        "interleave_moe_layer_step": cfg.interleave_moe_layer_step,
    }
    return {
        "dim": cfg.hidden_size,
        "n_layers": cfg.num_hidden_layers,
        "n_heads": cfg.num_attention_heads,
        "n_kv_heads": cfg.num_key_value_heads,
        "vocab_size": cfg.vocab_size,
        "multiple_of": 8,
        "ffn_dim_multiplier": 1.0,
        "ffn_exp": 4.0,
        "norm_eps": cfg.rms_norm_eps,
        "attention_chunk_size": cfg.attention_chunk_size,
        "rope_theta": cfg.rope_theta,
        "use_scaled_rope": scaling is not None,
        "rope_scaling_factor": scaling and scaling.factor,
        "rope_high_freq_factor": scaling and scaling.high_freq_factor,
        "nope_layer_interval": cfg.nope_layer_interval,
        "use_qk_norm": cfg.use_qk_norm,
        "attn_temperature_tuning": cfg.attn_temperature_tuning,
        "floor_scale": cfg.floor_scale,
        "attn_scale": cfg.attn_scale,
        "moe_args": moe if cfg.num_local_experts else None,
        "max_batch_size": 2,
        "max_seq_len": max_length,
    }


_NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.layers": "layers",
    "model.norm": "norm",
    "lm_head": "output",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "experts.down_proj": "experts.w2",
    "gate_proj": "w1",
    "up_proj": "w3",
    "down_proj": "w2",
}
_VISION_NAMES = {
    "vision_model.vision_adapter": "vision_embeddings.vision_adapter",
    "vision_adapter.mlp.fc1": "vision_adapter.mlp.c_fc",
    "vision_adapter.mlp.fc2": "vision_adapter.mlp.c_proj",
    "vision_model": "vision_embeddings.vision_encoder",
    "patch_embedding.linear": "conv1._linear",
    "model.layers": "transformer.resblocks",
    "self_attn.q_proj": "attn.wq",
    "self_attn.k_proj": "attn.wk",
    "self_attn.v_proj": "attn.wv",
    "self_attn.o_proj": "attn.wo",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "layernorm_pre": "ln_pre",
    "layernorm_post": "ln_post",
    "multi_modal_projector.linear_1": "vision_projection",
}


def vision_arguments(cfg: VisionConfig) -> dict[str, Any]:
    """Meta's VisionArgs for a config it can express."""
    assert cfg.rope_theta == 10000 and cfg.norm_eps == 1e-5
    return {
        "image_size": {"height": cfg.image_size, "width": cfg.image_size},
        "patch_size": {"height": cfg.patch_size, "width": cfg.patch_size},
        "dim": cfg.hidden_size,
        "n_layers": cfg.num_hidden_layers,
        "n_heads": cfg.num_attention_heads,
        "mlp_ratio": cfg.intermediate_size / cfg.hidden_size,
        "output_dim": cfg.vision_output_dim,
        "pixel_shuffle_ratio": cfg.pixel_shuffle_ratio,
    }


def convert(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under Meta's names and in Meta's layouts (spec §3.2)."""
    converted = {}
    for name, weight in weights.items():
        if name.endswith("experts.gate_up_proj"):
            prefix = _rename(name.removesuffix("gate_up_proj"))
            converted[prefix + "w1"], converted[prefix + "w3"] = weight.chunk(2, dim=-1)
        elif name.endswith("router.weight"):
            converted[_rename(name.removesuffix("router.weight")) + "router_DE"] = weight.T
        else:
            converted[_rename(name)] = weight
    return converted


def _rename(name: str) -> str:
    vision = name.startswith(("vision_model", "multi_modal_projector"))
    for ours, theirs in (_VISION_NAMES if vision else _NAMES).items():
        name = name.replace(ours, theirs)
    return name


# Pixels of each image, for each row of a batch, and where the rows have patches.
Images = tuple[Tensor, list[list[Tensor]]]


class Reference:
    """Meta's transformer with our weights; with `vision`, those of an image encoder are among them."""

    def __init__(
        self, cfg: TextConfig, weights: dict[str, Tensor], max_length: int, vision: VisionConfig | None = None
    ) -> None:
        self._module = load()
        args = arguments(cfg, max_length) | ({"vision_args": vision_arguments(vision)} if vision else {})
        with mock.patch.object(torch.Tensor, "cuda", lambda tensor: tensor):
            self._model = self._module.Transformer(self._module.ModelArgs(**args)).eval()
        self._model.float()  # the encoder would be in bfloat16
        self._model.load_state_dict(convert(weights), strict=True)

    def __call__(self, ids_BT: Tensor, start: int = 0, images: Images | None = None) -> Tensor:
        """Logits [B, T, V] of tokens that stand at start, start + 1, ..."""
        embedding = None
        if images is not None:
            mask, pixels = images
            rows = self._model.vision_embeddings(pixels, mask.unsqueeze(-1), self._like(ids_BT))
            embedding = types().MaskedEmbedding(rows, mask.unsqueeze(-1))
        given = self._module.TransformerInput(tokens=ids_BT, tokens_position=start, image_embedding=embedding)
        return self._model(given).logits

    def features(self, mask_BT: Tensor, pixels: list[list[Tensor]]) -> Tensor:
        """What takes the places of all patches, [N, D]."""
        rows = self._model.vision_embeddings(pixels, mask_BT.unsqueeze(-1), self._like(mask_BT.long()))
        return self._model.vision_projection(rows)[mask_BT]

    def _like(self, ids_BT: Tensor) -> Tensor:
        width = self._model.args.vision_args.output_dim
        return torch.zeros(*ids_BT.shape, width)


def types() -> ModuleType:
    """The module of Meta's inputs."""
    return importlib.import_module("llama_models.llama4.datatypes")
