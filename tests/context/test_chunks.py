"""Cutting: every line once and in order, no chunk over its size, editors' line numbers, one-line headers."""

import argparse
import random
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from herd.checkpoint.cria.base import home
from herd.context import chunks as chunking
from herd.context.chunks import Chunk, Encoder
from herd.prompt import Tokenizer

fast = settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


class Bytes:
    """A token per byte of UTF-8: the worst any byte-level tokenizer does."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", "surrogatepass"))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", "surrogatepass")


class Clumsy(Bytes):
    """Joined text takes more tokens than its parts: one per line end and two per `x` that follows a line end."""

    def encode(self, text: str) -> list[int]:
        return [0] * (len(re.findall(r"[\r\n]", text)) + 2 * len(re.findall(r"(?<=[\r\n])x", text)) + 1)


class Cubic(Bytes):
    """Two halves of a text take a quarter of its tokens."""

    def encode(self, text: str) -> list[int]:
        return [0] * (len(text) ** 3 // 1000 + 1)


def cut(name: str, text: str, tokenizer: Encoder, size: int) -> list[Chunk]:
    return list(chunking.cut(name, text, tokenizer, size))


def editor_lines(text: str) -> list[str]:
    """Lines with their ends, found a character at a time."""
    lines, line = [], ""
    for i, char in enumerate(text):
        line += char
        if char == "\n" or (char == "\r" and text[i + 1 : i + 2] != "\n"):
            lines.append(line)
            line = ""
    return [*lines, line] if line else lines


def check(name: str, text: str, chunks: list[Chunk], tokenizer: Encoder, size: int) -> None:
    """All that holds for every cut."""
    lines = editor_lines(text)
    if not text.strip():
        assert chunks == []
        return
    if not lines[-1].endswith(("\n", "\r")):
        lines[-1] += "\n"
    bodies = []
    for chunk in chunks:
        header, body = re.match(r"([^\n]*\n)(.*)", chunk.text, re.DOTALL).groups()
        assert chunk.ids == tokenizer.encode(chunk.text)
        assert len(chunk.ids) <= size
        assert body, "a chunk holds text"
        assert len(header.splitlines()) == 1
        assert re.match(rf"# .*:{chunk.first_line}( |$)", header.rstrip("\n"))
        # Each of the named lines contributes, whole or (first and last) in part.
        inside = "".join(lines[chunk.first_line - 1 : chunk.last_line])
        assert body in inside
        bodies.append(body)
    assert "".join(bodies) == "".join(lines)
    # Line numbers: walk the text and compare.
    at = 0
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    for chunk, body in zip(chunks, bodies, strict=True):
        assert starts[chunk.first_line - 1] <= at < starts[chunk.first_line]
        at += len(body)
        assert starts[chunk.last_line - 1] < at <= starts[chunk.last_line]


ends = ["\n", "\r\n", "\r", "\x0c", "\u2028", "\x85", "\x1c", "\x00", "\t", " ", "\ufeff", "\ud800"]
words = ["    def f(x):", "class A:", "é", "日本", "🦙", "x" * 50, "word ", "0123456789", "e\u0301"]
pieces = st.sampled_from(ends + words)
texts = st.one_of(st.lists(pieces, max_size=60).map("".join), st.text(max_size=300))
names = st.one_of(
    st.sampled_from(["a.py", "a\nb.py", "dir/\u2028\r.txt", "", "日本" * 100 + ".py", "x" * 500]), st.text(max_size=200)
)


@fast
@given(name=names, text=texts, size=st.sampled_from([16, 17, 33, 64, 200]))
@example(name="a.py", text="a\n\x0cb\u2028c\r\nd\re", size=32)
@example(name="a.py", text="class A:\n    def " + "m" * 60 + "(self): pass", size=64)
def test_every_character_once_in_order_within_the_size(name: str, text: str, size: int) -> None:
    tokenizer = Bytes()
    check(name, text, cut(name, text, tokenizer, size), tokenizer, size)


@fast
@given(text=st.lists(st.sampled_from(["x\n", "xx\r\n", "\n", "y\r"]), min_size=1, max_size=200).map("".join))
def test_a_tokenizer_that_needs_more_for_joined_lines(text: str) -> None:
    tokenizer = Clumsy()
    check("name", text, cut("name", text, tokenizer, 24), tokenizer, 24)


def test_a_line_that_fits_alone_but_not_with_its_header_is_cut() -> None:
    name, text, tokenizer = "n" * 100, "short\n" + "0123456789" * 3 + "\nshort\n", Cubic()
    chunks = cut(name, text, tokenizer, 64)
    check(name, text, chunks, tokenizer, 64)
    assert sum(chunk.first_line <= 2 <= chunk.last_line for chunk in chunks) > 1


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_numbers_are_those_of_an_editor(end: str) -> None:
    lines = [f"value {i}\x0c page\u2028 still line\x85 {i + 1}\x1d\x0b" for i in range(40)]
    chunks = cut("notes.txt", end.join(lines), Bytes(), 256)
    assert len(chunks) > 4
    for chunk in chunks:
        body = chunk.text.split("\n", 1)[1]
        assert body.startswith(lines[chunk.first_line - 1])
        assert body.rstrip("\r\n").endswith(lines[chunk.last_line - 1])
    assert [c.first_line for c in chunks[1:]] == [c.last_line + 1 for c in chunks[:-1]]
    assert (chunks[0].first_line, chunks[-1].last_line) == (1, 40)


def test_blank_texts_give_no_chunk() -> None:
    assert [cut("x", text, Bytes(), 64) for text in ("", " ", "\n\n", "\r\n\t\x0c\n")] == [[], [], [], []]


def test_leading_blank_lines_are_counted() -> None:
    (chunk,) = cut("x", "\n\n\nvalue", Bytes(), 64)
    assert (chunk.text, chunk.first_line, chunk.last_line) == ("# x:1\n\n\n\nvalue\n", 1, 4)


def test_a_long_line_is_cut_inside_and_keeps_its_number() -> None:
    line = "".join(chr(0x4E00 + i) for i in range(2000))
    chunks = cut("long.txt", f"before\n{line}\nafter\n", Bytes(), 512)
    assert "".join(c.text.split("\n", 1)[1] for c in chunks) == f"before\n{line}\nafter\n"
    assert {c.first_line for c in chunks[1:]} == {2}
    assert chunks[-1].last_line == 3
    assert min(len(c.ids) for c in chunks[:-1]) > 300, "pieces of one line fill their chunks"


def test_chunks_are_filled() -> None:
    rng = random.Random(0)
    text = "".join("word " * rng.randint(0, 12) + "\n" for _ in range(400))
    chunks = cut("a.txt", text, Bytes(), 512)
    assert len(chunks) <= len(text) // (512 - 60 - 16 - 20) + 1


@fast
@given(name=names, text=texts, size=st.sampled_from([16, 33, 200]), block=st.integers(1, 60))
def test_where_a_text_is_cut_does_not_depend_on_the_blocks_it_is_tokenised_in(
    name: str, text: str, size: int, block: int
) -> None:
    at_once = cut(name, text, Bytes(), size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunking, "_BLOCK", block)
        patch.setattr(chunking, "_MAX_LINE", 100)
        assert cut(name, text, Bytes(), size) == at_once


@pytest.mark.parametrize("text", ["a\n" * 300_000, "ab " * 300_000, "a fair line of text\n" * 30_000])
def test_a_long_text_is_never_tokenised_as_a_whole(text: str) -> None:
    class Recording(Bytes):
        largest = total = 0

        def encode_batch(self, texts: list[str]) -> list[list[int]]:
            size = sum(map(len, texts))
            self.largest, self.total = max(self.largest, size), self.total + size
            return super().encode_batch(texts)

    tokenizer = Recording()
    first = next(chunking.cut("x", text, tokenizer, 512))
    assert first.first_line == 1 and tokenizer.total == tokenizer.largest < 300_000, (
        "a chunk needs no more than a block"
    )
    assert sum(len(c.ids) for c in chunking.cut("x", text, tokenizer, 512)) > len(text)
    assert tokenizer.largest < 300_000


def test_a_chunk_too_small_for_text_is_refused() -> None:
    with pytest.raises(AssertionError, match="15 tokens"):
        cut("a", "b", Bytes(), 15)


SOURCE = '''\
import x


class Outer(Base):
    """A class: class Fake:
