"""Conversion of checkpoints between formats and types: streaming, resumable, never half under its final name."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from herd.checkpoint.files import SHARD_BYTES
from herd.checkpoint.load import open_weights
from herd.checkpoint.packing import write_weights
from herd.checkpoint.streaming import Progress, job
from herd.checkpoint.weights import Weights
from herd.checkpoint.write_hf import write_hf
from herd.errors import CheckpointError
from herd.formats import parse

FORMATS = ("hf", "gguf", "herd")
_PLAIN = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_KINDS = {"bf16": ("BF16", "bfloat16"), "fp16": ("F16", "float16"), "fp32": ("F32", "float32")}  # as formats call them
_GGUF = {"bf16": "BF16", "fp16": "F16", "fp32": "F32", "int8": "Q8_0", "int4": "Q4_0"}


def convert(
    source: str | Path,
    out: str | Path,
    *,
    format: str,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    tokenizer: Callable[[], bytes] | None = None,
    calibration: Tensor | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a checkpoint in another format or type.

    format: "hf", a Hugging Face folder; "gguf", a GGUF file, whose image encoder goes into `mmproj-NAME` beside it; or
    "herd", a packed folder. dtype: of the weights; None: as they are, if they are bf16, fp16 or fp32. Hugging Face's
    can also be "fp8" (routed experts, by Meta's recipe), GGUF's "int8" and "int4" (Q8_0 and Q4_0); those of packed
    folders are named as in `herd.formats`. tokenizer: gives a tokenizer.json where the source has none. calibration: of
    packed folders, ids of texts [rows, tokens] that weights in 8 and 4 bits are rounded for (`herd.model.calibrate`).
    progress: called with the bytes that are done, and of all.
    What a killed run has finished is not made again: tensors, and of packed folders layers. CheckpointError if source
    or target do not allow what is asked for, or a tensor holds infinities or NaN; ConfigError for a type that is not
    known, for sizes that it cannot have, or if there is no native library, which packs.
    """
    out = Path(out)
    if format not in FORMATS:
        raise CheckpointError(f"format is {format!r}; it can be {', '.join(FORMATS)}")
    if calibration is not None and format != "herd":
        raise CheckpointError(f"only packed folders can be calibrated, not {format}; leave the text out")
    with open_weights(source) as weights:
        name, files, outs = _type(weights, format, dtype), weights.tokenizer(), list[str]()
        if "tokenizer.json" not in files and tokenizer is not None:
            files["tokenizer.json"] = tokenizer()
        if format == "gguf":
            if out.suffix != ".gguf":
                raise CheckpointError(f"{out} must end in .gguf")
            outs = [out.name] if weights.vision is None else [f"mmproj-{out.name}", out.name]
        what = {"format": format, "dtype": name, "shard_bytes": shard_bytes, **_inputs(weights, files, calibration)}
        with job(out, what, outs) as made:
            if format == "herd":
                write_weights(weights, made, files, parse(name), calibration=calibration, progress=progress)
            elif format == "hf":
                plain, fp8 = _PLAIN.get(name, torch.bfloat16), name == "fp8"
                write_hf(weights, made, files, plain, as_fp8=fp8, shard_bytes=shard_bytes, progress=progress)
            else:
                # gguf takes long to import, and every command imports this module.
                from herd.checkpoint.write_gguf import write_gguf

                write_gguf(weights, made, files, outs, _GGUF[name], progress)


def _type(weights: Weights, format: str, dtype: str | None) -> str:
    """The type of the result. CheckpointError or ConfigError if the format cannot hold it."""
    if format == "herd":
        if dtype is None:
            raise CheckpointError("a packed folder needs a type, such as int8, int4 or experts=int4,attention=int8")
        parse(dtype)
        return dtype
    name, allowed = dtype or _own_type(weights), (*_PLAIN, "fp8") if format == "hf" else (*_GGUF,)
    if name not in allowed:
        raise CheckpointError(f"{format} cannot hold {name}; it can be {', '.join(allowed)}")
    return name


def _inputs(weights: Weights, files: Mapping[str, bytes], calibration: Tensor | None) -> dict[str, Any]:
    """What else determines every byte of the result: size and time of each weight file, and a hash of all others."""
    stats = {str(path): path.stat() for path in weights.files}
    others = hashlib.sha256(repr((weights.text, weights.vision)).encode())
    for name, content in sorted(files.items()):
        others.update(f"{name} {len(content)} ".encode() + content)
    if calibration is not None:
        others.update(str(calibration.tolist()).encode())
    return {
        "source": {path: [stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()},
        "others": others.hexdigest(),
    }


def _own_type(weights: Weights) -> str:
    """The type that all matrices have; CheckpointError if they were quantised, or differ."""
    kinds = sorted({weights.stored(name).kind for name in weights.names if len(weights.shape(name)) > 1})
    for name, known in _KINDS.items():
        if all(kind in known for kind in kinds):
            return name
    raise CheckpointError(f"{weights.path} holds {', '.join(kinds)}; say which type it shall become")
