"""Text → chunks of token ids, each with a header that says where it stands.

A chunk begins on an attention-chunk boundary, so local attention never crosses a source; it is cut at line ends, so a
fact is not cut from its key. Its header is one comment line: `# source:first_line`, and for Python the methods defined
in the chunk with their class, `# http/client.py:120 method putrequest in class HTTPConnection,`.
"""

import ast
import io
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

_DEFINITION = re.compile(r"^(\s*)(?:async\s+)?(def|class)\s+(\w+)")
_MIN_CHUNK = 16  # tokens; room for a header and some characters of text, whatever the tokenizer
_MAX_OUTLINE = 16  # methods named in one header
_MAX_NAME = 120  # characters of the source's name in a header
_MAX_PARSED = 1_000_000  # characters; a syntax tree takes a hundred times the memory of its text
_BLOCK = 1 << 18  # characters tokenised at a time; short lines take a thousand times their size while that lasts
_MAX_LINE = 1 << 16  # characters; a longer line is taken apart before it is tokenised, for it fits no chunk


class Encoder(Protocol):
    def encode(self, text: str) -> list[int]: ...
    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...


@dataclass(frozen=True)
class Chunk:
    """Token ids of `text` (header included), which holds lines first_line..last_line, 1-based and inclusive."""

    ids: list[int]
    text: str
    first_line: int
    last_line: int


class _Line(NamedTuple):
    number: int
    text: str
    tokens: int
    member: str  # "method name in class Class" where a method is defined, else ""


