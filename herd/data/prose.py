"""Questions about man pages (options) and dictionaries (definitions), where the text has a clear pattern."""

from __future__ import annotations

import re
from collections import Counter
from random import Random

from herd.data.phrasings import PROSE
from herd.data.question import Question
from herd.prompt.quotes import line_end

FAMILIES = ("option", "definition")
MAX_QUOTE = 220

# `    -x, --long=ARG` followed by its description on the same line (two blanks) or on deeper-indented lines.
_ARGUMENT = r"(?:[ =]\[?[A-Z<][\w<>|-]*\]?)?"
_OPTION = re.compile(
    rf"^([ \t]*)((?:-{{1,2}}[A-Za-z0-9][\w-]*){_ARGUMENT}(?:, -{{1,2}}[\w-]+{_ARGUMENT})*)"
    r"(?:[ \t]{2,}|[ \t]*\n\1[ \t]+)(?=[A-Z])",
    re.M,
)
# `Headword \Head"word\, n. [...] ...` of GCIDE, `headword` + `     n 1: text` of WordNet, `headword : ...` of FOLDOC
_GCIDE = re.compile(r"^([A-Z][A-Za-z-]{3,24}) \\[^\\\n]{3,40}\\,? [a-z. ]{1,12}", re.M)
_WORDNET = re.compile(r"^([A-Za-z][A-Za-z'-]{2,24})\n {4,6}(?:n|v|adj|adv) (?:1: )?(?=[a-z(])", re.M)
_END = re.compile(r"[.;](?=\s|$)|(?=\n[ \t]*\n)")


def questions(chunk_text: str, rng: Random, split: str = "train") -> list[Question]:
    """Options with the first sentence of their meaning, and definitions, each defined once in the chunk."""
    drafts = [*_options(chunk_text), *_definitions(chunk_text)]
    often = Counter(name for _, name, _, _ in drafts)
    asked: list[Question] = []
    for family, name, copied, value in drafts:
        if often[name] == 1 and chunk_text.count(copied) == 1:
            text = rng.choice(PROSE[family][split]).format(name=name)
            asked.append(Question(family, text, copied, copied, copied, value, key=name, kind=family))
    return asked


def _quote(text: str, start: int, body: int) -> tuple[str, str]:
    """(quote from `start` to the end of its last line, sentence at `body` in it); empty if it is too long."""
    found = _END.search(text, body, min(len(text), start + MAX_QUOTE))
    if found is None or found.end() - body < 15:
        return "", ""
    return text[start : line_end(text, found.end())], text[body : found.end()]


def _options(text: str) -> list[tuple[str, str, str, str]]:
    drafts = []
    for found in _OPTION.finditer(text):
        copied, value = _quote(text, found.start(2), found.end())
        names = re.findall(r"-{1,2}[A-Za-z0-9][\w-]*", found.group(2))
        if copied and names:
            drafts.append(("option", names[-1], copied, value))
    return drafts


def _definitions(text: str) -> list[tuple[str, str, str, str]]:
    drafts = []
    for pattern in (_GCIDE, _WORDNET):
        for found in pattern.finditer(text):
            copied, value = _quote(text, found.start(1), found.end())
            if copied:
                drafts.append(("definition", found.group(1), copied, value))
    return drafts
