"""A folder is whole or absent, whenever the process that writes it is killed."""

import os
import signal
import sys

import pytest

from herd.checkpoint import files
from herd.errors import CheckpointError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")


def write_and_die(out, moment: str) -> None:
    """In a child process: replace `out`, killed while writing, before or after the old one is moved aside."""
    child = os.fork()
    if child:
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        return
    try:
        with files.new_folder(out, replace=True) as folder:
            (folder / "text").write_text("half")
            if moment == "writing":
                os.kill(os.getpid(), signal.SIGKILL)
            (folder / "text").write_text("new")
            rename, seen = type(out).rename, []

            def rename_and_die(path, target):
                if moment == "before" or (moment == "between" and seen):
                    os.kill(os.getpid(), signal.SIGKILL)
                seen.append(path)
                rename(path, target)
                if moment == "after" and len(seen) == 2:
                    os.kill(os.getpid(), signal.SIGKILL)

            type(out).rename = rename_and_die
    finally:
        os._exit(0)


@pytest.mark.parametrize(
    ("moment", "found"), [("writing", "old"), ("before", "old"), ("between", None), ("after", "new")]
)
def test_killed_while_replacing(tmp_path, moment, found):
    out = tmp_path / "model"
    out.mkdir()
    (out / "text").write_text("old")
    write_and_die(out, moment)
    assert ((out / "text").read_text() if out.exists() else None) == found
    files._clear_remains(out)  # what the next writer does first
    assert (out / "text").read_text() == (found or "old")
    with files.new_folder(out, replace=True) as folder:
        (folder / "text").write_text("next")
    assert (out / "text").read_text() == "next"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_failure_keeps_the_old_folder(tmp_path):
    out = tmp_path / "model"
    out.mkdir()
    (out / "text").write_text("old")
    with pytest.raises(CheckpointError, match="No space left"), files.new_folder(out, replace=True):
        raise OSError(28, "No space left on device")
    assert (out / "text").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
