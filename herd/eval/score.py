"""When an answer counts as exact. Runs of blanks and line breaks compare equal everywhere; nothing else is forgiven.

An answer is exact if, stripped, it equals the expected answer, or if its *value slot* equals the expected value, alone
or with the rest of the line that the answer quotes:

- constant: the text after the last ` = ` (for C, after `NAME `);
- parameters: the text from the first `(` to the end, and the name stands before it;
- class: the text after the last `in class `, without a full stop at its end;
- docstring, option, definition: the end of the answer, and the name stands before it;
- fact: the same, always with the rest of the line.
"""

from __future__ import annotations

import re

from herd.data.question import Question
from herd.prompt.quotes import NOT_IN_CONTEXT


def squeeze(text: str) -> str:
    """The text without outer blanks, runs of blanks and line breaks made one blank."""
    return " ".join(text.split())


def exact(answer: str, question: Question) -> bool:
    """Whether `answer` gives exactly the value that the question asks for (see the module)."""
    given, value = squeeze(answer), squeeze(question.value)
    if question.value == NOT_IN_CONTEXT:
        return says_absent(answer)
    if given == squeeze(question.answer):
        return True
    if says_absent(answer):
        return False
    quoted = _quoted(question)
    slot = _slot(given, question, value, quoted)
    return slot in (value, quoted) or slot.removesuffix(".") == value.removesuffix(".")


def value_right(answer: str, question: Question) -> bool:
    """Whether the answer ends with the value and the rest of the line it stands in, whatever it names before."""
    return not says_absent(answer) and _ends(squeeze(answer), _quoted(question))


def _quoted(question: Question) -> str:
    """The value with the rest of the line that the answer quotes."""
    expected = squeeze(question.answer)
    return expected[expected.find(squeeze(question.value), expected.find(question.key) + len(question.key)) :]


def _slot(given: str, question: Question, value: str, quoted: str) -> str:
    family, key = question.family, question.key
    if family == "parameters":
        at = given.find("(")
        return given[at:] if at >= 0 and given[:at].endswith(key) else ""
    if family == "class":
        return given.rpartition("in class ")[2] if "in class " in given else ""
    if family in ("docstring", "option", "definition", "fact"):
        ends = (quoted,) if family == "fact" else (quoted, value)
        return next((end for end in ends if _ends(given, end) and key in given.removesuffix(end)), "")
    found = list(re.finditer(r" = ", given))
    if not found:
        return given.removeprefix("#define ").removeprefix(f"{key} ")
    return given[found[-1].end() :]


def _ends(given: str, end: str) -> bool:
    """Whether a text ends with these words, not just with these letters."""
    before = given.removesuffix(end)
    return before != given and not (before[-1:].isalnum() and end[0].isalnum())


def lenient(answer: str, question: Question) -> bool:
    """Whether the value stands anywhere in the answer (how the unchanged base model is scored)."""
    return squeeze(question.value) in squeeze(answer)


def says_absent(answer: str) -> bool:
    """Whether the answer says that the context does not hold what was asked."""
    return NOT_IN_CONTEXT in squeeze(answer).lower()


def share(right: int, total: int) -> float | None:
    """right / total, rounded to four places; None of nothing."""
    return round(right / total, 4) if total else None
