"""A tiny multimodal Llama 4 of transformers, with random weights, and the same in other people's formats.

Its sizes are such that all formats can express it, also cut into eight shards: widths are by Meta's formula.
"""

import io
import json
from pathlib import Path

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import Llama4Config, Llama4ForConditionalGeneration

V, D, HEADS, KV, HEAD, EXPERTS, F, DENSE, LAYERS = 512, 64, 16, 8, 4, 4, 128, 224, 4
SCALING = {"factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0, "original_max_position_embeddings": 8192}
TEXT = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "intermediate_size_mlp": DENSE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "head_dim": HEAD,
    "num_local_experts": EXPERTS,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": 8192,
    "max_position_embeddings": 10485760,
    "rope_parameters": {"rope_theta": 5e7, "rope_type": "llama3", **SCALING},
    "bos_token_id": 500,
    "eos_token_id": [501],
    "pad_token_id": 502,
}
VISION = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "image_size": 28,
    "patch_size": 7,
    "vision_output_dim": 32,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
}
PARAMS = {
    "dim": D,
    "n_layers": LAYERS,
    "n_heads": HEADS,
    "n_kv_heads": KV,
    "multiple_of": 32,
    "ffn_dim_multiplier": 1.2,
    "ffn_exp": 4.0,
    "norm_eps": 1e-5,
    "attention_chunk_size": 8192,
    "rope_theta": 5e7,
    "use_scaled_rope": True,
    "nope_layer_interval": 4,
    "use_qk_norm": True,
    "moe_args": {"num_experts": EXPERTS, "interleave_moe_layer_step": 2, "capacity_factor": 1.0, "top_k": 1},
}
VISION_ARGS = {
    "image_size": {"height": 28, "width": 28},
    "patch_size": {"height": 7, "width": 7},
    "dim": 64,
    "n_layers": 2,
    "n_heads": 4,
    "mlp_ratio": 4.0,
    "output_dim": 32,
    "pixel_shuffle_ratio": 0.5,
}
IDS = torch.tensor([[5, 4, 9, 7, 340, 33, 2, 1, 120, 9]])


def tiny_llama4(dtype: torch.dtype = torch.bfloat16, **changes) -> Llama4ForConditionalGeneration:
    """Every weight random, norms and biases included."""
    model = Llama4ForConditionalGeneration(Llama4Config(text_config={**TEXT, **changes}, vision_config=VISION)).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            parameter.data = parameter.data.to(dtype)  # unlike model.to, this leaves the angles of RoPE alone
    return model


def tensors(folder: Path) -> dict[str, Tensor]:
    """All of a single-file folder by Herd's names."""
    from safetensors.torch import load_file

    return {n.removeprefix("language_model."): t for n, t in load_file(folder / "model.safetensors").items()}


