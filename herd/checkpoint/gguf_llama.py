"""A dense Llama in a GGUF file as a source of weights: dequantised, renamed, rows in Hugging Face's order."""

from pathlib import Path

from torch import Tensor

from herd.checkpoint.gguf_config import ROPE_FACTORS, scaling_of
from herd.checkpoint.gguf_file import GgufFile
from herd.checkpoint.gguf_tokenizer import tokenizer_files
from herd.checkpoint.llama import LlamaConfig, LlamaSource
from herd.errors import CheckpointError

_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def read_gguf(path: Path) -> LlamaSource:
    """A GGUF file of architecture `llama`; tensors come dequantised, float16 and bfloat16 as stored.

    CheckpointError if the file is damaged, of another architecture, or its tensors do not fit its config.
    """
    file = GgufFile(path)
    config, tensors = _config(file), file.tensors
    shapes = config.shapes()
    if missing := sorted(gg for gg in map(_gguf_name, shapes) if gg not in tensors):
        raise CheckpointError(f"{path} lacks {len(missing)} tensors, first {missing[0]}")
    if extra := sorted(tensors.keys() - set(map(_gguf_name, shapes)) - {"rope_freqs.weight"}):
        raise CheckpointError(f"{path} has {len(extra)} tensors a dense Llama does not have, first {extra[0]}")
    for name, shape in shapes.items():
        stored = file.shape(_gguf_name(name))
        if stored != shape:
            raise CheckpointError(f"{path}: {_gguf_name(name)} has shape {list(stored)}, expected {list(shape)}")

    def tensor(name: str) -> Tensor:
        value = file.values(_gguf_name(name))
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        # llama.cpp stores the rows of q and k as interleaved pairs; Hugging Face wants halves.
        return value if heads is None else pairs_to_halves(value, heads)

    return LlamaSource(config, tensor, tokenizer_files(file))


def pairs_to_halves(w: Tensor, heads: int) -> Tensor:
    """Rows of each head from interleaved pairs (0, d/2, 1, d/2 + 1, ...) to halves (0, 1, ..., d - 1)."""
    return w.view(heads, -1, 2, w.shape[-1]).transpose(1, 2).reshape(w.shape)


def _gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in _TOP:
        return f"{_TOP[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{_NAMES[part]}.weight"


def _config(file: GgufFile) -> LlamaConfig:
    path, architecture = file.path, file.get("general.architecture")
    if architecture != "llama":
        raise CheckpointError(f"{path} holds a {architecture!r} model; upcycling needs architecture 'llama'")
    if file.get("llama.expert_count"):
        raise CheckpointError(f"{path} holds a mixture of experts already; upcycling needs a dense model")

    def whole(name: str, default: int | None = None) -> int:
        return file.whole(f"llama.{name}", default)

    heads, hidden = whole("attention.head_count"), whole("embedding_length")
    head_dim = whole("attention.key_length", hidden // max(heads, 1))
    if whole("rope.dimension_count", head_dim) != head_dim:
        raise CheckpointError(f"{path} rotates only part of each head; that cannot be upcycled")
    if (kind := file.get("llama.rope.scaling.type", "none")) != "none":
        raise CheckpointError(f"{path} scales RoPE by {kind!r}; that cannot be upcycled")
    theta = file.number("llama.rope.freq_base", 10000.0)
    scaling = None
    if ROPE_FACTORS in file.tensors:
        scaling = scaling_of(file.values(ROPE_FACTORS).flatten().tolist(), theta)
        if scaling is None:
            raise CheckpointError(f"{path} scales RoPE by factors that are not the llama3 rule; it cannot be upcycled")
    eos = file.get("tokenizer.ggml.eos_token_id")
    return LlamaConfig(
        vocab_size=file.shape("token_embd.weight")[0],
        hidden_size=hidden,
        intermediate_size=whole("feed_forward_length"),
        num_hidden_layers=whole("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=whole("attention.head_count_kv", heads),
        head_dim=head_dim,
        rms_norm_eps=file.number("llama.attention.layer_norm_rms_epsilon"),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings="output.weight" not in file.tensors,
        bos_token_id=file.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=() if eos is None else (int(eos),),
        pad_token_id=file.get("tokenizer.ggml.padding_token_id"),
    )
