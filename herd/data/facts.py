"""Invented key/value facts: a sentence to insert as a line of its own, and questions that it answers."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from uuid import UUID

from herd.data import fact_templates as templates
from herd.data import words
from herd.data.question import Question

KINDS = ("integer", "decimal", "uuid", "hex", "word", "phrase", "person", "place", "date", "sentence")
_MONTHS = ["January", "February", "March", "April", "May", "June", "July"]
_MONTHS += ["August", "September", "October", "November", "December"]
_SORTS = {
    "number": ("integer", "integer", "integer", "decimal"),
    "id": ("uuid", "hex"),
    "word": ("word", "word", "phrase"),
}
Words = dict[str, str]


@dataclass(frozen=True)
class Fact:
    """`sentence` carries the evidence of the answer; insert each of `sentences` as a line of its own.

    `older` (family latest) goes on an earlier line of the *same* chunk; `first_hop` (two-hop) and the near-miss
    `distractors` go into any chunk. The questions ask for the same thing in different words.
    """

    sentence: str
    questions: list[Question]
    older: str = ""
    first_hop: str = ""
    distractors: tuple[str, ...] = ()

    @property
    def sentences(self) -> tuple[str, ...]:
        """The lines that the answer needs, in the order in which they may stand in one chunk (no distractors)."""
        return tuple(line for line in (self.older, self.first_hop, self.sentence) if line)


def make(rng: Random, split: str = "train", family: str = "", kind: str = "", phrasings: int = 2) -> Fact:
    """One fact. family: fact | latest | two-hop ("" draws 75/10/15 %); kind: one of KINDS ("" draws)."""
    family = family or rng.choices(("fact", "latest", "two-hop"), (75, 10, 15))[0]
    maker = {"fact": _plain, "latest": _latest, "two-hop": _two_hop}[family]
    while True:
        fact = maker(rng, split, kind, phrasings)
        if fact is not None:
            return fact


def absent(rng: Random, split: str = "train") -> Question:
    """A question about a fact that no text holds (entities are drawn from a large space)."""
    return make(rng, split, "fact", phrasings=1).questions[0].as_absent()


def value_of(rng: Random, kind: str, split: str) -> str:
    """A random value of one of KINDS, without a full stop at its end."""
    if kind == "integer":
        digits = rng.randint(3, 9)
        return str(rng.randint(10 ** (digits - 1), 10**digits - 1))
    if kind == "decimal":
        return f"{rng.randint(0, 9999)}.{rng.randint(1, 999):0{rng.randint(1, 3)}d}"
    if kind == "uuid":
        return str(UUID(int=rng.getrandbits(128), version=4))
    if kind == "hex":
        return rng.choice(["", "0x", "0x"]) + f"{rng.getrandbits(64):016x}"[: rng.choice([6, 8, 10, 12, 16])]
    if kind == "word":
        sort = rng.choice(["noun", "adjective", "invented", "noun"])
        return words.invented(rng, split) if sort == "invented" else words.pick(rng, sort, split)
    if kind == "phrase":
        return " ".join([words.pick(rng, "adjective", split) for _ in range(rng.randint(1, 2))] + [_noun(rng, split)])
    if kind == "person":
        return words.person(rng, split)
    if kind == "place":
        return words.pick(rng, "place", split)
    if kind == "date":
        return _date(rng)
    if kind == "sentence":
        return _sentence(rng, split)
    raise ValueError(f"unknown kind of value {kind!r}; choose one of {', '.join(KINDS)}")


def _noun(rng: Random, split: str) -> str:
    return words.pick(rng, rng.choice(["noun", "object"]), split)


def _date(rng: Random) -> str:
    day, month, year = rng.randint(1, 28), rng.randint(1, 12), rng.randint(1850, 2049)
    name = _MONTHS[month - 1]
    return rng.choice([f"{year}-{month:02d}-{day:02d}", f"{day} {name} {year}", f"{name} {day}, {year}"])


def _sentence(rng: Random, split: str) -> str:
    form = rng.choice(templates.SENTENCES[split])
    sorts = {"V": "verb", "J": "adjective", "N": "noun", "O": "object", "P": "place", "F": "first"}
    return form.format(**{letter: words.pick(rng, sort, split) for letter, sort in sorts.items()})


def _entity(rng: Random, split: str) -> str:
    form = rng.randrange(10)
    if form == 0:
        return words.person(rng, split)
    if form == 1:
        return words.invented(rng, split)
    if form == 2:
        return f"the {words.pick(rng, 'adjective', split)} {_noun(rng, split)}"
    if form == 3:
        return f"{words.pick(rng, 'object', split)} {rng.randint(2, 9999)}"
    if form == 4:
        return f"{rng.choice(['Project', 'Operation', 'Team', 'Room', 'Station'])} {_noun(rng, split).capitalize()}"
    if form == 5:
        return f"the {words.pick(rng, 'place', split)} {words.pick(rng, 'object', split)}"
    if form == 6:
        return f"{words.pick(rng, 'adjective', split)} {_noun(rng, split)}".title()
    if form == 7:
        letters = "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(2))
        return f"{rng.choice(['unit', 'item', 'model', 'case'])} {letters}-{rng.randint(10, 9999)}"
    if form == 8:
        return f"{words.invented(rng, split)} {words.pick(rng, rng.choice(['last', 'place']), split)}"
    return f"the {words.pick(rng, 'object', split)} of {words.person(rng, split)}"


def _attribute(rng: Random, split: str, kind: str) -> tuple[str, str]:
    """(attribute, kind of its value)."""
    if not kind:
        sort = rng.choices(words.attribute_kinds(), (34, 16, 20, 10, 6, 8, 6))[0]
        kind = rng.choice(_SORTS.get(sort, (sort,)))
    sort = next((name for name, kinds in _SORTS.items() if kind in kinds), kind)
    return words.pick(rng, f"attribute-{sort}", split), kind


def _identified(text: str) -> str:
    return text.lower().replace(" ", "_").replace("-", "_")


def _say(form: str, entity: str, attribute: str, value: str) -> str:
    said = form.format(E=entity, A=attribute, a=_identified(attribute), v=value)
    if said.startswith("the ") and form[:2] in ("{E", "Th"):
        said = said[0].upper() + said[1:]
    return said


def _ask(forms: tuple[str, ...], rng: Random, count: int, **names: str) -> list[str]:
    asked = [form.format(**names) for form in rng.sample(forms, min(count, len(forms)))]
    return [text[0].upper() + text[1:] if text.startswith("the ") else text for text in asked]


def _plain(rng: Random, split: str, kind: str, phrasings: int) -> Fact | None:
    if kind in ("", "integer", "decimal", "hex", "word") and rng.random() < 0.15:
        return _named(rng, split, kind or rng.choice(["integer", "integer", "decimal", "hex", "word"]), phrasings)
    entity = _entity(rng, split)
    attribute, kind = _attribute(rng, split, kind)
    value = value_of(rng, kind, split)
    form = rng.choice(templates.PLAIN[split])
    sentence = _say(form, entity, attribute, value)
    if sentence.count(value) != 1:
        return None
    asked = _ask(templates.ASK[split], rng, phrasings, E=entity, A=attribute)
    rest = _after(sentence, entity)
    misses = _near_misses(rng, split, form, entity, attribute, kind)
    if value not in rest or any(sentence in miss or miss in sentence for miss in misses):
        return None
    return Fact(sentence, _questions("fact", asked, attribute, entity, value, sentence, kind), distractors=misses)


def _after(sentence: str, entity: str) -> str:
    """What follows the entity in a sentence, "" if it is not there once: the part that an answer copies."""
    before, _, rest = sentence.lower().rpartition(entity.lower())
    return sentence[-len(rest) :] if rest and entity.lower() not in before else ""


def _near_misses(rng: Random, split: str, form: str, entity: str, attribute: str, kind: str) -> tuple[str, ...]:
    """The same attribute of a similar entity and, where the words before the value tell, another one of the same."""
    other_entity, (other_attribute, other_kind) = _similar(rng, split, entity), _attribute(rng, split, "")
    misses = []
    if other_entity != entity:
        other_form = form if rng.random() < 0.5 else rng.choice(templates.PLAIN[split])
        misses.append(_say(other_form, other_entity, attribute, value_of(rng, kind, split)))
    if other_attribute != attribute and "{A} of {E}" in form:
        misses.append(_say(form, entity, other_attribute, value_of(rng, other_kind, split)))
    return tuple(misses)


def _similar(rng: Random, split: str, entity: str) -> str:
    """An entity that shares all words but the last or the one before it, of the same sort."""
    parts = entity.split(" ")
    at = rng.randrange(len(parts))
    if parts[at] in ("the", "of", "unit", "item", "model", "case"):
        at = len(parts) - 1
    old = parts[at]
    if old.isdigit():
        new = str(rng.randint(2, 9999))
    elif "-" in old and old[-1].isdigit():
        new = f"{old.split('-')[0]}-{rng.randint(10, 9999)}"
    else:
        sort = next((s for s in ("first", "last", "place", "object", "adjective", "noun") if _has(s, old, split)), "")
        new = words.pick(rng, sort, split) if sort else words.invented(rng, split)
    parts[at] = new[0].upper() + new[1:] if old[0].isupper() else new
    return " ".join(parts)


def _has(sort: str, word: str, split: str) -> bool:
    return words.contains(sort, word if sort in ("first", "last", "place") else word.lower(), split)


def _named(rng: Random, split: str, kind: str, phrasings: int) -> Fact | None:
    name = words.identifier(rng, split, upper=rng.random() < 0.4)
    value, other = value_of(rng, kind, split), value_of(rng, kind, split)
    form = rng.choice(templates.NAMED[split])
    sentence = form.format(n=name, v=value)
    parts = name.split("_")
    parts[-1] = words.pick(rng, "code", split)
    near = "_".join(part.upper() if name.isupper() else part for part in parts)
    miss = form.format(n=near, v=other)
    if sentence.count(value) != 1 or near == name or sentence in miss or miss in sentence:
        return None
    copied = sentence[sentence.index(name) :]
    if sentence.count(name) != 1 or value not in copied:
        return None
    questions = [
        Question("fact", text, copied, copied, sentence, value, name, kind)
        for text in _ask(templates.ASK_NAMED[split], rng, phrasings, n=name)
    ]
    return Fact(sentence, questions, distractors=(miss,))


def _latest(rng: Random, split: str, kind: str, phrasings: int) -> Fact | None:
    entity = _entity(rng, split)
    attribute, kind = _attribute(rng, split, kind)
    old, new = value_of(rng, kind, split), value_of(rng, kind, split)
    before, after = rng.choice(templates.LATEST[split])
    older, newer = _say(before, entity, attribute, old), _say(after, entity, attribute, new)
    if newer.count(new) != 1 or new in old or old in new or newer in older or new not in _after(newer, entity):
        return None
    forms = templates.ASK_LATEST[split] + templates.ASK[split][:4]
    asked = _ask(forms, rng, phrasings, E=entity, A=attribute)
    return Fact(newer, _questions("latest", asked, attribute, entity, new, newer, kind), older=older)


def _two_hop(rng: Random, split: str, kind: str, phrasings: int) -> Fact | None:
    entity = _entity(rng, split)
    link, middle_kind = _attribute(rng, split, rng.choice(["person", "person", "place", "word"]))
    middle = words.invented(rng, split) if middle_kind == "word" else value_of(rng, middle_kind, split)
    attribute, kind = _attribute(rng, split, kind)
    value = value_of(rng, kind, split)
    forms = templates.PLAIN[split]
    first, second = (_say(rng.choice(forms), *say) for say in ((entity, link, middle), (middle, attribute, value)))
    found, rest = _after(first, entity), _after(second, middle)
    if middle not in found or value not in rest or value in middle or middle in entity:
        return None
    asked = _ask(templates.ASK_TWO_HOP[split], rng, phrasings, E=entity, A=attribute, B=link)
    start = f"The {link} of {entity}{found}\n"
    drafts = _questions("two-hop", asked, attribute, middle, value, second, kind)
    hops = ((found, first), (rest, second))
    key = f"The {attribute} of the {link} of {entity}"
    two = [Question(d.family, d.question, start + d.answer, rest, second, value, key, kind, hops) for d in drafts]
    return Fact(second, two, first_hop=first)


def _questions(
    family: str, asked: list[str], attribute: str, entity: str, value: str, evidence: str, kind: str
) -> list[Question]:
    """Answers name what is asked for, and go on as the evidence does after the entity."""
    key, rest = f"The {attribute} of {entity}", _after(evidence, entity)
    return [Question(family, text, key + rest, rest, evidence, value, key, kind) for text in asked]
