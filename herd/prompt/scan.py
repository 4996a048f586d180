"""Reads values within text that is still being said: where a literal of Python or JSON ends, and what it says.

Each reader is a generator, which yields None when it needs more text than there is, gives parts of a call as soon as
they are said, and raises NoCall.
"""

import ast
import json
import math
import re
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from herd.prompt.tools import CallPart

T = TypeVar("T")
Reader = Generator[CallPart | None, None, T]

_DEPTH = 64  # brackets within brackets
_AHEAD = 16  # characters; no mark is longer
BLANK = re.compile(r"\s{0,256}")
_CLOSE = {"(": ")", "[": "]", "{": "}"}
_PYTHON_MARKS = re.compile(r"\"\"\"|'''|[\"'()\[\]{},]")
_JSON_MARKS = re.compile(r"[\"\[\]{},]")
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
    """What was said and not given back yet; it grows until it is ended. names: that may be called; None: any."""

    def __init__(self, names: frozenset[str] | None = None) -> None:
        self.text, self.names = "", names
        self.ended = False

    def allows(self, name: str) -> bool:
        return self.names is None or name in self.names


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


@dataclass(frozen=True)
class Language:
    """How values are written. of: what a literal says. texts: what texts are made of, whole, by their quotes, as far as
    each character stands for itself."""

    marks: re.Pattern[str]
    of: Callable[[str], Any]
    escape: re.Pattern[str]
    texts: Mapping[str, re.Pattern[str]]

    @classmethod
    def with_escapes(cls, marks: re.Pattern[str], of: Callable[[str], Any], escape: str, *quotes: str) -> "Language":
        texts = dict[str, re.Pattern[str]]()
        for quote in quotes:
            one = rf"[^\\{quote[0]}\r]|{escape}"
            if len(quote) == 3:  # one or two of them that do not end it
                one += rf"|{quote[0]}(?!{quote[1:]})(?=..)"
            texts[quote] = re.compile(f"(?:{one})*", re.DOTALL)
        return cls(marks, of, re.compile(escape, re.DOTALL), texts)


_OCTAL = r"[0-7]{3}|[0-7]{1,2}(?=[^0-7])"
PYTHON = Language.with_escapes(
    _PYTHON_MARKS, of_python, rf"\\(?:[^xuUN0-7\r]|x..|u....|U.{{8}}|N{{[^}}]*}}|{_OCTAL})", *_STRING_MARKS
)
JSON = Language.with_escapes(_JSON_MARKS, of_json, r"\\(?:[^u]|u....)", '"')


def value(said: Said, at: int, language: Language, told: bool = False) -> Reader[tuple[int, Any]]:
    """A value, and where the comma or closing bracket behind it is. told: it is given as JSON, too, a text while it is
    being said, all else as soon as it is whole."""
    reader, sent, seen = value_end(said, at, language.marks), "", at
    while True:
        try:
            next(reader)
        except StopIteration as done:
            end: int = done.value
            break
        if told:
            seen, piece = _more(said.text, at, seen, language)
            if piece:
                piece = piece if sent else f'"{piece}'
                sent += piece
                yield CallPart(arguments=piece)
        yield None
    found = language.of(said.text[at:end])
    if told:
        whole = json.dumps(found, allow_nan=False)
        assert whole.startswith(sent), "what was given of a text is how it begins"
        yield CallPart(arguments=whole[len(sent) :])
    return end, found


def _more(text: str, at: int, seen: int, language: Language) -> tuple[int, str]:
    """What a text that begins at `at` goes on with behind `seen`, as JSON, and how far that is."""
    three = text[at : at + 3]
    quote = three if three in language.texts else three[:1]
    if quote not in language.texts or (three in _HALF and 3 * quote in language.texts):
        return seen, ""
    seen = max(seen, at + len(quote))
    found = language.texts[quote].match(text, seen)
    assert found is not None
    said = language.escape.sub(lambda escape: language.of(f'"{escape[0]}"'), found[0])
    return found.end(), json.dumps(said)[1:-1]


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
            at = yield from string_end(said, mark, at)
        if len(closing) > _DEPTH:
            raise NoCall
    raise NoCall


def string_end(said: Said, quote: str, at: int) -> Reader[int]:
    """Where the text ends that goes on at `at`."""
    while found := (yield from find(said, _STRING_MARKS[quote], at)):
        if found[0] == quote:
            return found.end()
        at = found.end() + 1
    raise NoCall


def find(said: Said, marks: re.Pattern[str], at: int) -> Reader[re.Match[str] | None]:
    """The next of some marks; None if the text ends before."""
    while True:
        found = marks.search(said.text, at)
        half = marks is _PYTHON_MARKS and found and said.text[found.start() : found.start() + 3] in _HALF
        if found and (said.ended or not half):
            return found
        if said.ended:
            return None
        at = max(at, found.start() if found else len(said.text) - _AHEAD)
        yield None


def run(said: Said, at: int, pattern: re.Pattern[str]) -> Reader[int]:
    """Where characters of a kind, if there are any, end."""
    while True:
        found = pattern.match(said.text, at)
        end = found.end() if found else at
        if end < len(said.text) or said.ended:
            return end
        yield None


def goes_on(said: Said, at: int, words: str) -> Reader[bool]:
    """Whether these words come next."""
    while not said.text.startswith(words, at) and words.startswith(said.text[at:]) and not said.ended:
        yield None
    return said.text.startswith(words, at)
