"""Meta's checkpoints (spec §6.2): `consolidated.NN.pth`, cut for any number of GPUs, and params.json.

Shape letters: D hidden, E experts, F expert width; of one shard in lower case, as in Meta's names.
"""

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from herd.checkpoint.files import companions
from herd.checkpoint.meta_config import PARAMS, read_params
from herd.checkpoint.pickled import read_pickled
from herd.checkpoint.weights import Stored, Weights
from herd.config import TextConfig
from herd.errors import CheckpointError
from herd.kernels.heap import forget

_SHARDS = "consolidated.*.pth"
_DROPPED = re.compile(
    r"(rope\.freqs|.*\._extra_state|.*(running_gate_stats_3E|global_gate_stats_3E|expert_activation_DE))"
)
_TYPES = (torch.float32, torch.bfloat16, torch.float16)

# Names, and the dimension in which shards are put together; None: every shard has the whole.
_TOP: dict[str, tuple[str, int | None]] = {
    "tok_embeddings.weight": ("model.embed_tokens.weight", 0),
    "norm.weight": ("model.norm.weight", None),
    "output.weight": ("lm_head.weight", 0),
    "vision_projection.weight": ("multi_modal_projector.linear_1.weight", 0),
    "vision_embeddings.vision_adapter.mlp.c_fc.weight": ("vision_model.vision_adapter.mlp.fc1.weight", 0),
    "vision_embeddings.vision_adapter.mlp.c_proj.weight": ("vision_model.vision_adapter.mlp.fc2.weight", 1),
    "vision_embeddings.vision_encoder.conv1._linear.weight": ("vision_model.patch_embedding.linear.weight", 0),
    "vision_embeddings.vision_encoder.class_embedding": ("vision_model.class_embedding", None),
    "vision_embeddings.vision_encoder.positional_embedding_vlm": ("vision_model.positional_embedding_vlm", None),
    "vision_embeddings.vision_encoder.ln_pre.weight": ("vision_model.layernorm_pre.weight", None),
    "vision_embeddings.vision_encoder.ln_pre.bias": ("vision_model.layernorm_pre.bias", None),
    "vision_embeddings.vision_encoder.ln_post.weight": ("vision_model.layernorm_post.weight", None),
    "vision_embeddings.vision_encoder.ln_post.bias": ("vision_model.layernorm_post.bias", None),
}
_LAYER: dict[str, tuple[str, int | None]] = {
    "attention.wqkv.layer_norm_weight": ("input_layernorm.weight", None),
    "attention_norm.weight": ("input_layernorm.weight", None),
    "attention.wq.weight": ("self_attn.q_proj.weight", 0),
    "attention.wk.weight": ("self_attn.k_proj.weight", 0),
    "attention.wv.weight": ("self_attn.v_proj.weight", 0),
    "attention.wo.weight": ("self_attn.o_proj.weight", 1),
    "feed_forward.norm.weight": ("post_attention_layernorm.weight", None),
    "feed_forward.mlp.layer_norm_weight": ("post_attention_layernorm.weight", None),
    "feed_forward.mlp.layer_norm.weight": ("post_attention_layernorm.weight", None),
    "feed_forward.w_in_shared_FD.weight": ("feed_forward.shared_expert.gate_proj.weight", 0),
    "feed_forward.w_swiglu_FD.weight": ("feed_forward.shared_expert.up_proj.weight", 0),
    "feed_forward.w_out_shared_DF.weight": ("feed_forward.shared_expert.down_proj.weight", 1),
    "feed_forward.mlp.fc2_weight": ("feed_forward.down_proj.weight", 1),
}
_VISION_LAYER: dict[str, tuple[str, int | None]] = {
    **{f"attn.w{x}.{part}": (f"self_attn.{x}_proj.{part}", 0) for x in "qkv" for part in ("weight", "bias")},
    "attn.wo.weight": ("self_attn.o_proj.weight", 1),
    "attn.wo.bias": ("self_attn.o_proj.bias", None),
    "mlp.c_fc.weight": ("mlp.fc1.weight", 0),
    "mlp.c_fc.bias": ("mlp.fc1.bias", 0),
    "mlp.c_proj.weight": ("mlp.fc2.weight", 1),
    "mlp.c_proj.bias": ("mlp.fc2.bias", None),
    "ln_1.weight": ("input_layernorm.weight", None),
    "ln_1.bias": ("input_layernorm.bias", None),
    "ln_2.weight": ("post_attention_layernorm.weight", None),
    "ln_2.bias": ("post_attention_layernorm.bias", None),
}
_LAYER_NAME = re.compile(r"(layers|vision_embeddings\.vision_encoder\.transformer\.resblocks)\.(\d{1,4})\.(.+)")
_QKV, _GATE_UP, _ROUTER = "attention.wqkv.weight", "feed_forward.mlp.fc1_weight", "feed_forward.router_DE"
_IN, _SWIGLU, _OUT = (
    f"feed_forward.experts.{name}" for name in ("moe_w_in_eD_F", "moe_w_swiglu_eD_F", "moe_w_out_eF_D")
)

