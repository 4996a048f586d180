"""A checkpoint of any format as GGUF files of architecture llama4 (spec §6.3), part of a tensor in memory at a time.

Shape letters: D hidden, E experts, F expert width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from herd.checkpoint.gguf_config import (
    ARCHITECTURE,
    CHUNK,
    EXPERTS_WITHOUT_QK_NORM,
    FLOOR,
    INTERVAL,
    PROJECTOR,
    ROPE_FACTORS,
    SCALE,
    VISION_ARCHITECTURE,
    divisors,
)
from herd.checkpoint.gguf_names import EXPERTS, to_gguf
from herd.checkpoint.gguf_vocabulary import add_vocabulary
from herd.checkpoint.shapes import VISION_PREFIXES
from herd.checkpoint.streaming import Job, Layout, Piece, Progress
from herd.checkpoint.weights import Weights
from herd.config import TextConfig, VisionConfig
from herd.errors import CheckpointError

Kind = gguf.GGMLQuantizationType
_FILE_TYPES = {
    Kind.F32: gguf.LlamaFileType.ALL_F32,
    Kind.F16: gguf.LlamaFileType.MOSTLY_F16,
    Kind.BF16: gguf.LlamaFileType.MOSTLY_BF16,
    Kind.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
    Kind.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0,
}
_TYPES = {Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}
_QUANTIZED = (Kind.Q8_0, Kind.Q4_0)
_ALIGNMENT = 32
_PART_VALUES = 1 << 22  # that are quantised at a time


@dataclass(frozen=True)
class _Planned:
    """A tensor of the file: its name and shape there, and which part of which of ours it is."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    ours: str
    half: int | None = None

    @property
    def size(self) -> int:
        return int(prod(gguf.quant_shape_to_byte_shape(self.shape, self.kind)))


def write_gguf(
    weights: Weights,
    job: Job,
    files: dict[str, bytes],
    names: list[str],
    kind_name: str,
    progress: Progress | None = None,
) -> None:
    """Write the text model as the last of `names` and, of a multimodal one, the image encoder as the first.

    files: of the tokenizer, by name.
    All matrices are of the kind that llama.cpp calls so. But routers are float32, and the image encoder is bfloat16
    where the text model is quantised. CheckpointError for what llama.cpp's llama4 cannot express, or a width that
    cannot be quantised.
    """
    check_supported(weights.path, weights.text)
    kind = gguf.GGMLQuantizationType[kind_name]
    scratch = job.result / "header"
    text = _Writer(scratch, ARCHITECTURE, weights, kind)
    add_settings(text.writer, weights.text)
    add_vocabulary(text.writer, weights.path, files, weights.text)
    layouts = [text.layout(names[-1], [name for name in weights.names if not name.startswith(VISION_PREFIXES)])]
    if weights.vision is not None:
        images = _Writer(scratch, VISION_ARCHITECTURE, weights, Kind.BF16 if kind in _QUANTIZED else kind)
        _add_vision_settings(images.writer, weights.vision, weights.text.hidden_size)
        layouts.append(images.layout(names[0], [name for name in weights.names if name.startswith(VISION_PREFIXES)]))
    job.write(layouts, progress)


