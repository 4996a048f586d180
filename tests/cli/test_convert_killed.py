"""`herd convert` that is killed and given again: the bytes of a run that was left alone, and no layer is made twice."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from herd import kernels

pytestmark = pytest.mark.skipif(
    sys.platform == "win32" or not kernels.runs_layers(torch.empty(0), 64),
    reason="needs SIGKILL and the native library, which packs",
)
# The command, which writes down what layers it packs, and is killed when so many tensors are written.
COMMAND = """
import os, signal, sys
from herd.__main__ import main
from herd.checkpoint import packing, streaming

left, log = int(sys.argv.pop(1)), open(sys.argv.pop(1), "w", buffering=1)
pack_block, as_bytes = packing.pack_block, streaming.as_bytes

def pack(block, formats):
    print(block.self_attn.layer, file=log)
    return pack_block(block, formats)

def write(tensor):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    return as_bytes(tensor)

packing.pack_block, streaming.as_bytes = pack, write
main()
"""
DENSE, EXPERTS = 6, 11  # tensors in the files of layers 0 and 2, and of 1 and 3


def sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}


def test_calibrated_weights_are_gone_on_with_after_every_kill(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("aab abba ünï " * 100)
    options = ["--format", "herd", "--dtype", "int4:32", "--calibrate", str(tmp_path / "text")]

    def convert(name: str, kill: int = -1) -> tuple[int, list[int]]:
        """Exit code, and the layers that were packed."""
        log, out = tmp_path / "log", tmp_path / name
        command = [sys.executable, "-c", COMMAND, str(kill), str(log), "convert", str(plain), str(out), *options]
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        assert done.stderr == ""
        return done.returncode, [int(line) for line in log.read_text().split()]

    half = list[dict[str, int]]()
    for kill, packed in (
        (DENSE // 2, [0]),  # while the first file is written
        (DENSE + 5, [0, 1]),  # the second
        (EXPERTS + DENSE, [1, 2, 3]),  # when the fourth begins
        (EXPERTS + 1, [3]),  # while the head's is written
    ):
        assert convert("out", kill) == (-signal.SIGKILL, packed)
        assert not (tmp_path / "out").exists()
        half.append(sizes(tmp_path / ".out.making" / "result"))
    assert convert("out") == (0, [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "out", "text"]
    assert convert("whole") == (0, [0, 1, 2, 3])
    whole = sizes(tmp_path / "whole")
    assert [any(0 < size < whole[name] for name, size in found.items()) for found in half] == [True, True, False, True]
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    assert len(list((tmp_path / "out").iterdir())) == len(list((tmp_path / "whole").iterdir()))
