"""The identity of a model: what a stored context must have been read with."""

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from herd.checkpoint.files import WeightFiles, weight_paths
from herd.checkpoint.load import open_weights, read_config

_CACHE = "fingerprint.json"
_RACY_NS = 2_000_000_000  # younger files could still change without a new time stamp


def fingerprint(path: str | Path) -> str:
    """Hex SHA-256 over the configuration and every weight.

    Of a Hugging Face folder that is name, type, shape and bytes of each tensor, however they are spread over files; of
    other formats the bytes of the files. The hash of the weights is kept in fingerprint.json beside them, and trusted
    while sizes and times of the weight files are unchanged.
    """
    path = Path(path)
    config = json.dumps(read_config(path).to_hf(), sort_keys=True)
    return hashlib.sha256(config.encode() + b"\0" + _weights_hash(path).encode()).hexdigest()


def _weights_hash(path: Path) -> str:
    plain = (path / "config.json").exists()
    if plain:
        files = weight_paths(path)
    else:
        with open_weights(path) as weights:
            files = weights.files
    folder, seen = files[0].parent, _stamps(files)
    cached = _cached(folder)
    if cached.get("files") == seen and isinstance(cached.get("weights"), str):
        return str(cached["weights"])
    value = _hash_tensors(path) if plain else _hash_files(files)
    if _stamps(files) == seen and time.time_ns() - max(mtime for _, mtime in seen.values()) > _RACY_NS:
        scratch = folder / f".{_CACHE}.{os.getpid()}"
        with contextlib.suppress(OSError):  # a read-only folder is hashed every time
            scratch.write_text(json.dumps({"files": seen, "weights": value}), "utf-8")
            scratch.replace(folder / _CACHE)
    return value


def _stamps(files: list[Path]) -> dict[str, list[int]]:
    """Size and modification time (ns) of each weight file."""
    stats = {path.name: path.stat() for path in files}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def _cached(folder: Path) -> dict[str, Any]:
    try:
        value = json.loads((folder / _CACHE).read_text("utf-8"))
    except (OSError, ValueError):  # absent or damaged: computed anew
        return {}
    return value if isinstance(value, dict) else {}


def _hash_tensors(folder: Path) -> str:
    total = hashlib.sha256()
    with WeightFiles(folder) as weights:
        for name in sorted(weights.names):
            tensor = weights.tensor(name)
            content = hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
            total.update(f"{name} {tensor.dtype} {list(tensor.shape)} {content.hexdigest()}\n".encode())
    return total.hexdigest()


def _hash_files(files: list[Path]) -> str:
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            total.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()
