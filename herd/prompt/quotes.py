"""What an answer may be when answers are quotes: the form that `herd.data` trains, as a set of strings.

An answer names something that the question names, and goes on as a text does after it. It is one of

- `NAME…`: a line from the name to the line's end;
- `def NAME(…)…`: a signature, to the end of its last line;
- `method NAME in class C`, as the headers of chunks say it;
- `docs of NAME: def NAME(…)…`: a definition up to the end of the line where its docstring's first sentence ends, or to
  the end of the signature if it has none; or `docs of NAME: NAME…`, a line;
- `The A of E…`: a line that holds A, or sets E, from E on, where A and E are words of the question, as many as the line
  holds; and in a next line the same again, with another A and words of this one for E;
- any of these names, and ` is not in the context.`

Strings are UTF-8 bytes, because tokens may end within a character.
"""

import re
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

NOT_IN_CONTEXT = "not in the context"
ABSENT = f" is {NOT_IN_CONTEXT}."
MAX_SIGNATURE, MAX_SENTENCE, MAX_QUOTE = 160, 200, 240

_ATTRIBUTE_WORDS, _ENTITY_WORDS = 3, 7
_TOKEN = re.compile(r"\"(?:[^\"\\\n]|\\.)*\"|'(?:[^'\\\n]|\\.)*'|#[^\n]*|[()\[\]{}]")
_DOC_OPEN = re.compile(r"[^\n]{0,80}:[ ]*(?:#[^\n]*)?\n\s*[rRuU]?(\"\"\"|''')\s*")
_SENTENCE_END = re.compile(r"[.!?](?=\s|\"\"\"|'''|$)|(?=\s*(?:\"\"\"|'''|\n[ \t]*\n))")
_SETS = re.compile(r"\s*[:=]+[=>]?\s")
_METHOD = re.compile(r"method \w+ in class [\w.]+")
# Neither names nor phrases begin or end with these.
FUNCTION_WORDS = frozenset(
    """a an and are as at be been by can could did do does for from give had has have how i in is it its may me might
    must my of on one or our please shall should some tell than that the their them then there these they this those
    to us was we were what when where which while who whose why will with would you your""".split()  # noqa: SIM905
)
# What a question asks with; not a name, unless there is no other.
ASKING_WORDS = frozenset(
    """argument arguments call called class constant contain contains def define defined describe docs docstring explain
    file find function hold holds know list look mean means method name named parameter parameters quote record say says
    set setting show signature state store stored take takes use used value variable""".split()  # noqa: SIM905
)
# What leads to what a question asks for; part of no name or attribute.
LEADING_WORDS = frozenset(
    "about belonging concerning forget forgot get gets got give gives know need regarding remember remind".split()  # noqa: SIM905
)


class Worth(IntEnum):
    """How likely an answer is what was asked for.

    DOUBTFUL: it names an ordinary word though the question holds a name, and quotes no definition. SURE: a definition,
    a line that sets a name, or one that holds both A and E. POSSIBLE: all others.
    """

    DOUBTFUL = 0
    POSSIBLE = 1
    SURE = 2


