"""A few source files, and a byte-level tokenizer with merges learnt from them."""

import sysconfig
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from herd.data.pool import PoolRecipe
from herd.prompt import Tokenizer

SPECIAL = ["<|im_start|>", "<|im_end|>"]


def write_files(folder: Path) -> None:
    """Three real files of the standard library, one that is held out, and two that define the same name."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for name in ("queue.py", "sched.py", "textwrap.py"):
        (folder / name).write_text((stdlib / name).read_text())
    (folder / "secret").mkdir()
    (folder / "secret" / "held.py").write_text("HELD_OUT = 12345\n" * 50)
    filler = "".join(f"filler_{i} = call({i})\n" for i in range(16))
    for name in ("one", "two"):
        (folder / f"{name}.py").write_text(f"SHARED_NAME = '{name}'\nONLY_{name.upper()} = 7\n{filler}")


def tokenizer(folder: Path) -> Tokenizer:
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    core.train_from_iterator([f.read_text() for f in sorted(folder.glob("*.py"))], trainer)
    return Tokenizer(core)


def recipe(folder: Path, **changes: object) -> PoolRecipe:
    values = {"paths": (f"{folder}/**/*.py",), "hold_out": ("secret",), "chunks": 14, "chunk_size": 400}
    return PoolRecipe(**{**values, "facts_per_chunk": 1, "absent_share": 0.4, **changes})  # type: ignore[arg-type]
