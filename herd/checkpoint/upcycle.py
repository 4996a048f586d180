"""Turns a dense Llama into a Llama 4 with one global layer, without changing its function.

Every source layer becomes a local layer. In between, one global (NoPE) layer with a mixture of experts is inserted,
and below it, optionally, one more local layer; their outputs start at zero, so that they add nothing until trained.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from herd.checkpoint.files import SHARD_BYTES, ShardWriter, new_folder, write_json
from herd.checkpoint.llama import LlamaSource, read_hf
from herd.config import TextConfig
from herd.errors import CheckpointError

RECIPE_FILE = "upcycle.json"  # in the written folder: the arguments that determine its architecture and new weights
RECIPE_KEYS = {"global_layer", "chunk", "experts", "expert_width", "extra_local", "seed"}
_INIT_STD = 0.02
_MAX_POSITIONS = 10_485_760


def upcycle(
    source: str | Path,
    out: str | Path,
    *,
    global_layer: int,
    chunk: int,
    experts: int = 16,
    expert_width: int = 256,
    extra_local: bool = True,
    chat_template: str | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
) -> TextConfig:
    """Write a Hugging Face Llama 4 folder `out` made from a Llama folder or GGUF file.

    global_layer: number of source layers below the global layer. chunk: attention_chunk_size of the local layers.
    extra_local: insert a new local layer right below the global one. chat_template: replaces the source's.
    dtype: of the written weights; by default as stored, which is float32 for quantised GGUF tensors.
    Texts up to `chunk` tokens give the source's logits. CheckpointError if the source cannot be upcycled.
    """
    # gguf takes long to import, and every command imports this module.
    from herd.checkpoint.gguf_llama import read_gguf

    source, out = Path(source), Path(out)
    origin = read_gguf(source) if source.is_file() else read_hf(source)
    depth = origin.config.num_hidden_layers
    if not 1 <= global_layer <= depth:
        raise CheckpointError(f"global_layer is {global_layer}; the source has {depth} layers, so use 1 to {depth}")
    config = upcycled_config(origin, global_layer, chunk, experts, expert_width, extra_local)
    recipe = {"global_layer": global_layer, "chunk": chunk, "experts": experts, "expert_width": expert_width}
    recipe |= {"extra_local": extra_local, "seed": seed}
    with new_folder(out) as folder:
        writer = ShardWriter(folder, shard_bytes)
        for name, tensor in _tensors(origin, config, global_layer, extra_local, seed):
            writer.add(name, tensor if dtype is None else tensor.to(dtype))
        writer.finish()
        stored = dtype or origin.tensor("model.embed_tokens.weight").dtype
        write_json(folder / "config.json", {**config.to_hf(), "dtype": str(stored).removeprefix("torch.")})
        write_json(folder / RECIPE_FILE, recipe)
        _write_text_files(origin, config, folder, chat_template)
    return config


def upcycled_config(
    origin: LlamaSource, global_layer: int, chunk: int, experts: int, expert_width: int, extra_local: bool
) -> TextConfig:
    """The configuration of the upcycled model. The global layer has index global_layer + extra_local."""
    c = origin.config
    at, layers = global_layer + extra_local, c.num_hidden_layers + 1 + extra_local
    return TextConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads,
        head_dim=c.head_dim,
        intermediate_size=expert_width,
        intermediate_size_mlp=c.intermediate_size,
        num_local_experts=experts,
        num_experts_per_tok=1,
        max_position_embeddings=_MAX_POSITIONS,
        # With at most 2 * at + 1 layers the intervals alone say it (Meta's terms); the lists say it for any depth.
        interleave_moe_layer_step=at + 1,
        moe_layers=(at,),
        nope_layer_interval=at + 1,
        no_rope_layers=tuple(int(i != at) for i in range(layers)),
        attention_chunk_size=chunk,
        rope_theta=c.rope_theta,
        rope_scaling=c.rope_scaling,
        use_qk_norm=False,
        rms_norm_eps=c.rms_norm_eps,
        tie_word_embeddings=c.tie_word_embeddings,
        initializer_range=_INIT_STD,
        bos_token_id=c.bos_token_id,
        eos_token_id=c.eos_token_id,
        pad_token_id=c.pad_token_id,
    )


def halves_to_pairs(w: Tensor, heads: int) -> Tensor:
    """Rows of each head from halves (Llama 1-3 in Hugging Face) to interleaved pairs: 2i <- i, 2i + 1 <- i + d/2."""
    return w.view(heads, 2, -1, w.shape[-1]).transpose(1, 2).reshape(w.shape)


def _tensors(
    origin: LlamaSource, config: TextConfig, global_layer: int, extra_local: bool, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Names and weights of the upcycled model, layer by layer."""
    yield "model.embed_tokens.weight", _read(origin, "model.embed_tokens.weight")
    depth = origin.config.num_hidden_layers
    target = 0
    for layer in range(depth + 1):
        if layer == global_layer:
            if extra_local:
                yield from _local(origin, layer - 1, target, silent=True)
                target += 1
            yield from _global(origin, min(layer, depth - 1), target, config, seed)
            target += 1
        if layer < depth:
            yield from _local(origin, layer, target)
            target += 1
    yield "model.norm.weight", _read(origin, "model.norm.weight")
    if not config.tie_word_embeddings:
        yield "lm_head.weight", _read(origin, "lm_head.weight")