class Quotes:
    """The answers to one question that the texts seen so far allow, narrowed down as one of them is said."""

    def __init__(self, question: str) -> None:
        self._names = _names(question)
        self._attributes = [
            p for p in phrases(question, _ATTRIBUTE_WORDS) if "'s " not in p and not _words(p) & LEADING_WORDS
        ]
        named = [p for p in phrases(question, _ENTITY_WORDS) if not ASKING_WORDS.issuperset(p.lower().split())]
        self._things = [p for e in named for p in (e, f"the {e}") if _stands(question, p)]
        self._texts: list[str] = []
        self._said = b""
        self._answers = dict[bytes, Worth]()
        self._telling = _telling(question)
        for name in self._names:
            worth = self._worth(name)
            # An ordinary word beside a name is hardly the name of a function.
            for opening in ("",) if worth is Worth.DOUBTFUL else ("", "def ", "method ", "docs of "):
                self._add(opening + name + ABSENT, worth)
        self._add_things("", self._things, None)

    def see(self, header: str, text: str) -> None:
        """Allow quotes of one more text, and of methods that its header lists."""
        self._texts.append(text)
        for name in self._names:
            worth = self._worth(name)
            for at in _places(header, f"method {name}"):
                if found := _METHOD.match(header, at):
                    self._add(found.group(), Worth.SURE)
            for at in _places(text, name):
                line = _line(text, at)
                if not is_identifier(name) and self._attribute_in(text, at, name):
                    continue  # `The A of NAME…` tells more
                sets = worth is Worth.POSSIBLE and _SETS.match(line, len(name)) is not None
                self._add(line, Worth.SURE if sets else worth)
                self._add(f"docs of {name}: {line}", worth)
                if at >= 4 and text.startswith("def ", at - 4):
                    self._add_definition(text, at - 4, name)
        self._add_things("", self._things, text)

    def settle(self, said: bytes) -> None:
        """Where an identifier alone was said to be missing though one line of the texts has it, that line is sure."""
        for name in filter(is_identifier, self._names):
            lines = {_line(text, at) for text in self._texts for at in _places(text, name)}
            if said == (name + ABSENT).encode() and len(lines) == 1:
                self._add(lines.pop(), Worth.SURE)

    def go_on(self, said: bytes) -> dict[bytes, Worth]:
        """All answers that begin with `said`, which begins with what was said in the last call."""
        self._said = said
        self._answers = {answer: worth for answer, worth in self._answers.items() if answer.startswith(said)}
        if (
            said in self._answers
            and said.startswith(b"The ")
            and b"\n" not in said
            and not said.endswith(ABSENT.encode())
        ):
            first = said.decode(errors="replace")
            # A second line goes on from what the first one says, not from what it names.
            named = self._named(first)
            later = phrases(first.removeprefix(named), _ENTITY_WORDS)
            found = [phrase for phrase in later if not _words(phrase) <= _words(named)]
            for text in (None, *self._texts):
                self._add_things(first + "\n", found, text)
        return dict(self._answers)

    def _add(self, answer: str, worth: Worth) -> None:
        if (data := answer.encode(errors="replace")).startswith(self._said):
            self._answers[data] = max(worth, self._answers.get(data, worth))

    def _worth(self, named: str) -> Worth:
        told = not self._telling or not self._telling.isdisjoint(re.findall(r"\w+", named))
        return Worth.POSSIBLE if told else Worth.DOUBTFUL

    def _add_things(self, start: str, things: list[str], text: str | None) -> None:
        """`The A of E…` with the lines of a text that hold both, or without one."""
        named = self._named(start)
        apart = {thing: [a for a in self._attributes if not _words(a) & _words(f"{thing} {named}")] for thing in things}
        # What a first line names may be a word like others.
        worth = {thing: Worth.POSSIBLE if start else self._worth(thing) for thing in things}
        if text is None:
            for thing, attributes in apart.items():
                for attribute in attributes:
                    self._add(f"{start}The {attribute} of {thing}{ABSENT}", worth[thing])
            return
        for _, thing, rest, held in _found(text, apart):
            its, attributes = worth[thing], _longest(held)
            if not held and _SETS.match(rest):
                # Only the thing tells that this is what was asked for; ordinary words alone tell too little.
                its, attributes = (its if start or self._telling else Worth.DOUBTFUL), apart[thing]
            for attribute in attributes:
                self._add(f"{start}The {attribute} of {thing}{rest}", Worth.SURE if its is Worth.POSSIBLE else its)

    def _attribute_in(self, text: str, at: int, name: str) -> bool:
        """Whether the line at a name holds an attribute that the question asks for."""
        line = _plain(text[text.rfind("\n", 0, at) + 1 : at] + _line(text, at))
        asked = (a for a in self._attributes if not ASKING_WORDS.issuperset(_words(a)) and name not in a.split())
        return any(_plain(a) in line for a in asked)

    def _named(self, line: str) -> str:
        """`The A of E` that a line begins with, as much of it as there is; nothing if it begins otherwise."""
        named = (f"The {a} of {e}" for a in self._attributes for e in self._things)
        return max((name for name in named if line.startswith(name)), key=len, default="")

    def _add_definition(self, text: str, at: int, name: str) -> None:
        end = bracket_end(text, text.find("(", at), at + MAX_SIGNATURE)
        if end < 0:
            return
        self._add(text[at : line_end(text, end)], Worth.SURE)
        _, last = first_sentence(text, end) or (end, end)
        self._add(f"docs of {name}: {text[at : line_end(text, last)]}", Worth.SURE)


def bracket_end(text: str, start: int, limit: int) -> int:
    """Index just past the bracket that closes the one at `start`, -1 if it is not closed before `limit`."""
    depth = 0
    for found in _TOKEN.finditer(text, max(start, 0), min(limit, len(text))):
        if found.group() in "([{":
            depth += 1
        elif found.group() in ")]}":
            depth -= 1
            if depth == 0:
                return found.end()
    return -1


def first_sentence(text: str, signature_end: int) -> tuple[int, int] | None:
    """Where the first sentence of the docstring after a signature begins and ends; None if there is none."""
    opened = _DOC_OPEN.match(text, signature_end)
    stop = opened and _SENTENCE_END.search(text, opened.end(), opened.end() + MAX_SENTENCE + 3)
    return (opened.end(), stop.end()) if opened and stop else None


def line_end(text: str, at: int) -> int:
    """Where the line at `at` ends, without the blanks at its end (never before `at`)."""
    end = text.find("\n", at)
    return at + len(text[at : end if end >= 0 else len(text)].rstrip())


