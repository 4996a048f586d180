"""Text for evaluation: whole Python packages that training never reads, cut to a number of tokens.

They hold some 6 million tokens. A longer context goes on with a package that every installation has and that training
may have read: it is only looked through, nothing in it is asked about.
"""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from random import Random

from herd.api import Model
from herd.context.chunks import Chunk, cut
from herd.errors import ConfigError, SourceError
from herd.prompt import Tokenizer

HELD_OUT = ("networkx", "sympy", "asyncio", "http", "email")  # training recipes must not read these packages
FILLER = ("torch",)
ROOM = 512  # positions for a question and its answer
_LEFT_OUT = {"tests", "testing", "benchmarks", "test-examples", "_antlr"}  # tests and generated code
Progress = Callable[[str], None]


@dataclass(frozen=True)
class File:
    """One source; `name` is its path below the folder that is read, e.g. `networkx/classes/graph.py`."""

    name: str
    text: str


def tokens_of(length: str | int) -> int:
    """`8K` -> 8,192; `1M` -> 1,048,576; plain numbers as they are. ConfigError for anything else."""
    found = re.fullmatch(r"(\d+)([KM]?)", str(length).strip().upper())
    if not found or int(found.group(1)) < 1:
        raise ConfigError(f"{length!r} is no length; write tokens like 131072, 128K or 1M")
    return int(found.group(1)) * {"": 1, "K": 1024, "M": 1024**2}[found.group(2)]


def check_room(model: Model, length: str | int, added: int = 0) -> None:
    """ConfigError if a model may not have positions for a context of this length, a question and its answer.

    added: tokens that come into the text besides.
    """
    positions, tokens = model.config.max_position_embeddings, tokens_of(length)
    # The text ends with a whole chunk, and the question begins behind another.
    most = positions - 2 * chunk_size(model) - added - ROOM
    if tokens > most:
        raise ConfigError(
            f"--length {length} is {tokens:,} tokens; of this model's {positions:,} positions, question and answer "
            f"leave {max(most, 0):,} for a context: name a shorter length"
        )


def package_files(packages: Sequence[str]) -> list[File]:
    """The Python files of installed packages, without tests and generated code. SourceError if one is not installed."""
    files: list[File] = []
    for package in packages:
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise SourceError(f"package {package} is not installed here, and the evaluation reads its source")
        root = Path(next(iter(spec.submodule_search_locations)))
        for path in sorted(root.rglob("*.py")):
            inner = path.relative_to(root.parent)
            if not _LEFT_OUT & set(inner.parts):
                files.append(File(inner.as_posix(), path.read_text(encoding="utf-8", errors="replace")))
    return [file for file in files if file.text.strip()]


def with_filler(files: Sequence[File], seed: int) -> Iterator[File]:
    """These files, and behind them those of FILLER in a random order, none of the same text as one before it."""
    yield from files
    seen = {file.text for file in files}
    for file in shuffled(package_files(FILLER), seed):
        if file.text not in seen:
            seen.add(file.text)
            yield file


def filler_in(files: Iterable[File]) -> list[str]:
    """The packages of FILLER that these files are of."""
    packages = {file.name.split("/")[0] for file in files}
    return [package for package in FILLER if package in packages]


def place(workdir: Path, name: str, files: Iterable[File], tokens: int, seed: int) -> Path:
    """The folder for an evaluation's sources and context.

    Texts that go on with FILLER are all but the same whatever is evaluated, and take long to read: they share one.
    """
    return workdir / f"{'filled' if filler_in(files) else name}-{tokens}-{seed}"


def fill(files: Iterable[File], tokens: int, tokenizer: Tokenizer, chunk: int) -> tuple[list[File], int]:
    """The first files that together make `tokens` tokens of chunks (the last one is cut at a chunk), and how many.

    SourceError if there are too few.
    """
    chosen: list[File] = []
    have = 0
    for file in files:
        chunks = list(cut(file.name, file.text, tokenizer, chunk))
        kept: list[Chunk] = []
        for piece in chunks:
            if have >= tokens:
                break
            kept.append(piece)
            have += len(piece.ids)
        if kept:
            lines = lines_of(file.text)
            chosen.append(file if len(kept) == len(chunks) else File(file.name, "".join(lines[: kept[-1].last_line])))
        if have >= tokens:
            return chosen, have
    raise SourceError(f"the packages here hold {have:,} tokens; {tokens:,} were asked for: name a shorter length")


def lines_of(text: str) -> list[str]:
    """Lines with their ends as the context counts them: form feeds and the like end no line."""
    return list(io.StringIO(text, newline=""))


def chunk_size(model: Model) -> int:
    """Tokens of a local chunk, which is how sources are cut. ConfigError for a model without chunks."""
    size = model.config.attention_chunk_size
    if size is None:
        raise ConfigError("this model has no attention_chunk_size, so it cannot read a context")
    return size


def shuffled(files: list[File], seed: int) -> list[File]:
    """The files in a random order that depends only on their names and the seed."""
    order = sorted(files, key=lambda file: file.name)
    Random(seed).shuffle(order)
    return order


def write(files: Sequence[File], folder: Path) -> Path:
    """Write the files below `folder`, which holds nothing else afterwards; files that are the same stay untouched."""
    wanted = {folder / file.name for file in files}
    if folder.exists():
        for path in sorted(folder.rglob("*"), reverse=True):
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
            elif path.is_file() and path not in wanted:
                path.unlink()
    for file in files:
        path = folder / file.name
        if path.is_dir():
            shutil.rmtree(path)
        if not path.is_file() or path.read_text(encoding="utf-8") != file.text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(file.text, encoding="utf-8")
    return folder