def cut(name: str, text: str, tokenizer: Encoder, chunk_size: int) -> Iterator[Chunk]:
    """Cut one source into chunks of at most chunk_size (>= 16) tokens, in order. A blank text gives no chunk.

    Lines end where an editor ends them, at \\n, \\r\\n or \\r alone. A last line without an end gets one. Chunks come
    while the text is cut: memory beyond the text's own does not grow with it.
    """
    assert chunk_size >= _MIN_CHUNK, f"a chunk of {chunk_size} tokens has no room for text"
    blocks = _blocks(name, text, tokenizer, chunk_size)
    lines: list[_Line] = []
    start = 0
    while True:
        stop = _fill(lines, start, chunk_size - 16)
        # Where the lines at hand end, the next block may hold more of this chunk.
        if stop == len(lines) and (block := next(blocks, None)):
            lines, start = lines[start:] + block, 0
            continue
        if start == stop:
            return
        while True:
            header = _header(name, lines[start:stop], tokenizer, chunk_size // 3)
            body = header + "".join(line.text for line in lines[start:stop])
            ids = tokenizer.encode(body)
            if len(ids) <= chunk_size:
                break
            # Header and joined lines may need more tokens than the lines counted alone: hand some lines on.
            if stop - start > 1:
                stop = max(start + 1, stop - max(1, (stop - start) * (len(ids) - chunk_size) // len(ids)))
            else:
                lines[start : start + 1] = _halves(lines[start])
        yield Chunk(ids, body, lines[start].number, lines[stop - 1].number)
        start = stop


def _halves(line: _Line) -> list[_Line]:
    middle = len(line.text) // 2
    assert middle, "a header and one character fit any chunk"
    return [line._replace(text=part, tokens=line.tokens // 2) for part in (line.text[:middle], line.text[middle:])]


def _fill(lines: list[_Line], start: int, budget: int) -> int:
    """End of the longest run of lines from `start` whose tokens fit the budget (at least one line, if there is one)."""
    stop, used = start, 0
    while stop < len(lines) and (stop == start or used + lines[stop].tokens <= budget):
        used += lines[stop].tokens
        stop += 1
    return stop


def _header(name: str, lines: list[_Line], tokenizer: Encoder, limit: int) -> str:
    """The header of these lines, shortened to `limit` tokens: first its methods go, then the start of the name."""
    members = list(dict.fromkeys(line.member for line in lines if line.member))[:_MAX_OUTLINE]
    # A name may hold anything; a header is one line of bounded length.
    shown = "".join(c if c.isprintable() else "?" for c in name)[-_MAX_NAME:]
    while True:
        header = f"# {shown}:{lines[0].number}" + "".join(f" {m}," for m in members) + "\n"
        # No tokenizer makes more tokens than bytes.
        if len(header.encode()) <= limit or len(tokenizer.encode(header)) <= limit or not shown:
            return header
        if members:
            members.pop()
        else:
            shown = shown[len(shown) // 2 + 1 :]


def _blocks(name: str, text: str, tokenizer: Encoder, chunk_size: int) -> Iterator[list[_Line]]:
    """The lines of a text with their tokens, about _BLOCK characters at a time."""
    if not text.strip():
        return
    members = _members(text) if name.endswith(".py") else {}
    block, size = list[_Line](), 0
    for number, line in enumerate(_lines(text), 1):
        line = line if line.endswith(("\n", "\r")) else line + "\n"
        for piece in _pieces(line, chunk_size) if len(line) > _MAX_LINE else (line,):
            block.append(_Line(number, piece, 0, members.get(number, "")))
            size += len(piece)
            if size >= _BLOCK:
                yield _counted(block, tokenizer, chunk_size)
                block, size = [], 0
    if block:
        yield _counted(block, tokenizer, chunk_size)


def _lines(text: str) -> Iterator[str]:
    return io.StringIO(text, newline="")  # str.splitlines would also cut at form feeds and the like


def _pieces(line: str, chunk_size: int) -> Iterator[str]:
    # A character needs at most four tokens (one per UTF-8 byte), so a piece this short always fits.
    width = chunk_size // 8
    return (line[i : i + width] for i in range(0, len(line), width))


def _counted(block: list[_Line], tokenizer: Encoder, chunk_size: int) -> list[_Line]:
    """These lines with their tokens, those of more than half a chunk in pieces."""
    lines: list[_Line] = []
    for line, ids in zip(block, tokenizer.encode_batch([line.text for line in block]), strict=True):
        if len(ids) <= chunk_size // 2:
            lines.append(line._replace(tokens=len(ids)))
            continue
        pieces = list(_pieces(line.text, chunk_size))
        counts = map(len, tokenizer.encode_batch(pieces))
        lines += [line._replace(text=piece, tokens=n) for piece, n in zip(pieces, counts, strict=True)]
    return lines


def _members(text: str) -> dict[int, str]:
    """Of Python: "method name in class Class" for each line that defines a method."""
    if len(text) > _MAX_PARSED:
        return _members_by_indent(text)
    try:
        with warnings.catch_warnings(action="ignore"):  # of odd escapes, say
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # broken, not Python 3, or nested too deeply
        return _members_by_indent(text)
    members: dict[int, str] = {}
    blocks: list[tuple[ast.AST, str]] = [(tree, "")]
    while blocks:
        block, owner = blocks.pop()
        for node in ast.iter_child_nodes(block):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                members[node.lineno] = f"method {node.name} in class {owner}" if owner else ""
                blocks.append((node, ""))
            elif isinstance(node, ast.ClassDef):
                blocks.append((node, node.name))
            elif isinstance(node, ast.stmt | ast.ExceptHandler | ast.match_case):
                blocks.append((node, owner))
    return members


def _members_by_indent(text: str) -> dict[int, str]:
    """As `_members` for text that does not parse: a method is a def right below a class, by indentation."""
    members, open_blocks = dict[int, str](), list[tuple[int, str, bool]]()  # (indent, name, is a class)
    for number, line in enumerate(_lines(text), 1):
        match = _DEFINITION.match(line)
        if match:
            indent = len(match[1].expandtabs())
            while open_blocks and open_blocks[-1][0] >= indent:
                open_blocks.pop()
            is_class = match[2] == "class"
            if not is_class and open_blocks and open_blocks[-1][2]:
                members[number] = f"method {match[3]} in class {open_blocks[-1][1]}"
            open_blocks.append((indent, match[3], is_class))
    return members
