"""The lines of a source, from the context alone."""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import herd
from herd.errors import ContextError

LINE = st.text(st.sampled_from("ab é\t𝄞"), max_size=120)


@settings(max_examples=25)
@given(
    st.lists(st.tuples(LINE, st.sampled_from(["\n", "\r\n", "\r"])), min_size=1, max_size=12),
    st.integers(1, 14),
    st.integers(0, 14),
)
def test_lines_are_those_of_the_file(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, rows: list[tuple[str, str]], first: int, count: int
) -> None:
    folder = tmp_path_factory.mktemp("shown")
    text = "".join(line + end for line, end in rows) + "end\n"
    (folder / "notes.txt").write_bytes(text.encode())
    context = herd.Context.open(folder / "ctx", herd.load(tiny_model))
    context.read([folder / "notes.txt"])
    (folder / "notes.txt").unlink()
    expected = re.split(r"\r\n|\n|\r", text)[:-1]
    found, last = context.lines(context.sources[0].name, first, first + count)
    assert (found, last) == (expected[first - 1 : first - 1 + count], len(expected))


def test_a_source_that_is_not_there(tmp_path: Path, tiny_model: Path) -> None:
    context = herd.Context.open(tmp_path / "ctx", herd.load(tiny_model))
    with pytest.raises(ContextError, match=r"has no source '\.\./etc/passwd'; it may have been taken out"):
        context.lines("../etc/passwd")
