"""Conversion of checkpoints between formats and types: streaming, resumable, never half under its final name."""

from pathlib import Path
from typing import Literal, get_args

import torch

from herd.checkpoint.files import SHARD_BYTES
from herd.checkpoint.load import open_weights
from herd.checkpoint.streaming import Progress, job
from herd.checkpoint.weights import Weights
from herd.checkpoint.write_hf import write_hf
from herd.errors import CheckpointError

Format = Literal["hf", "gguf", "herd"]
Type = Literal["bf16", "fp16", "fp32", "int8", "int4", "fp8"]
FORMATS, TYPES = get_args(Format), get_args(Type)
_PLAIN = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_GGUF = {"bf16": "BF16", "fp16": "F16", "fp32": "F32", "int8": "Q8_0", "int4": "Q4_0"}


def convert(
    source: str | Path,
    out: str | Path,
    *,
    format: Format,
    dtype: Type | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Write a checkpoint in another format or type.

    format: "hf", a Hugging Face folder; "gguf", a GGUF file, whose images go into `mmproj-NAME` beside it. dtype: of
    the weights; None: as they are, if they are bf16, fp16 or fp32. Folders of Hugging Face also take "fp8" (routed
    experts), GGUF files "int8" and "int4" (Q8_0 and Q4_0). What a killed run has finished is not made again.
    CheckpointError if source or target do not allow that, or a tensor holds infinities or NaN.
    """
    out = Path(out)
    with open_weights(source) as weights:
        name = dtype or _own_type(weights)
        allowed = (*_PLAIN, "fp8") if format == "hf" else _GGUF
        if format not in ("hf", "gguf") or name not in allowed:
            raise CheckpointError(f"{format} cannot hold {name}; it can be {', '.join(allowed)}")
        stamps = {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in weights.files}
        what = {"source": stamps, "format": format, "dtype": name, "shard_bytes": shard_bytes}
        if format == "hf":
            with job(out, what) as folder:
                plain = _PLAIN.get(name, torch.bfloat16)
                write_hf(weights, folder, plain, as_fp8=name == "fp8", shard_bytes=shard_bytes, progress=progress)
            return
        # gguf takes long to import, and every command imports this module.
        from herd.checkpoint.write_gguf import write_gguf

        if out.suffix != ".gguf":
            raise CheckpointError(f"{out} must end in .gguf")
        files = [out.name] if weights.vision is None else [f"mmproj-{out.name}", out.name]
        with job(out, what, files) as folder:
            write_gguf(weights, folder, files, _GGUF[name], progress)


def _own_type(weights: Weights) -> str:
    """The type that all large tensors have; CheckpointError if they were quantised, or differ."""
    kinds = {weights.stored(name).kind for name in weights.names if len(weights.shape(name)) > 1}
    own = [name for name, dtype in _PLAIN.items() if dtype == weights.dtype]
    if len(kinds) > 1 or kinds.pop() not in _NAMES[own[0]]:
        stored = ", ".join(sorted({weights.stored(name).kind for name in weights.names}))
        raise CheckpointError(f"{weights.path} holds {stored}; say which type it shall become: {', '.join(TYPES)}")
    return own[0]


_NAMES = {
    "bf16": ("BF16", "bfloat16"),
    "fp16": ("F16", "float16"),
    "fp32": ("F32", "float32"),
}
