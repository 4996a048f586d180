"""Conversion of checkpoints between formats and types: streaming, resumable, never half under its final name."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from herd.checkpoint.files import SHARD_BYTES
from herd.checkpoint.load import open_weights
from herd.checkpoint.packing import save_packed
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
    packed folders, see `save_packed`.
    progress: called with how much is done, and of how much: bytes, or files of a packed folder.
    What a killed run has finished is not made again, but for packed folders. CheckpointError if source or target do
    not allow what is asked for, or a tensor holds infinities or NaN.
    """
    out = Path(out)
    if format not in FORMATS:
        raise CheckpointError(f"format is {format!r}; it can be {', '.join(FORMATS)}")
    with open_weights(source) as weights:
        if format == "herd":
            if dtype is None:
                raise CheckpointError("a packed folder needs a type, such as int8, int4 or experts=int4,attention=int8")
            save_packed(weights, out, parse(dtype), calibration=calibration, progress=progress)
            return
        if calibration is not None:
            raise CheckpointError(f"only packed folders can be calibrated, not {format}; leave the text out")
        name, allowed = dtype or _own_type(weights), (*_PLAIN, "fp8") if format == "hf" else (*_GGUF,)
        if name not in allowed:
            raise CheckpointError(f"{format} cannot hold {name}; it can be {', '.join(allowed)}")
        files = weights.tokenizer()
        if "tokenizer.json" not in files and tokenizer is not None:
            files["tokenizer.json"] = tokenizer()
        stamps = {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in weights.files}
        what = {"source": stamps, "format": format, "dtype": name, "shard_bytes": shard_bytes}
        if format == "hf":
            with job(out, what) as folder:
                plain, fp8 = _PLAIN.get(name, torch.bfloat16), name == "fp8"
                write_hf(weights, folder, files, plain, as_fp8=fp8, shard_bytes=shard_bytes, progress=progress)
            return
        # gguf takes long to import, and every command imports this module.
        from herd.checkpoint.write_gguf import write_gguf

        if out.suffix != ".gguf":
            raise CheckpointError(f"{out} must end in .gguf")
        names = [out.name] if weights.vision is None else [f"mmproj-{out.name}", out.name]
        with job(out, what, names) as folder:
            write_gguf(weights, folder, files, names, _GGUF[name], progress)


def _own_type(weights: Weights) -> str:
    """The type that all matrices have; CheckpointError if they were quantised, or differ."""
    kinds = sorted({weights.stored(name).kind for name in weights.names if len(weights.shape(name)) > 1})
    for name, known in _KINDS.items():
        if all(kind in known for kind in kinds):
            return name
    raise CheckpointError(f"{weights.path} holds {', '.join(kinds)}; say which type it shall become")