Pieces = Sequence[Tensor]  # what each shard has of a tensor


def is_meta(folder: Path) -> bool:
    return (folder / PARAMS).is_file() and not (folder / "config.json").exists()


def open_meta(folder: Path) -> Weights:
    """The weights of a folder. CheckpointError if a shard is missing, damaged, or does not fit the others."""
    files = _files(folder)
    shards = [read_pickled(path) for path in files]
    names = {name for name in shards[0] if not _DROPPED.fullmatch(name)}
    for path, shard in zip(files, shards, strict=True):
        if odd := sorted({name for name in shard if not _DROPPED.fullmatch(name)} ^ names):
            raise CheckpointError(f"{path} and {files[0].name} disagree on {len(odd)} tensors, first {odd[0]!r}")
    pieces = {
        name: [_checked(path, name, shard[name]) for path, shard in zip(files, shards, strict=True)] for name in names
    }
    embedding = pieces.get("tok_embeddings.weight")
    if embedding is None:
        raise CheckpointError(f"{folder} lacks the tensor tok_embeddings.weight")
    text, vision = read_params(folder, sum(piece.shape[0] for piece in embedding))
    stored = _Merge(folder, text, pieces).all()
    return Weights(folder, text, vision, stored, files, partial(companions, folder), ExitStack())


def _files(folder: Path) -> list[Path]:
    files = sorted(folder.glob(_SHARDS))
    numbers = [path.name.split(".")[1] for path in files]
    if not files:
        raise CheckpointError(f"{folder} has {PARAMS}, but no consolidated.00.pth")
    if numbers != [f"{i:0{len(numbers[0])}}" for i in range(len(files))]:
        raise CheckpointError(
            f"{folder} has the shards {', '.join(numbers)}; they must be numbered from 00 without gaps"
        )
    return files