def not_code(self): pass
    """

    def first(self):
        def helper(): ...

    @property
    async def second(
        self,
    ): ...

    class Inner:
        if True:
            def third(self): ...

    def fourth(self): ...


if x:
    def alone(): ...
'''


def header_of(name: str, text: str, size: int = 2000) -> str:
    return cut(name, text, Bytes(), size)[0].text.split("\n", 1)[0]


def test_a_python_header_names_the_methods_with_their_class() -> None:
    owners = {"first": "Outer", "second": "Outer", "third": "Inner", "fourth": "Outer"}
    members = "".join(f" method {name} in class {owner}," for name, owner in owners.items())
    assert header_of("pkg/a.py", SOURCE) == f"# pkg/a.py:1{members}"
    assert header_of("pkg/a.txt", SOURCE) == "# pkg/a.txt:1"


@pytest.mark.parametrize("body", [" ...", "\n        return 1234567890"])
@pytest.mark.parametrize("end", ["", "print 'two'\n"])
def test_each_header_names_the_methods_of_its_own_chunk(body: str, end: str) -> None:
    text = "class A:\n" + "".join(f"    def m{i}(self):{body}\n" for i in range(40)) + end
    chunks = cut("a.py", text, Bytes(), 256)
    assert len(chunks) > 4
    for chunk in chunks:
        header, body = chunk.text.split("\n", 1)
        named = re.findall(r"(\w+) in class (\w+),", header)
        defined = [(m, "A") for m in re.findall(r"def (\w+)", body)]
        assert named == defined[: len(named)]
        assert len(named) == len(defined) or len(header) > 40, "only a full header leaves methods out"


@pytest.mark.parametrize("broken", ["print 'two'\n", "def f(:\n", "x = '\x00'\n", "(" * 300 + "\n"])
def test_methods_are_found_in_python_that_does_not_parse(broken: str) -> None:
    text = "class A:\n    def one(self): ...\n\ndef two(): ...\n" + broken
    assert header_of("a.py", text) == "# a.py:1 method one in class A,"


def test_methods_of_a_parsed_and_an_unparsed_file_agree_on_plain_code() -> None:
    text = "".join(
        f"class C{i}:\n    x = 1\n\n    def a{i}(s):\n        pass\n\n    async def b{i}(s): ...\n\n\ndef f{i}(): ...\n"
        for i in range(5)
    )
    assert header_of("a.py", text) == header_of("a.py", text + "print 'two'\n")


def test_headers_are_bounded() -> None:
    text = "class A:\n" + "".join(f"    def {'m' * 30}{i}(self): ...\n" for i in range(60))
    for chunk in cut("d/" * 300 + "a.py", text, Bytes(), 400):
        assert len(chunk.text.split("\n", 1)[0].encode()) <= 400 // 3
    many = "class A:\n" + "".join(f"    def m{i}(self): ...\n" for i in range(60))
    assert header_of("a.py", many, 5000).count(" in class A,") == 16
    assert header_of("d/" * 300 + "a.py", "x", 5000) == "# " + ("d/" * 300 + "a.py")[-120:] + ":1"


def test_a_name_with_line_ends_stays_on_one_line() -> None:
    assert header_of("a\nb\r\u2028\x0cc\ud800.txt", "x") == "# a?b???c?.txt:1"


# Cria's tokenizer


@pytest.fixture(scope="module")
def cria() -> Tokenizer:
    folder = home() / "cria"
    if not (folder / "tokenizer.json").is_file():
        pytest.skip(f"no tokenizer in {folder}: run `make cria`")
    return Tokenizer.load(folder)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(name=names, text=texts, size=st.sampled_from([24, 64, 512]))
def test_every_property_holds_with_crias_tokenizer(cria: Tokenizer, name: str, text: str, size: int) -> None:
    text = text.replace("\ud800", "")
    check(name, text, cut(name, text, cria, size), cria, size)


def test_real_source_with_crias_tokenizer(cria: Tokenizer) -> None:
    """This file and a module of the standard library fill their chunks well, at any chunk size."""
    for path in (Path(__file__), Path(argparse.__file__)):
        text = path.read_text(encoding="utf-8")
        for size in (128, 512):
            chunks = cut(path.name, text, cria, size)
            check(path.name, text, chunks, cria, size)
            if size == 512:
                assert sum(len(c.ids) for c in chunks) > 0.85 * size * len(chunks)
