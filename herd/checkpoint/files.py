"""Weight files of a Hugging Face model folder: safetensors, one or many, read lazily, written one by one."""

import glob
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import save_file
from torch import Tensor

from herd.errors import CheckpointError
from herd.kernels.heap import forget

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# What a model folder holds beside configuration and weights. The licence asks that its files go along.
_COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.model",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
    "USE_POLICY.md",
)
SHARD_BYTES = 5_000_000_000


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. CheckpointError if it is missing or malformed."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def companions(folder: Path) -> dict[str, bytes]:
    """Tokenizer, settings and licence of a model folder, by file name."""
    try:
        return {name: (folder / name).read_bytes() for name in _COMPANIONS if (folder / name).is_file()}
    except OSError as error:
        raise CheckpointError(f"cannot read {folder}: {error}") from error


def copy_companions(source: Path, out: Path) -> None:
    """Copy tokenizer, settings and licence from one model folder to another."""
    for name in _COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


class WeightFiles:
    """Tensors of a folder by name; each is read from disk when it is asked for. Use as a context manager."""

    def __init__(self, folder: Path, shards: Mapping[str, set[str] | None] | None = None):
        """Opens every file and reads the headers. CheckpointError if a file is missing, damaged or inconsistent.

        shards: files to open and the tensors each must hold (None: any); by default those of the model.
        """
        self.folder = folder
        self._stack = ExitStack()
        self._file_of: dict[str, str] = {}
        self._open: dict[str, Any] = {}
        try:
            if shards is None:
                weight_paths(folder)
                shards = _shards(folder)
            for file, expected in shards.items():
                self._add(file, expected)
        except BaseException:
            self._stack.close()
            raise

    @classmethod
    def of_file(cls, path: Path) -> "WeightFiles":
        """The tensors of one safetensors file."""
        return cls(path.parent, {path.name: None})

    def _add(self, file: str, expected: set[str] | None) -> None:
        path = self.folder / file
        if not path.is_file():
            raise CheckpointError(f"{self.folder} has no file {file}")
        try:
            opened = self._stack.enter_context(safetensors.safe_open(path, framework="pt"))
        except (OSError, safetensors.SafetensorError, ValueError) as error:
            raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
        names = set(opened.keys())
        if expected is not None and names != expected:
            odd = sorted(names ^ expected)
            raise CheckpointError(f"{path} and {INDEX} disagree on {len(odd)} tensors, first {odd[0]!r}")
        self._open[file] = opened
        self._file_of |= dict.fromkeys(names, file)

    def __enter__(self) -> "WeightFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def names(self) -> set[str]:
        return set(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape from the header, without reading the tensor. CheckpointError if there is no such tensor."""
        return tuple(self._slice(name).get_shape())

    def kind(self, name: str) -> str:
        """Its type, as safetensors calls it: "BF16". CheckpointError if there is no such tensor."""
        return str(self._slice(name).get_dtype())

    @property
    def paths(self) -> list[Path]:
        """The files."""
        return [self.folder / file for file in self._open]

    def tensor(self, name: str) -> Tensor:
        """The tensor as stored. CheckpointError if there is no such tensor or its bytes cannot be read."""
        self._slice(name)
        try:
            tensor: Tensor = self._open[self._file_of[name]].get_tensor(name)
        except (OSError, safetensors.SafetensorError, KeyError, RuntimeError) as error:
            raise CheckpointError(f"cannot read {name} of {self.folder / self._file_of[name]}: {error}") from error
        return tensor

    def forget(self, name: str) -> None:
        """Give the pages of a tensor back that were read of its file."""
        first, again = self.tensor(name), self.tensor(name)
        if first.data_ptr() == again.data_ptr():  # else the library does not map files, but copies
            forget(first)

    def _slice(self, name: str) -> Any:
        if name not in self._file_of:
            raise CheckpointError(f"{self.folder} lacks the tensor {name}")
        return self._open[self._file_of[name]].get_slice(name)


def weight_paths(folder: Path) -> list[Path]:
    """The weight files of a folder. CheckpointError if one is missing."""
    paths = [folder / file for file in _shards(folder)]
    if lost := [path for path in paths if not path.is_file()]:
        raise CheckpointError(f"{folder} has no {lost[0].name}, which {INDEX} lists")
    return paths


def _shards(folder: Path) -> dict[str, set[str] | None]:
    """File name -> names of its tensors (None: whatever it holds)."""
    if (folder / SINGLE).is_file() or not (folder / INDEX).is_file():
        if not (folder / SINGLE).is_file():
            raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}")
        return {SINGLE: None}
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX} has no weight_map")
    shards: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        # Only plain names: an index must not reach outside its folder.
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors") or "\\" in file:
            raise CheckpointError(f"{folder / INDEX} puts {name} into {file!r}; expected a .safetensors file beside it")
        shards.setdefault(file, set()).add(name)
    return dict(shards)


class ShardWriter:
    """Writes tensors in the order given, starting a new file whenever one reaches `shard_bytes`."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES):
        assert shard_bytes > 0
        self._folder, self._shard_bytes = folder, shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._written: list[tuple[Path, list[str]]] = []
        self._total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.nbytes
        if self._pending and self._pending_bytes + size > self._shard_bytes:
            self._flush()
        # Copy views, which safetensors refuses and which keep their base alive, and what is pending by another name.
        whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == size
        shared = any(other.data_ptr() == tensor.data_ptr() for other in self._pending.values())
        self._pending[name] = tensor.detach() if whole and not shared else tensor.detach().clone().contiguous()
        self._pending_bytes += size
        self._total += size

    def finish(self) -> None:
        """Write the rest and give the files their final names, with an index if there are several."""
        self._flush()
        if len(self._written) == 1:
            self._written[0][0].rename(self._folder / SINGLE)
            return
        weight_map: dict[str, str] = {}
        for i, (path, names) in enumerate(self._written, 1):
            file = f"model-{i:05}-of-{len(self._written):05}.safetensors"
            path.rename(self._folder / file)
            weight_map |= dict.fromkeys(names, file)
        metadata = {"total_size": self._total}
        write_json(self._folder / INDEX, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})

    def _flush(self) -> None:
        if not self._pending:
            return
        path = self._folder / f"shard-{len(self._written)}.partial"
        save_file(self._pending, path, metadata={"format": "pt"})
        path.chmod(0o666 & ~_umask())  # the library makes them private
        self._written.append((path, list(self._pending)))
        self._pending, self._pending_bytes = {}, 0


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


