"""Questions about the Python or C text of one chunk, found by regular expressions (a chunk is a partial file)."""

from __future__ import annotations

import ast
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from random import Random

from herd.data import words
from herd.data.phrasings import CODE
from herd.data.question import Question
from herd.prompt.quotes import MAX_QUOTE, MAX_SIGNATURE, bracket_end, first_sentence, line_end

FAMILIES = ("constant", "parameters", "class", "docstring")
MAX_LITERAL = 60

_HEADER = re.compile(r"# (.+?):(\d+)(?= |$)")
_ENTRY = re.compile(r" method (\w+) in class ([\w.]+)(?=,|$)")
_ASSIGN = re.compile(r"^( *)([A-Za-z_]\w*)( *(?::[^=\n]{1,40})?= *)([^=\s#][^\n]*)$", re.M)
_DEF = re.compile(r"^( *)(?:async )?(def (\w+)\()", re.M)
_CLASS = re.compile(r"^( *)class (\w+)", re.M)
_DEFINE = re.compile(r"^[ \t]*#[ \t]*define[ \t]+(\w+)[ \t]+(\S[^\n]*?)[ \t]*(?:/\*[^\n]*|//[^\n]*)?$", re.M)
_TOP_LEVEL = re.compile(r"^[^\s#)\]}]", re.M)
_NUMBER_NODES = (ast.Expression, ast.Constant, ast.BinOp, ast.UnaryOp, ast.Tuple, ast.operator, ast.unaryop, ast.Load)


def source_of(chunk_text: str) -> str:
    """The source named in the header line, "" when there is none."""
    found = _HEADER.match(chunk_text)
    return found.group(1) if found else ""


def definitions(text: str) -> Counter[str]:
    """How often each name is defined (assigned, def, class, #define) anywhere in a text, at any indentation."""
    names: Counter[str] = Counter()
    for pattern, group in ((_ASSIGN, 2), (_DEF, 3), (_CLASS, 2), (_DEFINE, 1)):
        names.update(found.group(group) for found in pattern.finditer(text))
    return names


def questions(chunk_text: str, rng: Random, split: str = "train") -> list[Question]:
    """Every question of the four families that this chunk answers, one phrasing each; split: train | held_out."""
    counts = definitions(chunk_text)
    source = source_of(chunk_text)
    drafts = [*_constants(chunk_text), *_defines(chunk_text), *_functions(chunk_text), *_classes(chunk_text)]
    asked: list[Question] = []
    for family, name, copied, evidence, value in drafts:
        if counts[name] != 1 or len(name) < 3 or name.startswith("__"):
            continue
        if value in ("()", "(self)", "(cls)") and rng.random() < 0.7:  # half of all functions: they would crowd out
            continue
        if chunk_text.count(evidence) == 1 and evidence.count(copied) == 1:
            text = phrase(family, name, source, rng, split)
            # A docstring is quoted with its signature; how the answer begins says that it goes on after that.
            answer = f"docs of {name}: {copied}" if family == "docstring" else copied
            asked.append(Question(family, text, answer, copied, evidence, value, key=name, kind=family))
    return asked


def phrase(family: str, name: str, source: str, rng: Random, split: str = "train") -> str:
    """One wording of a question; names the file (or its last part) in about a quarter of the cases."""
    plain, with_file = CODE[family][split]
    if source and rng.random() < 0.25:
        place = source if rng.random() < 0.5 else source.rsplit("/", 1)[-1]
        return rng.choice(with_file).format(name=name, file=place)
    return rng.choice(plain).format(name=name)


def absent(family: str, rng: Random, present: Callable[[str], bool], split: str = "train") -> Question:
    """A question for an invented name for which `present(name)` is false."""
    while True:
        name = words.identifier(rng, split, upper=family == "constant" and rng.random() < 0.7)
        if not present(name):
            text = phrase(family, name, "", rng, split)
            return Question(family, text, "", "", "", "", key=name, kind=family).as_absent()


Draft = tuple[str, str, str, str, str]  # family, name, copied, evidence, value


def _constants(text: str) -> list[Draft]:
    tops = [found.start() for found in _TOP_LEVEL.finditer(text)]
    drafts: list[Draft] = []
    for found in _ASSIGN.finditer(text):
        indent, name, sign, rest = found.groups()
        literal = _literal(rest)
        if not literal or (indent and not _in_class_body(text, tops, found.start(), indent)):
            continue
        copied = f"{name}{sign}{rest}".rstrip()
        if len(copied) <= MAX_QUOTE:
            drafts.append(("constant", name, copied, _whole_line(text, found.start()), literal))
    return drafts


def _in_class_body(text: str, tops: list[int], at: int, indent: str) -> bool:
    """Whether the last line before `at` that is not indented opens a class (`tops`: where such lines begin)."""
    index = bisect_left(tops, at)
    return len(indent) == 4 and index > 0 and text.startswith("class ", tops[index - 1])


def _literal(rest: str) -> str:
    """The short literal that a right-hand side consists of ("" if it is anything else)."""
    value = rest.rstrip()
    if "#" in value and value[0] not in "\"'":
        value = value[: value.index("#")].rstrip()
    trivial = ("None", "True", "False", "()", "[]", "{}", '""', "''")
    if not 1 <= len(value) <= MAX_LITERAL or "\\" in value or value in trivial:
        return ""
    if value[0] not in "0123456789-\"'([{brBR.~":
        return ""
    try:
        tree = ast.parse(value, mode="eval")
        if not all(isinstance(node, _NUMBER_NODES) for node in ast.walk(tree)):
            ast.literal_eval(tree)
    except (SyntaxError, ValueError, TypeError, MemoryError):  # not a literal: nothing to ask
        return ""
    return value


def _defines(text: str) -> list[Draft]:
    drafts: list[Draft] = []
    for found in _DEFINE.finditer(text):
        name, value = found.groups()
        copied = text[found.start(1) : line_end(text, found.start())]
        if len(value) <= MAX_LITERAL and len(copied) <= MAX_QUOTE and not value.endswith("\\"):
            drafts.append(("constant", name, copied, _whole_line(text, found.start()), value))
    return drafts


def _functions(text: str) -> list[Draft]:
    drafts: list[Draft] = []
    for found in _DEF.finditer(text):
        name, start = found.group(3), found.start(2)
        end = bracket_end(text, found.end() - 1, start + MAX_SIGNATURE)
        if end < 0:
            continue
        value, last = text[found.end() - 1 : end], line_end(text, end)
        if last - start <= MAX_QUOTE:
            evidence = _whole_line(text, found.start())[:1] + text[found.start() : last]
            drafts.append(("parameters", name, text[start:last], evidence, value))
        spoken = first_sentence(text, end)
        if spoken and spoken[1] - spoken[0] >= 12:
            last = line_end(text, spoken[1])
            drafts.append(("docstring", name, text[start:last], text[found.start() : last], text[slice(*spoken)]))
    return drafts


def _classes(text: str) -> list[Draft]:
    header = text.split("\n", 1)[0]
    if not _HEADER.match(header):
        return []
    entries = _ENTRY.findall(header)
    often = Counter(method for method, _ in entries)
    drafts: list[Draft] = []
    for method, owner in entries:
        if often[method] == 1:
            copied = f"method {method} in class {owner}"
            drafts.append(("class", method, copied, f" {copied}", owner))
    return drafts


def _whole_line(text: str, start: int) -> str:
    """The whole line at `start` with the line breaks around it, so that it matches nowhere else."""
    end = text.find("\n", start)
    return text[max(start - 1, 0) : end + 1 if end >= 0 else len(text)]