def phrases(text: str, most: int) -> list[str]:
    """Runs of at most so many whole words, without punctuation, possessive `'s` or function words at their ends.

    Names and numbers are not cut: of `the mill of Ann Lee` there is no phrase that begins with Lee or ends with Ann.
    """
    words = text.split()
    bound = [i > 0 and _binds(words[i - 1], words[i], first=i == 1) for i in range(len(words))] + [False]
    found = dict[str, None]()
    for start in range(len(words)):
        for end in range(start + 1, min(start + most, len(words)) + 1):
            if not (bound[start] or bound[end]):
                phrase = " ".join(words[start:end]).strip('`"?!:;,.')
                found |= {said: None for said in (phrase, phrase.removesuffix("'s")) if _whole(said)}
            if words[end - 1][-1] in "?!:;,.":
                break
    return list(found)


def _binds(before: str, word: str, *, first: bool) -> bool:
    """Whether a word goes with the one before it, as in `gate 7` and `Ann Lee`; the first of all may be big anyway."""
    big = before[0].isupper() and word[0].isupper() and not (first or begins_name(before, word))
    return before[-1].isalnum() and (big or any(char.isdigit() for char in word))


def begins_name(before: str, word: str) -> bool:
    """Whether a name begins with a word: `colour Ann`, `PIN Ann`, but not `Ann Lee` or `gate 7`."""
    shouted = len(before) > 1 and before.isupper() and not word.isupper()
    return word[0].isupper() and (shouted or not before[0].isupper())


def _whole(phrase: str) -> bool:
    words = phrase.lower().split()
    return any(map(str.isalnum, phrase)) and not FUNCTION_WORDS & {words[0], words[-1]}


def _names(question: str) -> list[str]:
    """Words that may be identifiers; words of ordinary language only if there are no others."""
    words = [word.strip("`'\"()[]{}.,:;?!*<>=") for word in question.split()]
    names = list(dict.fromkeys(word for word in words if re.fullmatch(r"\w+", word)))
    return [name for name in names if name.lower() not in FUNCTION_WORDS | ASKING_WORDS] or names or ["it"]


def is_identifier(word: str) -> bool:
    """Whether this is written as names in code are, and not as words of ordinary language or their names."""
    return re.fullmatch(r"\w+", word) is not None and re.search(r"_|\d|[a-z][A-Z]|^[A-Z]{2}", word) is not None


def _telling(question: str) -> set[str]:
    """Words with something of an identifier, proper name or number; a question begins with a capital anyway."""
    words = re.findall(r"\w+", question)
    if words and words[0].isalpha() and words[0].istitle():
        del words[0]
    return {word for word in words if not (word.isalpha() and word.islower()) and word.lower() not in FUNCTION_WORDS}


def _stands(text: str, words: str) -> bool:
    return next(_places(text, words, fold=True), None) is not None


def _longest(phrases: list[str]) -> list[str]:
    """Those that are no part of another."""
    return [p for p in phrases if not any(p != other and f" {p} " in f" {other} " for other in phrases)]


class _Found(NamedTuple):
    """A thing in a text: where, what follows it on its line, and those of its attributes that the line holds."""

    place: range
    thing: str
    rest: str
    held: list[str]

    @property
    def told(self) -> int:
        """How many words of the question an answer can name by it."""
        return max((len(_words(f"{a} {self.thing}") - {"of"}) for a in self.held), default=0)


def _found(text: str, apart: dict[str, list[str]]) -> Iterator[_Found]:
    """Where things stand in a text; of those within each other the one that names most by its attributes, then the
    shortest. apart: the attributes that each may have."""
    by_line = dict[int, list[_Found]]()
    for thing, attributes in apart.items():
        for at in _places(text, thing, fold=True):
            first, stop = text.rfind("\n", 0, at) + 1, at + len(thing)
            if rest := _line(text, stop):
                plain = _plain(text[first:stop] + rest)
                held = [a for a in attributes if _plain(a) in plain]
                by_line.setdefault(first, []).append(_Found(range(at, stop), thing, rest, held))
    for line in by_line.values():
        for one in line:
            if not any(
                (_within(one.place, other.place) and other.told > one.told)
                or (_within(other.place, one.place) and other.told >= one.told > 0)
                for other in line
            ):
                yield one


def _within(inner: range, outer: range) -> bool:
    return outer.start <= inner.start and inner.stop <= outer.stop and len(inner) < len(outer)


def _words(phrase: str) -> set[str]:
    return {*phrase.lower().split()}


def _plain(words: str) -> str:
    """As written in an identifier or in prose: `build_id` is `build id`."""
    return words.lower().replace("_", " ")


def _line(text: str, at: int) -> str:
    """The line from here on."""
    return text[at : line_end(text, at)][:MAX_QUOTE]


def _places(text: str, words: str, *, fold: bool = False) -> Iterator[int]:
    """Where words stand as a whole; fold: whatever their case."""
    folded, words = (text.lower(), words.lower()) if fold else (text, words)
    if len(folded) != len(text):  # some letters have another length in lower case
        folded = text
    at = folded.find(words)
    while at >= 0:
        before, after = folded[at - 1 : at] if at else "", folded[at + len(words) : at + len(words) + 1]
        if not (_in_word(before) and _in_word(words[0])) and not (_in_word(after) and _in_word(words[-1])):
            yield at
        at = folded.find(words, at + 1)


def _in_word(character: str) -> bool:
    return character.isalnum() or character == "_"
