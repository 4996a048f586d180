"""Folders with weights as the kernels take them, so that loading a model is mapping its files into memory.

config.json says under "packed" which format each part has. There is a safetensors file for each layer, and one for the
embedding, the last norm and the head. A weight is one tensor of bytes: codes in panels (kernels/cpp/product.h), then
float32 scales. An expert is one tensor, too: gate and up, then down, filled up to whole pages. Experts come first in
their file, so that each begins on a page and can be read alone.

Shape suffixes: as in herd/kernels/layers.py.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from herd import kernels
from herd.checkpoint.files import INDEX, WeightFiles, read_json, write_json
from herd.checkpoint.load import empty_transformer, empty_vision
from herd.checkpoint.room import available_memory
from herd.checkpoint.shapes import VISION_PREFIXES, vision_shapes
from herd.checkpoint.streaming import Job, Layout, Piece, Progress
from herd.config import TextConfig, VisionConfig
from herd.errors import CheckpointError, ConfigError
from herd.formats import Format, parse
from herd.formats import Weights as Formats
from herd.kernels import native
from herd.kernels.layers import PAGE, Layer, Mlp, MlpForm, WeightForm
from herd.kernels.native import PackedWeight
from herd.model import Transformer
from herd.model.offload import ExpertCache, Key, Place
from herd.model.packed import Packed
from herd.model.unpack import unpack
from herd.model.vision import Vision

_KEY, _VERSION = "packed", 1
_BESIDE = 256 << 20  # bytes of libraries, which count as free when they are only cached, but are not
EMBEDDING, NORM, _HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head"
_TYPES = {torch.uint8: "U8", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_SIZES = {"U8": 1, "F32": 4, "BF16": 2, "F16": 2}  # bytes of a number
Shapes = dict[str, tuple[str, tuple[int, ...]]]  # type and shape of a tensor; an empty type is any


def is_packed(folder: Path) -> bool:
    """Whether a folder says of itself that its weights are packed. CheckpointError if its config.json is unreadable."""
    return (folder / "config.json").is_file() and _KEY in read_json(folder / "config.json")


@dataclass(frozen=True)
class Contents:
    """What a packed folder is made of. formats: those that the weights have. layer: gives one of the layers, which are
    asked for in order; head: asked for behind them.

    plain: type and shape of what stays as it is: the embedding, the last norm (float32), and the image encoder by its
    names in Hugging Face folders; read: gives one of them. files: others by name, such as the tokenizer's.
    """

    config: TextConfig
    formats: Formats
    layer: Callable[[int], Layer]
    head: Callable[[], PackedWeight]
    plain: Mapping[str, tuple[torch.dtype, Sequence[int]]]
    read: Callable[[str], Tensor]
    files: Mapping[str, bytes]
    vision: VisionConfig | None = None


def write_packed(contents: Contents, job: Job, progress: Progress | None = None) -> None:
    """Write all files of the folder; those that an earlier run of the job has finished are not made again."""
    cfg, vision = contents.config, contents.vision
    forms, packed = _Forms.of(cfg, contents.formats), contents.formats.formats
    plain = {name: (_TYPES[dtype], tuple(shape)) for name, (dtype, shape) in contents.plain.items()}

    def layer(at: int) -> Iterator[Tensor]:
        values = _values(cfg, at, contents.layer(at))
        for name, (_, shape) in _layer_shapes(cfg, forms, at).items():
            value = values[name]
            yield value if isinstance(value, Tensor) else _bytes(value, prod(shape))

    def others(names: Iterable[str]) -> Iterator[Tensor]:
        for name in names:
            yield _bytes((contents.head(),), forms.head.nbytes) if name == _HEAD else contents.read(name)

    files = [(_layer_shapes(cfg, forms, at), partial(layer, at)) for at in range(cfg.num_hidden_layers)]
    top = {_HEAD: ("U8", (forms.head.nbytes,)), EMBEDDING: plain.pop(EMBEDDING), NORM: plain.pop(NORM)}
    files += [(shapes, partial(others, shapes)) for shapes in (top, plain) if shapes]
    names = [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    layouts = [_layout(name, shapes, make) for name, (shapes, make) in zip(names, files, strict=True)]
    job.write(layouts, progress)
    weight_map = {tensor: name for name, (shapes, _) in zip(names, files, strict=True) for tensor in shapes}
    metadata = {"total_size": sum(piece.size for layout in layouts for piece in layout.pieces)}
    write_json(job.result / INDEX, {"metadata": metadata, "weight_map": weight_map})
    raw = cfg.to_hf() if vision is None else vision.to_hf(cfg)
    said = {"version": _VERSION, **{part: str(form) for part, form in packed.items()}}
    write_json(job.result / "config.json", {**raw, _KEY: said})
    for name, content in contents.files.items():
        (job.result / name).write_bytes(content)


def _layout(name: str, shapes: Shapes, make: Callable[[], Iterable[Tensor]]) -> Layout:
    """A safetensors file whose tensors stand in the order given, from a whole page on. It is one piece: a layer is
    calibrated as a whole."""
    header, at = dict[str, Any](), 0
    for tensor, (kind, shape) in shapes.items():
        end = at + _SIZES[kind] * prod(shape)
        header[tensor] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    return Layout(name, len(text).to_bytes(8, "little") + text, [Piece(at, make)])


@dataclass(frozen=True)
class _Forms:
    """Form of every weight of a model. Attention: qkv and output of local layers, and of global ones."""

    head: WeightForm
    local: tuple[WeightForm, WeightForm]
    looking: tuple[WeightForm, WeightForm]
    dense: MlpForm
    shared: MlpForm
    expert: MlpForm

    @classmethod
    def of(cls, cfg: TextConfig, formats: Formats) -> "_Forms":
        D, H, G, d = cfg.hidden_size, cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim

        def attention(form: Format) -> tuple[WeightForm, WeightForm]:
            return WeightForm.of((H + 2 * G) * d, D, *form.packed), WeightForm.of(D, H * d, *form.packed)

        return cls(
            head=WeightForm.of(cfg.vocab_size, D, *formats.head.packed),
            local=attention(formats.attention),
            looking=attention(formats.global_attention),
            dense=MlpForm.of(D, cfg.intermediate_size_mlp, *formats.shared.packed),
            shared=MlpForm.of(D, cfg.intermediate_size, *formats.shared.packed),
            expert=MlpForm.of(D, cfg.intermediate_size, *formats.experts.packed),
        )

    def attention(self, cfg: TextConfig, at: int) -> tuple[WeightForm, WeightForm]:
        """Of queries, keys and values, and of the output."""
        return self.local if cfg.is_local(at) else self.looking

    def mlp(self, cfg: TextConfig, at: int) -> MlpForm:
        """Of the block that all tokens of a layer pass through."""
        return self.shared if cfg.is_moe(at) else self.dense


def _read_formats(folder: Path) -> Formats:
    """What config.json says. CheckpointError if it cannot be read."""
    said = read_json(folder / "config.json")[_KEY]
    try:
        if said["version"] != _VERSION:
            raise CheckpointError(f"{folder} is packed in version {said['version']!r}; this one reads {_VERSION}")
        return parse(",".join(f"{part}={form}" for part, form in said.items() if part != "version"))
    except (KeyError, TypeError, AttributeError, ConfigError) as error:
        raise CheckpointError(f"config.json in {folder} does not say how it is packed: {error}") from error


def _names(cfg: TextConfig, at: int) -> dict[str, str]:
    """What the tensors of a layer are called, but for experts."""
    prefix = f"model.layers.{at}."
    mlp = f"{prefix}feed_forward." + ("shared_expert." if cfg.is_moe(at) else "")
    return {
        "qkv": f"{prefix}self_attn.qkv_proj",
        "out": f"{prefix}self_attn.o_proj",
        "gate_up": f"{mlp}gate_up_proj",
        "down": f"{mlp}down_proj",
        "attention_norm": f"{prefix}input_layernorm.weight",
        "mlp_norm": f"{prefix}post_attention_layernorm.weight",
        "router": f"{prefix}feed_forward.router.weight",
    }


def _expert(at: int, expert: int) -> str:
    return f"model.layers.{at}.feed_forward.experts.{expert}"


def _values(cfg: TextConfig, at: int, layer: Layer) -> dict[str, Tensor | tuple[PackedWeight, ...]]:
    """What stands in a layer's file, by name."""
    names, values = _names(cfg, at), dict[str, Tensor | tuple[PackedWeight, ...]]()
    values |= {_expert(at, e): (mlp.gate_up, mlp.down) for e, mlp in enumerate(layer.experts)}
    weights = {"qkv": layer.qkv, "out": layer.out, "gate_up": layer.shared.gate_up, "down": layer.shared.down}
    values |= {names[key]: (weight,) for key, weight in weights.items()}
    if layer.router_ED is not None:
        values[names["router"]] = layer.router_ED
    return values | {names["attention_norm"]: layer.attention_norm_D, names["mlp_norm"]: layer.mlp_norm_D}