class _Writer:
    """Header of a file by the gguf library, and the content of its tensors."""

    def __init__(self, scratch: Path, architecture: str, weights: Weights, kind: Kind) -> None:
        self.scratch, self.weights, self.kind = scratch, weights, kind
        self.writer = gguf.GGUFWriter(scratch, architecture)
        self.writer.add_file_type(_FILE_TYPES[kind])
        if kind in _QUANTIZED:
            self.writer.add_quantization_version(gguf.GGML_QUANT_VERSION)

    def layout(self, name: str, ours: list[str]) -> Layout:
        planned = [one for our in sorted(ours) for one in self._planned(our)]
        scaling = _divisors(self.weights.text)
        if scaling is not None and self.writer.arch == ARCHITECTURE:
            planned.append(_Planned(ROPE_FACTORS, tuple(scaling.shape), Kind.F32, ROPE_FACTORS))
        for one in planned:
            add_info(self.writer, one.name, one.shape, one.kind)
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_ti_data_to_file()
        self.writer.close()
        header = self.scratch.read_bytes()
        self.scratch.unlink()
        pieces = [Piece(_padded(one.size), partial(self._content, one)) for one in planned]
        return Layout(name, header.ljust(_padded(len(header)), b"\0"), pieces)

    def _planned(self, ours: str) -> Iterator[_Planned]:
        shape = self.weights.shape(ours)
        prefix, _, leaf = ours.rpartition(".")
        if not prefix.endswith(".experts"):
            yield self._one(to_gguf(ours), shape, ours)
            return
        E, inputs, outputs = shape
        layer = f"blk.{prefix.split('.')[2]}"
        if leaf == "down_proj":
            yield self._one(f"{layer}.{EXPERTS[2]}.weight", (E, outputs, inputs), ours)
        else:
            for half, name in enumerate(EXPERTS[:2]):
                yield self._one(f"{layer}.{name}.weight", (E, outputs // 2, inputs), ours, half)

    def _one(self, name: str, shape: tuple[int, ...], ours: str, half: int | None = None) -> _Planned:
        """Norms, routers and what stands for positions stay in 32 bits, as llama.cpp's own converter has it."""
        small = len(shape) == 1 or "ffn_gate_inp" in name or name in ("v.position_embd.weight", "v.patch_embd.weight")
        kind = Kind.F32 if small else self.kind
        block = gguf.GGML_QUANT_SIZES[kind][0]
        if shape[-1] % block:
            raise CheckpointError(f"{ours} has rows of {shape[-1]}; {kind.name} needs multiples of {block}")
        return _Planned(name, shape, kind, ours, half)

    def _content(self, one: _Planned) -> Iterator[Tensor]:
        """The bytes of a tensor in parts, and zeros up to the next one's place."""
        if one.ours == ROPE_FACTORS:
            values = _divisors(self.weights.text)
            assert values is not None
        else:
            values = self.weights.finite(one.ours)
        if one.half is not None:
            values = values.chunk(2, -1)[one.half]
        if one.name.split(".")[-2] in EXPERTS:
            parts: Iterator[Tensor] = (expert.T for expert in values)
        else:
            parts = iter([values])
        for part in parts:
            for rows in part.split(max(1, _PART_VALUES // part.shape[-1])):
                yield _encoded(one, rows)
        yield torch.zeros(_padded(one.size) - one.size, dtype=torch.uint8)


def _encoded(one: _Planned, rows: Tensor) -> Tensor:
    if one.kind in _TYPES:
        value = rows.to(_TYPES[one.kind])
        if not value.isfinite().all():
            raise CheckpointError(f"{one.ours} has values too large for {one.kind.name}; choose bf16 or fp32")
        return value
    array = rows.float().contiguous().numpy()
    return torch.from_numpy(np.ascontiguousarray(gguf.quants.quantize(array, one.kind)))


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _divisors(cfg: TextConfig) -> Tensor | None:
    """What RoPE scaling divides each channel pair's frequency by, float32 [d/2]; None without scaling."""
    scaling = cfg.rope_scaling
    return None if scaling is None else torch.tensor(divisors(scaling, cfg.rope_theta, cfg.head_dim // 2))


def check_supported(path: Path, cfg: TextConfig) -> None:
    """CheckpointError for a configuration that llama.cpp's llama4 would run as another model."""
    layers = range(cfg.num_hidden_layers)
    qk_norm = cfg.num_local_experts != EXPERTS_WITHOUT_QK_NORM
    step = cfg.interleave_moe_layer_step
    wanted = {
        f"attention_chunk_size {CHUNK}": cfg.attention_chunk_size == CHUNK,
        f"every {INTERVAL}th layer global": all(cfg.is_local(i) == bool((i + 1) % INTERVAL) for i in layers),
        "experts": cfg.num_local_experts > 0,
        f"experts in every layer that {step} divides": all(cfg.is_moe(i) == ((i + 1) % step == 0) for i in layers),
        f"QK-norm {'on' if qk_norm else 'off'} with {cfg.num_local_experts} experts": cfg.use_qk_norm == qk_norm,
        f"temperature on, by {FLOOR} and {SCALE}": cfg.attn_temperature_tuning
        and (cfg.floor_scale, cfg.attn_scale) == (FLOOR, SCALE),
    }
    if lost := [what for what, holds in wanted.items() if not holds]:
        raise CheckpointError(f"{path} cannot be a GGUF file: llama.cpp's llama4 always has {'; '.join(lost)}")


def add_info(writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], kind: Kind) -> None:
    """Announce a tensor. They are all announced before the first is written."""
    packed = gguf.quant_shape_to_byte_shape(shape, kind)
    writer.add_tensor_info(name, packed, np.dtype(np.uint8), int(prod(packed)), raw_dtype=kind)


def add_settings(writer: gguf.GGUFWriter, cfg: TextConfig) -> None:
    """The configuration, as far as llama.cpp has keys for it."""
    writer.add_block_count(cfg.num_hidden_layers)
    writer.add_context_length(cfg.max_position_embeddings)
    writer.add_embedding_length(cfg.hidden_size)
    writer.add_feed_forward_length(cfg.intermediate_size_mlp)
    writer.add_expert_feed_forward_length(cfg.intermediate_size)
    writer.add_head_count(cfg.num_attention_heads)
    writer.add_head_count_kv(cfg.num_key_value_heads)
    writer.add_key_length(cfg.head_dim)
    writer.add_value_length(cfg.head_dim)
    writer.add_layer_norm_rms_eps(cfg.rms_norm_eps)
    writer.add_rope_freq_base(cfg.rope_theta)
    writer.add_rope_dimension_count(cfg.head_dim)
    writer.add_expert_count(cfg.num_local_experts)
    writer.add_expert_used_count(cfg.num_experts_per_tok)
    writer.add_interleave_moe_layer_step(cfg.interleave_moe_layer_step)
    writer.add_vocab_size(cfg.vocab_size)


def _add_vision_settings(writer: gguf.GGUFWriter, cfg: VisionConfig, hidden_size: int) -> None:
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(PROJECTOR)
    writer.add_vision_projection_dim(hidden_size)
    writer.add_vision_image_size(cfg.image_size)
    writer.add_vision_patch_size(cfg.patch_size)
    writer.add_vision_embedding_length(cfg.hidden_size)
    writer.add_vision_feed_forward_length(cfg.intermediate_size)
    writer.add_vision_block_count(cfg.num_hidden_layers)
    writer.add_vision_head_count(cfg.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(cfg.norm_eps)
    writer.add_vision_projector_scale_factor(round(1 / cfg.pixel_shuffle_ratio))
    writer.add_vision_use_gelu(True)
    writer.add_vision_image_mean([0.5] * cfg.num_channels)
    writer.add_vision_image_std([0.5] * cfg.num_channels)