@contextmanager
def new_folder(out: Path, *, replace: bool = False) -> Iterator[Path]:
    """A scratch folder beside `out` that takes its name when the block ends well, and vanishes otherwise.

    CheckpointError if `out` exists and is not an empty folder, unless `replace`.
    """
    out = out.absolute()
    if not replace and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists already; remove it or choose another folder")
    scratch, old = (out.with_name(f".{out.name}.{kind}-{os.getpid()}") for kind in ("new", "old"))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _clear_remains(out)
        scratch.mkdir()
        yield scratch
        _swap_in(scratch, out, old)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"cannot write {out}: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _swap_in(scratch: Path, out: Path, old: Path) -> None:
    """Give `scratch` the name `out`; what had that name is removed, or put back if this fails."""
    if not out.exists():
        scratch.rename(out)
        return
    out.rename(old)
    try:
        scratch.rename(out)
    except OSError:
        old.rename(out)
        raise
    if old.is_dir():
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.unlink()


def _clear_remains(out: Path) -> None:
    """Remove scratch folders of killed processes; put back what one had moved aside before it could replace it."""
    for path in out.parent.glob(f".{glob.escape(out.name)}.*-*"):
        kind, _, pid = path.name.removeprefix(f".{out.name}.").partition("-")
        if kind not in ("new", "old") or not pid.isdigit() or (int(pid) != os.getpid() and _is_running(int(pid))):
            continue
        if kind == "old" and not out.exists():
            path.rename(out)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _is_running(pid: int) -> bool:
    """True also where that cannot be asked without harm (Windows)."""
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