def _bytes(weights: Iterable[PackedWeight], size: int) -> Tensor:
    """Codes and scales of weights, one after the other, filled up to a size."""
    joined = torch.cat([part.reshape(-1).view(torch.uint8) for w in weights for part in (w.packed, w.scale)])
    assert len(joined) <= size, (len(joined), size)
    return nn.functional.pad(joined, (0, size - len(joined)))


def load_packed(folder: Path, memory: int | None = None) -> Transformer:
    """The model of a packed folder, in eval mode.

    Weights are mapped into memory: a loaded model's files must not be changed in place. memory: bytes that weights may
    take; if they are more, experts are read as tokens want them (`herd.model.offload`). None: as much as this process
    may still take, less an eighth and 256 MiB for all else. CheckpointError names the first tensor that is
    missing, extra or misshapen, or says how much memory is needed at least; ConfigError if memory is given where the
    native library, which needs it, cannot run the model.
    """
    cfg = TextConfig.from_hf(read_json(folder / "config.json"))
    forms, model = _Forms.of(cfg, _read_formats(folder)), empty_transformer(cfg)
    with WeightFiles(folder) as files:
        shapes = _shapes(cfg, forms)
        _check(files, shapes, images=False)
        model.model.embed_tokens.weight = nn.Parameter(files.tensor(EMBEDDING), requires_grad=False)
        model.model.norm.weight = nn.Parameter(files.tensor(NORM), requires_grad=False)
        if not kernels.runs_layers(torch.empty(0), cfg.head_dim):
            if memory is not None:
                why = f"here is {kernels.implementation()}, and heads have {cfg.head_dim} dimensions"
                raise ConfigError(f"memory can be bounded where the native library runs the layers; {why}")
            layers = [_layer(files.tensor, cfg, forms, at) for at in range(cfg.num_hidden_layers)]
            unpack(model, layers, forms.head.placed(files.tensor(_HEAD)))
            return model.eval()
        slots, paths = _slots(folder, cfg, forms, shapes, memory), files.paths

        def read(name: str) -> Tensor:
            return files.tensor(name) if slots is None else _copy(files.tensor(name))

        layers = [_layer(read, cfg, forms, at, with_experts=slots is None) for at in range(cfg.num_hidden_layers)]
        head = forms.head.placed(read(_HEAD))
    source = None if slots is None else ExpertCache(paths, _places(paths), forms.expert, layers, slots)
    model.packed = Packed(cfg, layers, model.model.norm.weight.detach(), head, source)
    model.model.layers = nn.ModuleList()  # type: ignore[assignment]
    del model.lm_head
    return model.eval()


