"""How the lines of a text may name what a question asks about."""

from collections.abc import Iterator

from herd.prompt.quotes import ASKING_WORDS, FUNCTION_WORDS, LEADING_WORDS, begins_name, is_identifier

_MOST = 12  # of a question
_JOINING = frozenset(["of", "the"])
_LEADING = (FUNCTION_WORDS | ASKING_WORDS | LEADING_WORDS | {""}) - _JOINING
_MARKS = "`'\"()[]{}?!:;,."


def namings(question: str) -> list[str]:
    """Texts to look at a context with: as prose names things and their attributes, and as code does, where no blank
    stands before a name, so that its tokens are others.

    What a model looks at depends on how it begins to answer; these find the lines that hold what was asked for, however
    it would begin.
    """
    groups = list(dict.fromkeys(part for group in _groups(question) for part in _parts(group)))
    found = dict[str, None]()
    for thing in sorted(groups, key=lambda group: -len(group.split())):
        found |= dict.fromkeys([f"def {thing}", f"[{thing}"] if is_identifier(thing) else [f"[{thing}"])
        for attribute in (_bare(group) for group in groups if _apart(group, thing)):
            found |= {f"The {attribute} of {thing}": None, f"[{thing}].{attribute}": None}
    return list(found)[:_MOST]


def _groups(question: str) -> Iterator[str]:
    """Runs of words that stand for one thing: function words, marks and names part them; `of` and `the` do not."""
    run = list[str]()
    for word in question.split():
        bare = word.strip(_MARKS)
        plain = bare.removesuffix("'s")
        joins, leads = plain.lower() in _JOINING, plain.lower() in _LEADING
        if leads or (run and _begins(run[-1], plain)):
            yield from _ended(run)
            run = []
        if not leads:
            run.append(plain.lower() if joins else plain)
        if plain != bare or word[-1] in "?!:;,.":
            yield from _ended(run)
            run = []
    yield from _ended(run)


def _begins(before: str, word: str) -> bool:
    """Whether a word begins another thing."""
    if word.lower() == "the" or before in _JOINING:
        return word.lower() == "the" and before != "of"
    return begins_name(before, word)


def _ended(run: list[str]) -> Iterator[str]:
    while run and run[-1] in _JOINING:
        run = run[:-1]
    while run and run[0] == "of":
        run = run[1:]
    if run:
        yield " ".join(run)


def _parts(group: str) -> Iterator[str]:
    """A group, and what stands before and behind each `of`."""
    yield group
    words = group.split(" of ")
    for cut in range(1, len(words)):
        yield from (" of ".join(words[:cut]), " of ".join(words[cut:]))


def _bare(group: str) -> str:
    """Without an article."""
    return group.removeprefix("the ")


def _apart(attribute: str, thing: str) -> bool:
    """Whether a group may be an attribute of another: short, no name, and no word in common."""
    words = _bare(attribute).split()
    named = any(word[0].isupper() and not word.isupper() for word in words)
    return len(words) <= 3 and not named and not {*map(str.lower, words)} & {*thing.lower().split()}