def _checked(path: Path, name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise CheckpointError(f"{path} has {name}, which is no tensor")
    if value.dtype not in _TYPES or value.layout != torch.strided or not value.ndim:
        raise CheckpointError(f"{name} in {path} has type {value.dtype}; float32, bfloat16 and float16 can be read")
    return value


class _Merge:
    """The tensors of all shards, each put together when it is read."""

    def __init__(self, folder: Path, cfg: TextConfig, pieces: dict[str, list[Tensor]]) -> None:
        self.folder, self.cfg, self.pieces = folder, cfg, pieces
        self.stored = dict[str, Stored]()

    def all(self) -> dict[str, Stored]:
        for name in sorted(self.pieces):
            if name in _TOP:
                self._joined(name, *_TOP[name])
            elif (match := _LAYER_NAME.fullmatch(name)) is None:
                raise CheckpointError(f"{self.folder} has a tensor that Llama 4 does not have: {name}")
            elif match[1] == "layers":
                self._layer(name, f"model.layers.{match[2]}.", match[3])
            elif match[3] in _VISION_LAYER:
                ours, dim = _VISION_LAYER[match[3]]
                self._joined(name, f"vision_model.model.layers.{match[2]}.{ours}", dim)
            else:
                raise CheckpointError(f"{self.folder} has a tensor that Llama 4 does not have: {name}")
        return self.stored

    def _layer(self, name: str, layer: str, rest: str) -> None:
        if rest in _LAYER:
            self._joined(name, layer + _LAYER[rest][0], _LAYER[rest][1])
        elif rest == _QKV:
            self._qkv(name, f"{layer}self_attn.")
        elif rest == _GATE_UP:
            for half, part in enumerate(("gate", "up")):
                parts = [self._cut(name, piece, 2)[half] for piece in self.pieces[name]]
                self._add(f"{layer}feed_forward.{part}_proj.weight", parts, 0)
        elif rest == _ROUTER:
            self._add(f"{layer}feed_forward.router.weight", [self.pieces[name][0].T], None)
        elif rest == _IN:
            self._gate_up(name, name.removesuffix(_IN) + _SWIGLU, f"{layer}feed_forward.experts.gate_up_proj")
        elif rest == _OUT:
            parts = [self._by_expert(name, piece) for piece in self.pieces[name]]
            self._add(f"{layer}feed_forward.experts.down_proj", parts, 1)
        elif rest != _SWIGLU:
            raise CheckpointError(f"{self.folder} has a tensor that Llama 4 does not have: {name}")

    def _joined(self, name: str, ours: str, dim: int | None) -> None:
        self._add(ours, self.pieces[name] if dim is not None else self.pieces[name][:1], dim)

    def _qkv(self, name: str, prefix: str) -> None:
        """Each shard has some query heads, then as large a share of the key and of the value heads."""
        heads, kv_heads, shards = self.cfg.num_attention_heads, self.cfg.num_key_value_heads, len(self.pieces[name])
        rows = [heads * self.cfg.head_dim // shards, *[kv_heads * self.cfg.head_dim // shards] * 2]
        if kv_heads % shards or any(piece.shape[0] != sum(rows) for piece in self.pieces[name]):
            found = list(self.pieces[name][0].shape)
            raise CheckpointError(
                f"{name} in {self.folder} has shape {found} in each of {shards} shards; {heads} query and {kv_heads} "
                f"key/value heads of {self.cfg.head_dim} need {sum(rows)} rows"
            )
        for i, part in enumerate("qkv"):
            self._add(f"{prefix}{part}_proj.weight", [piece.split(rows)[i] for piece in self.pieces[name]], 0)

    def _gate_up(self, gate_name: str, up_name: str, ours: str) -> None:
        if up_name not in self.pieces:
            raise CheckpointError(f"{self.folder} lacks the tensor {up_name}")
        gate, up = ([self._by_expert(n, piece) for piece in self.pieces[n]] for n in (gate_name, up_name))
        self._add(ours, [*gate, *up], 2)

    def _by_expert(self, name: str, piece: Tensor) -> Tensor:
        """[E * rows, columns] as [E, rows, columns]."""
        experts = max(self.cfg.num_local_experts, 1)
        if piece.ndim == 3 and piece.shape[0] == experts:
            return piece
        if piece.ndim != 2 or piece.shape[0] % experts or not piece.is_contiguous():
            raise CheckpointError(f"{name} in {self.folder} has shape {list(piece.shape)}; it has {experts} experts")
        return piece.view(experts, -1, piece.shape[1])

    def _cut(self, name: str, piece: Tensor, parts: int) -> tuple[Tensor, ...]:
        if piece.shape[0] % parts:
            raise CheckpointError(
                f"{name} in {self.folder} has {piece.shape[0]} rows; they must be gate and up, as many"
            )
        return piece.chunk(parts)

    def _add(self, name: str, parts: Pieces, dim: int | None) -> None:
        if name in self.stored:
            raise CheckpointError(f"{self.folder} has {name} under two names")
        shape = list(parts[0].shape)
        if dim is not None:
            others = [[n for i, n in enumerate(part.shape) if i != dim] for part in parts]
            if any(part.ndim <= dim for part in parts) or any(other != others[0] for other in others):
                shapes = [list(part.shape) for part in parts]
                raise CheckpointError(f"the shards of {name} in {self.folder} do not fit together: {shapes}")
            shape[dim] = sum(part.shape[dim] for part in parts)
        dtype = parts[0].dtype
        size = prod(shape) * dtype.itemsize
        kind = str(dtype).removeprefix("torch.")
        read = _reader(parts, dim, tuple(shape))
        self.stored[name] = Stored(tuple(shape), dtype, kind, size, read, partial(_forget, parts))


def _reader(parts: Pieces, dim: int | None, shape: tuple[int, ...]) -> Callable[[torch.dtype], Tensor]:
    def read(dtype: torch.dtype) -> Tensor:
        if len(parts) == 1:
            return parts[0].to(dtype).contiguous()
        assert dim is not None
        out = torch.empty(shape, dtype=dtype)
        for place, part in zip(out.split([part.shape[dim] for part in parts], dim), parts, strict=True):
            place.copy_(part)
        return out

    return read


def _forget(parts: Pieces) -> None:
    for part in parts:
        forget(part)
