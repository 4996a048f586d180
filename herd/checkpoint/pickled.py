"""Tensors of a `.pth` file, memory-mapped. Such a file is a pickle in a zip archive: neither is trusted."""

import io
import pickletools
import zipfile
from pathlib import Path

import torch

from herd.errors import CheckpointError

_LONGEST = 16 << 20  # bytes of the pickle; a real one has some hundred kilobytes
# What a dictionary of tensors needs; the last three are how Meta's files keep the state of other engines.
_ALLOWED = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    *(
        ("torch", f"{kind}Storage")
        for kind in ("Float", "BFloat16", "Half", "Byte", "Char", "Int", "Long", "Bool", "Double")
    ),
    ("_io", "BytesIO"),
    ("_codecs", "encode"),
    ("copyreg", "__newobj__"),
}
_NEED_STRINGS = ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4", "INST", "OBJ", "NEWOBJ_EX")


def read_pickled(path: Path) -> dict[str, object]:
    """The dictionary that a file holds. CheckpointError if it is damaged, or anything but tensors by name."""
    try:
        _check(path)
        with torch.serialization.safe_globals([io.BytesIO]):
            value = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, EOFError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    except Exception as error:  # unpickling damaged bytes can raise anything
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path} is not a readable .pth file: {reason}") from error
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise CheckpointError(f"{path} must hold tensors by name, not {type(value).__name__}")
    return value


def _check(path: Path) -> None:
    """ValueError if the archive could expand, reach beyond the file, or its pickle names more than tensors need."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
                raise ValueError(f"{entry.filename!r} is compressed; weights are stored as they are")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("its parts are larger than the file")
        pickles = [entry for entry in entries if entry.filename.endswith(".pkl")]
        if len(pickles) != 1 or pickles[0].file_size > _LONGEST:
            raise ValueError(f"it has {len(pickles)} pickles, or one of more than {_LONGEST >> 20} MiB")
        content = archive.read(pickles[0])
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in _NEED_STRINGS:
            raise ValueError(f"its pickle uses {opcode.name}, which weights do not need")
        if opcode.name == "GLOBAL" and tuple(str(argument).split(" ", 1)) not in _ALLOWED:
            raise ValueError(f"its pickle names {argument!r}, which weights do not need")