def load_packed_vision(folder: Path) -> Vision | None:
    """The image encoder of a packed folder, in eval mode, as stored; None if it is of a text model. Errors as above."""
    raw = read_json(folder / "config.json")
    cfg, hidden_size = VisionConfig.from_hf(raw), TextConfig.from_hf(raw).hidden_size
    if cfg is None:
        return None
    vision = empty_vision(cfg, hidden_size)
    with WeightFiles(folder) as files:
        _check(files, {name: ("", shape) for name, shape in vision_shapes(cfg, hidden_size).items()}, images=True)
        for name in dict(vision.named_parameters()):
            parent, _, leaf = name.rpartition(".")
            setattr(vision.get_submodule(parent), leaf, nn.Parameter(files.tensor(name), requires_grad=False))
    return vision.eval()


def _shapes(cfg: TextConfig, forms: _Forms) -> Shapes:
    """Of every tensor."""
    shapes: Shapes = {
        EMBEDDING: ("", (cfg.vocab_size, cfg.hidden_size)),
        NORM: ("F32", (cfg.hidden_size,)),
        _HEAD: ("U8", (forms.head.nbytes,)),
    }
    for at in range(cfg.num_hidden_layers):
        shapes |= _layer_shapes(cfg, forms, at)
    return shapes


def _layer_shapes(cfg: TextConfig, forms: _Forms, at: int) -> Shapes:
    """As they stand in a layer's file: experts first, and last what may end within a line of the cache."""
    names, (qkv, out), mlp, D = _names(cfg, at), forms.attention(cfg, at), forms.mlp(cfg, at), cfg.hidden_size
    packed = {"qkv": qkv, "out": out, "gate_up": mlp.gate_up, "down": mlp.down}
    experts = cfg.num_local_experts if cfg.is_moe(at) else 0
    shapes: Shapes = {_expert(at, e): ("U8", (forms.expert.nbytes,)) for e in range(experts)}
    shapes |= {names[key]: ("U8", (form.nbytes,)) for key, form in packed.items()}
    if experts:
        shapes[names["router"]] = ("F32", (experts, D))
    return shapes | {names[key]: ("F32", (D,)) for key in ("attention_norm", "mlp_norm")}


