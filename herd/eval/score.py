"""When an answer counts as exact. Runs of blanks and line breaks compare equal everywhere; nothing else is forgiven.

An answer is exact if, stripped, it equals the expected answer, or if its *value slot* equals the expected value:

- constant: the text after the last ` = ` (for C, after `NAME `);
- parameters: the text from the first `(` to the end, and the name stands before it;
- class: the text after the last `in class `, without a full stop at its end;
- docstring, option, definition: the text after the signature or headword, that is, the answer ends with the value;
- fact: the end of the answer, with what follows the value in the quoted line.
"""

from __future__ import annotations

import re

from herd.data.question import NOT_IN_CONTEXT, Question


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
    slot = _slot(given, question)
    return slot == value or slot.removesuffix(".") == value.removesuffix(".")


def _slot(given: str, question: Question) -> str:
    family, key = question.family, question.key
    if family == "parameters":
        at = given.find("(")
        return given[at:] if at >= 0 and given[:at].endswith(key) else ""
    if family == "class":
        return given.rpartition("in class ")[2] if "in class " in given else ""
    if family in ("docstring", "option", "definition"):
        value = squeeze(question.value)
        return value if given.endswith(value) and key in given else ""
    if family == "fact":
        value = squeeze(question.value)
        end = squeeze(question.answer).rpartition(value)[1:]
        return value if given.endswith("".join(end)) and key in given else ""
    found = list(re.finditer(r" = ", given))
    if not found:
        return given.removeprefix("#define ").removeprefix(f"{key} ")
    return given[found[-1].end() :]


def lenient(answer: str, question: Question) -> bool:
    """Whether the value stands anywhere in the answer (how the unchanged base model is scored)."""
    return squeeze(question.value) in squeeze(answer)


def says_absent(answer: str) -> bool:
    """Whether the answer says that the context does not hold what was asked."""
    return NOT_IN_CONTEXT in squeeze(answer).lower()


def share(right: int, total: int) -> float | None:
    """right / total, rounded to four places; None of nothing."""
    return round(right / total, 4) if total else None