def _local(origin: LlamaSource, layer: int, target: int, *, silent: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Source layer `layer` as local layer `target`; `silent`: with outputs zero, so that it adds nothing."""
    yield from _attention(origin, layer, target, silent)
    for part in ("gate_proj", "up_proj", "down_proj"):
        weight = _read(origin, f"model.layers.{layer}.mlp.{part}.weight")
        yield f"model.layers.{target}.feed_forward.{part}.weight", _zero_if(silent and part == "down_proj", weight)


def _global(
    origin: LlamaSource, layer: int, target: int, config: TextConfig, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """The inserted global layer: attention of source layer `layer` and random experts, outputs zero."""
    yield from _attention(origin, layer, target, silent=True)
    E, D, F = config.num_local_experts, config.hidden_size, config.intermediate_size
    generator = torch.Generator().manual_seed(seed)
    dtype = _read(origin, f"model.layers.{layer}.input_layernorm.weight").dtype

    def random(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * _INIT_STD).to(dtype)

    prefix = f"model.layers.{target}.feed_forward."
    yield prefix + "router.weight", random(E, D)
    yield prefix + "experts.gate_up_proj", random(E, D, 2 * F)
    yield prefix + "experts.down_proj", torch.zeros(E, F, D, dtype=dtype)
    yield prefix + "shared_expert.gate_proj.weight", random(F, D)
    yield prefix + "shared_expert.up_proj.weight", random(F, D)
    yield prefix + "shared_expert.down_proj.weight", torch.zeros(D, F, dtype=dtype)


def _attention(origin: LlamaSource, layer: int, target: int, silent: bool) -> Iterator[tuple[str, Tensor]]:
    for part in ("input_layernorm", "post_attention_layernorm"):
        yield f"model.layers.{target}.{part}.weight", _read(origin, f"model.layers.{layer}.{part}.weight")
    heads = {"q": origin.config.num_attention_heads, "k": origin.config.num_key_value_heads}
    for part in "qkvo":
        weight = _read(origin, f"model.layers.{layer}.self_attn.{part}_proj.weight")
        if part in heads:
            weight = halves_to_pairs(weight, heads[part])
        yield f"model.layers.{target}.self_attn.{part}_proj.weight", _zero_if(silent and part == "o", weight)


def _read(origin: LlamaSource, name: str) -> Tensor:
    tensor = origin.tensor(name)
    if not tensor.isfinite().all():
        raise CheckpointError(f"{name} of the source holds values that are not finite numbers")
    return tensor


def _zero_if(zero: bool, weight: Tensor) -> Tensor:
    return torch.zeros_like(weight) if zero else weight


def _write_text_files(origin: LlamaSource, config: TextConfig, folder: Path, chat_template: str | None) -> None:
    """Tokenizer files, and generation_config.json."""
    files = dict(origin.files)
    if chat_template is not None:
        files.pop("chat_template.jinja", None)
        settings = json.loads(files.get("tokenizer_config.json", b"{}"))
        files["tokenizer_config.json"] = json.dumps({**settings, "chat_template": chat_template}, indent=2).encode()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    ids = {"bos": config.bos_token_id, "eos": list(config.eos_token_id) or None, "pad": config.pad_token_id}
    write_json(folder / "generation_config.json", {f"{k}_token_id": v for k, v in ids.items() if v is not None})