def _check(files: WeightFiles, shapes: Shapes, *, images: bool) -> None:
    """CheckpointError for the first tensor, of the image encoder or of all else, that does not fit."""
    for name, (kind, shape) in shapes.items():
        if name not in files.names:
            raise CheckpointError(f"{files.folder} lacks the tensor {name} of shape {list(shape)}")
        if files.shape(name) != shape or (kind or files.kind(name)) != files.kind(name):
            found = f"{files.kind(name)} {list(files.shape(name))}"
            raise CheckpointError(
                f"{name} in {files.folder} is {found}; the configuration asks for {kind or 'numbers'} {list(shape)}"
            )
        if kind == "F32" and not files.tensor(name).isfinite().all():
            raise CheckpointError(f"{name} in {files.folder} holds values that are not finite numbers")
    if extra := sorted(name for name in files.names - shapes.keys() if name.startswith(VISION_PREFIXES) == images):
        raise CheckpointError(f"{files.folder} has {len(extra)} tensors the model does not have, first {extra[0]}")


def _slots(folder: Path, cfg: TextConfig, forms: _Forms, shapes: Shapes, memory: int | None) -> int | None:
    """How many experts there is memory for at a time, beside all else; None: for all."""
    # Of the embedding few rows are ever read: it stays in its file.
    sizes = {name: prod(shape) * (1 if kind == "U8" else 4) for name, (kind, shape) in shapes.items()}
    experts = sum(cfg.num_local_experts for at in range(cfg.num_hidden_layers) if cfg.is_moe(at))
    rest = sum(sizes.values()) - sizes[EMBEDDING] - experts * forms.expert.nbytes
    limit = max(0, available_memory() * 7 // 8 - _BESIDE) if memory is None else memory
    slots = (limit - rest) // forms.expert.nbytes
    if slots >= experts:
        return None
    if slots < 1:
        least = rest + forms.expert.nbytes
        raise CheckpointError(f"the weights of {folder} need {least:,} bytes of memory at least; there are {limit:,}")
    return slots


def _copy(tensor: Tensor) -> Tensor:
    """In memory that is read fast, not mapped."""
    room = native.room(tensor.nbytes)
    return room.copy_(tensor.view(-1).view(torch.uint8)).view(tensor.dtype).view(tensor.shape)


def _layer(
    read: Callable[[str], Tensor], cfg: TextConfig, forms: _Forms, at: int, *, with_experts: bool = True
) -> Layer:
    """Without experts, it has their shapes."""
    (qkv, out), names, mlp, experts = forms.attention(cfg, at), _names(cfg, at), forms.mlp(cfg, at), tuple[Mlp, ...]()
    if cfg.is_moe(at):
        absent = torch.empty(forms.expert.nbytes, dtype=torch.uint8, device="meta")
        bytes_ = (read(_expert(at, e)) if with_experts else absent for e in range(cfg.num_local_experts))
        experts = tuple(forms.expert.placed(part) for part in bytes_)
    return Layer(
        attention_norm_D=read(names["attention_norm"]),
        mlp_norm_D=read(names["mlp_norm"]),
        qkv=qkv.placed(read(names["qkv"])),
        out=out.placed(read(names["out"])),
        shared=Mlp(mlp.gate_up.placed(read(names["gate_up"])), mlp.down.placed(read(names["down"]))),
        experts=experts,
        router_ED=read(names["router"]) if cfg.is_moe(at) else None,
        top_k=cfg.num_experts_per_tok if cfg.is_moe(at) else 0,
        local=cfg.is_local(at),
        qk_norm=cfg.use_qk_norm,
    )


def _places(paths: list[Path]) -> dict[Key, Place]:
    """Where each expert stands."""
    places = dict[Key, Place]()
    for i, path in enumerate(paths):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            # What was copied from here is not needed twice.
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for name, said in header.items():
            _, is_expert, expert = name.partition(".feed_forward.experts.")
            if not is_expert:
                continue
            place = Place(i, 8 + length + said["data_offsets"][0])
            if place.offset % PAGE:
                raise CheckpointError(f"{name} in {path} does not begin on a page of {PAGE} bytes; pack it again")
            places[int(name.split(".")[2]), int(expert)] = place
    return places
