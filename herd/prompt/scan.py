"""Reads values within text that is still being said: where a literal of Python or JSON ends, and what it says.

Each reader is a generator, which yields when it needs more text than there is, and raises NoCall.
"""

import ast
import json
import math
import re
from collections.abc import Generator
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")
Reader = Generator[None, None, T]

_DEPTH = 64  # brackets within brackets
_AHEAD = 16  # characters; no mark is longer
_CLOSE = {"(": ")", "[": "]", "{": "}"}
PYTHON_MARKS = re.compile(r"\"\"\"|'''|[\"'()\[\]{},]")
JSON_MARKS = re.compile(r"[\"\[\]{}]")
_STRING_MARKS = {quote: re.compile(rf"\\|{quote}") for quote in ('"', "'", '"""', "'''")}
_HALF = {'"', '""', "'", "''"}  # may go on to three quotes
# What literals are made of: nothing that could be evaluated or that Python warns of.
_STRING = r"""\"\"\"(?:[^\\]|\\.)*?\"\"\"|'''(?:[^\\]|\\.)*?'''|"(?:[^"\\]|\\.)*+"|'(?:[^'\\]|\\.)*+'"""
_NUMBER = r"-?(?:\d+\.?\d*+|\.\d++)(?:[eE][+-]?\d++)?+(?![\w.])"
_LITERAL = re.compile(rf"(?:[\s\[\](){{}},:]|\b(?:True|False|None|true|false|null)\b|{_NUMBER}|{_STRING})*+", re.DOTALL)
_STRINGS = re.compile(_STRING, re.DOTALL)
_ESCAPE_OR_END = re.compile(r"\\(.)|[\r\n]", re.DOTALL)
_ESCAPES = set("\n\\'\"abfnrtvxuUN01234567")
_CONSTANTS = {"true": True, "false": False, "null": None}


class NoCall(Exception):
    """What was read is no call; so many characters of it are text for certain."""

    def __init__(self, certain: int = 1):
        super().__init__(certain)
        self.certain = certain


class Said:
    """What was said and not given back yet; it grows until it is ended."""

    def __init__(self) -> None:
        self.text = ""
        self.ended = False


def no_call(certain: int = 1) -> NoReturn:
    """Raise NoCall."""
    raise NoCall(certain)


def of_json(source: str) -> Any:
    """The value of JSON, in whose texts lines may end. NoCall if it is none, or names a key twice."""
    try:
        return json.loads(
            source, strict=False, object_pairs_hook=_unique, parse_float=_finite, parse_constant=lambda _: no_call()
        )
    except (ValueError, RecursionError) as error:
        raise NoCall from error


def of_python(source: str) -> Any:
    """The value of a literal of Python that JSON can say, too. `true`, `false` and `null` may stand in it, and ends of
    lines in its texts."""
    if not source.strip() or not _LITERAL.fullmatch(source):
        raise NoCall
    try:
        return _value(ast.parse(f"({_STRINGS.sub(_strict, source)}\n)", mode="eval").body)
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise NoCall from error


def _strict(string: re.Match[str]) -> str:
    """A string as Python takes it without an error or a warning."""
    ends = {} if string[0].startswith(('"""', "'''")) else {"\n": "\\n", "\r": "\\r"}

    def one(found: re.Match[str]) -> str:
        if found[1] is None:
            return ends.get(found[0], found[0])
        return found[0] if found[1] in _ESCAPES else "\\" + found[0]  # what escapes nothing stands for itself

    return _ESCAPE_OR_END.sub(one, string[0])


def _value(node: ast.expr | None) -> Any:
    match node:
        case ast.Constant(float() as value):
            return value if math.isfinite(value) else no_call()
        case ast.Constant(str() | int() | None as value):
            return value
        case ast.UnaryOp(ast.USub(), ast.Constant(int() | float()) as number):
            return -_value(number)
        case ast.List(items) | ast.Tuple(items):
            return [_value(item) for item in items]
        case ast.Dict(keys, values):
            names = [key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str)]
            return _unique(list(zip(names, map(_value, values), strict=True))) if len(names) == len(keys) else no_call()
        case ast.Name(name) if name in _CONSTANTS:
            return _CONSTANTS[name]
    raise NoCall


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else no_call()


def _finite(source: str) -> float:
    value = float(source)
    return value if math.isfinite(value) else no_call()


def value_end(said: Said, at: int, marks: re.Pattern[str]) -> Reader[int]:
    """Where the first comma or closing bracket is that does not belong to the value itself."""
    closing = list[str]()
    while found := (yield from find(said, marks, at)):
        mark, at = found[0], found.end()
        if mark in _CLOSE:
            closing.append(_CLOSE[mark])
        elif mark in ")]}":
            if not closing:
                return found.start()
            if closing.pop() != mark:
                raise NoCall
        elif mark == ",":
            if not closing:
                return found.start()
        else:
            at = yield from _string_end(said, mark, at)
        if len(closing) > _DEPTH:
            raise NoCall
    raise NoCall


def _string_end(said: Said, quote: str, at: int) -> Reader[int]:
    while found := (yield from find(said, _STRING_MARKS[quote], at)):
        if found[0] == quote:
            return found.end()
        at = found.end() + 1
    raise NoCall


def find(said: Said, marks: re.Pattern[str], at: int) -> Reader[re.Match[str] | None]:
    """The next of some marks; None if the text ends before."""
    while True:
        found = marks.search(said.text, at)
        half = marks is PYTHON_MARKS and found and said.text[found.start() : found.start() + 3] in _HALF
        if found and (said.ended or not half):
            return found
        if said.ended:
            return None
        at = max(at, found.start() if found else len(said.text) - _AHEAD)
        yield


def run(said: Said, at: int, pattern: re.Pattern[str]) -> Reader[int]:
    """Where characters of a kind, if there are any, end."""
    while True:
        found = pattern.match(said.text, at)
        end = found.end() if found else at
        if end < len(said.text) or said.ended:
            return end
        yield


def goes_on(said: Said, at: int, words: str) -> Reader[bool]:
    """Whether these words come next."""
    while not said.text.startswith(words, at) and words.startswith(said.text[at:]) and not said.ended:
        yield
    return said.text.startswith(words, at)