def write_tokenizer(folder: Path, size: int = V) -> None:
    """One token for each byte, one merge, and special tokens that fill the vocabulary."""
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "aa"]
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[("a", "a")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([f"<|{i}|>" for i in range(len(alphabet), size)])
    core.save(str(folder / "tokenizer.json"))


def write_meta(weights: dict[str, Tensor], folder: Path, shards: int, *, nested: bool = False) -> Path:
    """The layout of Meta's releases (spec §6.2), with what they hold beside weights."""
    folder.mkdir()
    params = {**PARAMS, "vision_args": VISION_ARGS}
    (folder / "params.json").write_text(json.dumps({"model": params} if nested else params))
    for rank in range(shards):
        shard = meta_shard(weights, rank, shards)
        shard["rope.freqs"] = torch.ones(HEAD // 2)
        for layer in range(LAYERS):
            shard[f"layers.{layer}.attention.wo._extra_state"] = io.BytesIO(b"state")
            if layer % 2:
                shard[f"layers.{layer}.feed_forward.running_gate_stats_3E"] = torch.ones(3, EXPERTS)
                shard[f"layers.{layer}.feed_forward.global_gate_stats_3E"] = torch.ones(3, EXPERTS)
                shard[f"layers.{layer}.feed_forward.experts.expert_activation_DE"] = torch.ones(D, EXPERTS)
        torch.save(shard, folder / f"consolidated.{rank:02}.pth")
    return folder


def meta_shard(weights: dict[str, Tensor], rank: int, shards: int) -> dict[str, object]:
    """What GPU `rank` of `shards` holds."""

    def cut(value: Tensor, dim: int) -> Tensor:
        return value.chunk(shards, dim)[rank].contiguous().clone()

    w, out = weights, dict[str, object]()
    out["tok_embeddings.weight"] = cut(w["model.embed_tokens.weight"], 0)
    out["output.weight"] = cut(w["lm_head.weight"], 0)
    out["norm.weight"] = w["model.norm.weight"].clone()
    for i in range(LAYERS):
        a, b = f"model.layers.{i}.", f"layers.{i}."
        out[f"{b}attention.wqkv.weight"] = torch.cat([cut(w[f"{a}self_attn.{x}_proj.weight"], 0) for x in "qkv"])
        out[f"{b}attention.wqkv.layer_norm_weight"] = w[f"{a}input_layernorm.weight"].clone()
        out[f"{b}attention.wo.weight"] = cut(w[f"{a}self_attn.o_proj.weight"], 1)
        norm, mlp = w[f"{a}post_attention_layernorm.weight"].clone(), f"{a}feed_forward."
        if i % 2 == 0:
            out[f"{b}feed_forward.mlp.layer_norm_weight"] = norm
            halves = [cut(w[f"{mlp}{x}_proj.weight"], 0) for x in ("gate", "up")]
            out[f"{b}feed_forward.mlp.fc1_weight"] = torch.cat(halves)
            out[f"{b}feed_forward.mlp.fc2_weight"] = cut(w[f"{mlp}down_proj.weight"], 1)
            continue
        out[f"{b}feed_forward.norm.weight"] = norm
        out[f"{b}feed_forward.router_DE"] = w[f"{mlp}router.weight"].T.contiguous().clone()
        gate, up = w[f"{mlp}experts.gate_up_proj"].chunk(2, -1)
        out[f"{b}feed_forward.experts.moe_w_in_eD_F"] = cut(gate, 2).flatten(0, 1)
        out[f"{b}feed_forward.experts.moe_w_swiglu_eD_F"] = cut(up, 2).flatten(0, 1)
        out[f"{b}feed_forward.experts.moe_w_out_eF_D"] = cut(w[f"{mlp}experts.down_proj"], 1).flatten(0, 1)
        for theirs, ours, dim in (
            ("w_in_shared_FD", "gate", 0),
            ("w_swiglu_FD", "up", 0),
            ("w_out_shared_DF", "down", 1),
        ):
            out[f"{b}feed_forward.{theirs}.weight"] = cut(w[f"{mlp}shared_expert.{ours}_proj.weight"], dim)
    return out | _meta_vision(w, cut)


def _meta_vision(w: dict[str, Tensor], cut) -> dict[str, object]:
    encoder, ours = "vision_embeddings.vision_encoder.", "vision_model."
    adapter = "vision_embeddings.vision_adapter.mlp."
    out: dict[str, object] = {"vision_projection.weight": cut(w["multi_modal_projector.linear_1.weight"], 0)}
    out[f"{adapter}c_fc.weight"] = cut(w[f"{ours}vision_adapter.mlp.fc1.weight"], 0)
    out[f"{adapter}c_proj.weight"] = cut(w[f"{ours}vision_adapter.mlp.fc2.weight"], 1)
    out[f"{encoder}conv1._linear.weight"] = cut(w[f"{ours}patch_embedding.linear.weight"], 0)
    for name in ("class_embedding", "positional_embedding_vlm"):
        out[encoder + name] = w[ours + name].clone()
    for part in ("weight", "bias"):
        out[f"{encoder}ln_pre.{part}"] = w[f"{ours}layernorm_pre.{part}"].clone()
        out[f"{encoder}ln_post.{part}"] = w[f"{ours}layernorm_post.{part}"].clone()
    for i in range(VISION["num_hidden_layers"]):
        a, b = f"{ours}model.layers.{i}.", f"{encoder}transformer.resblocks.{i}."
        for part in ("weight", "bias"):
            for x in "qkv":
                out[f"{b}attn.w{x}.{part}"] = cut(w[f"{a}self_attn.{x}_proj.{part}"], 0)
            out[f"{b}mlp.c_fc.{part}"] = cut(w[f"{a}mlp.fc1.{part}"], 0)
            out[f"{b}ln_1.{part}"] = w[f"{a}input_layernorm.{part}"].clone()
            out[f"{b}ln_2.{part}"] = w[f"{a}post_attention_layernorm.{part}"].clone()
        for theirs, name in (("attn.wo", "self_attn.o_proj"), ("mlp.c_proj", "mlp.fc2")):
            out[f"{b}{theirs}.weight"] = cut(w[f"{a}{name}.weight"], 1)
            out[f"{b}{theirs}.bias"] = w[f"{a}{name}.bias"].clone()
    return out


def write_gguf(weights: dict[str, Tensor], path: Path, kind: str = "BF16", **settings) -> Path:
    """The text model as llama.cpp's converter writes it, by the gguf library's own table of names."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA4, LAYERS)
    writer = gguf.GGUFWriter(path, "llama4")
    writer.add_block_count(LAYERS)
    writer.add_context_length(10485760)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(DENSE)
    writer.add_expert_feed_forward_length(F)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5e7)
    writer.add_rope_dimension_count(HEAD)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(1)
    writer.add_interleave_moe_layer_step(2)
    writer.add_vocab_size(V)
    for name, value in settings.items():
        writer.add_uint32(f"llama4.{name.replace('__', '.')}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "aa"]
    writer.add_token_list([*alphabet, *(f"<|{i}|>" for i in range(len(alphabet), V))])
    writer.add_token_types([1] * len(alphabet) + [3] * (V - len(alphabet)))
    writer.add_token_merges(["a a"])
    writer.add_bos_token_id(500)
    writer.add_eos_token_id(501)
    writer.add_pad_token_id(502)
    wavelengths = 2 * np.pi * 5e7 ** (np.arange(HEAD // 2) / (HEAD // 2))
    writer.add_tensor("rope_freqs.weight", np.where(wavelengths < 8192, 1, 16).astype(np.float32))
    for name, value in weights.items():
        if name.startswith(("vision_model", "multi_modal")):
            continue
        stem = name.removesuffix(".weight")
        if name.endswith("gate_up_proj"):
            parts = zip((stem.replace("gate_up", x) for x in ("gate", "up")), value.chunk(2, -1), strict=True)
            parts = [(one, half.transpose(1, 2)) for one, half in parts]
        else:
            parts = [(stem, value.transpose(1, 2) if stem.endswith("experts.down_proj") else value)]
        for one, part in parts:
            _add(writer, f"{names.get_name(one)}.weight", part, kind)
    _finish(writer)
    return path


def write_mmproj(weights: dict[str, Tensor], path: Path, kind: str = "BF16") -> Path:
    """The image encoder, by the gguf library's own table of names."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, 8)
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(gguf.VisionProjectorType.LLAMA4)
    writer.add_vision_projection_dim(D)
    writer.add_vision_image_size(28)
    writer.add_vision_patch_size(7)
    writer.add_vision_embedding_length(64)
    writer.add_vision_feed_forward_length(256)
    writer.add_vision_block_count(2)
    writer.add_vision_head_count(4)
    writer.add_vision_attention_layernorm_eps(1e-5)
    writer.add_vision_projector_scale_factor(2)
    writer.add_vision_use_gelu(True)
    for name, value in weights.items():
        if name == "multi_modal_projector.linear_1.weight":  # llama.cpp's converter names it so by itself
            _add(writer, f"{gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.V_MMPROJ_FC]}.weight", value, kind)
        elif name.startswith("vision_model"):
            suffix = name.rpartition(".")[2] if name.endswith((".weight", ".bias")) else ""
            found = names.get_name(name, try_suffixes=(".weight", ".bias"))
            assert found, name
            ends = "positional" in name
            _add(writer, found + (".weight" if ends else ""), value, "F32" if not suffix else kind)
    _finish(writer)
    return path


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: gguf.GGUFWriter, name: str, tensor: Tensor, kind: str) -> None:
    small = tensor.ndim == 1 or "ffn_gate_inp" in name
    wanted = gguf.GGMLQuantizationType["F32" if small else kind]
    array = np.ascontiguousarray(tensor.float().numpy())
    writer.add_tensor(name, gguf.quants.quantize(array, wanted), raw_dtype=wanted)
