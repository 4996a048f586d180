"""Hold an answer to quotes of what the model looks at.

Shape suffix: V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from herd.context.cache import ContextRow
from herd.model import KVRow
from herd.prompt.naming import namings
from herd.prompt.quotes import ABSENT, Quotes, Worth

LOOKED = 0.01  # of a look's attention: chunks with less are not quoted
_ABSENT_COST = 4.0  # nats that "not in the context" has to be likelier than a quote


class Pieces(Protocol):
    """What this needs of a tokenizer."""

    eos_ids: list[int]

    def decode(self, ids: list[int]) -> str: ...

    def encode(self, text: str) -> list[int]: ...

    def raw(self, ids: Sequence[int]) -> bytes: ...

    def prefixes(self, data: bytes) -> list[int]: ...


class Quoting:
    """Guides one answer (`herd.engine.Request`): only tokens that lead to a quote, or to its absence, are left.

    What can be quoted grows with what the answer's tokens look at. There is always a token left.
    """

    def __init__(self, question: str, tokenizer: Pieces, *, again: bool = False) -> None:
        """again: only what surely answers is left, if anything does, and nothing that is doubtful (`Worth`)."""
        self._question, self._quotes, self._tokenizer, self._again = question, Quotes(question), tokenizer, again
        self._seen = dict[tuple[int, int], tuple[str, str]]()  # headers and texts of chunks

    def __call__(self, ids: Sequence[int], logits_V: Tensor, row: KVRow) -> Tensor:
        """Logits of the next token after the answer's ids, -inf for those that lead to no answer."""
        assert isinstance(row, ContextRow)
        self.look(row)
        quoting, absent = self._next(self._tokenizer.raw(ids))
        guided_V = logits_V.new_full(logits_V.shape, -math.inf)
        for tokens, cost in ((absent - quoting, _ABSENT_COST if quoting else 0.0), (quoting, 0.0)):
            index = list(tokens)
            guided_V[index] = logits_V[index] - cost
        return guided_V

    def look(self, row: ContextRow) -> None:
        """Allow quotes of what the last token of a row looked at."""
        for store, chunk in row.looked_at(LOOKED):
            if (id(store), chunk) not in self._seen:
                header, _, text = self._tokenizer.decode(store.ids(chunk)).partition("\n")
                self._see((id(store), chunk), header, text)

    def namings(self) -> list[list[int]]:
        """Beginnings of an answer that name what the question asks about in several ways (`herd.prompt.naming`)."""
        return [self._tokenizer.encode(text) for text in namings(self._question)]

    def quotes(self, ids: Sequence[int]) -> bool:
        """Whether a quote that is not doubtful begins with these ids, which begin with those of the last call."""
        answers = self._quotes.go_on(self._tokenizer.raw(ids))
        return any(worth > Worth.DOUBTFUL and not _absent(answer) for answer, worth in answers.items())

    def worth(self, ids: Sequence[int]) -> Worth:
        """Of the answer that these ids are; DOUBTFUL if they are only a part of one."""
        said = self._tokenizer.raw(ids)
        return self._quotes.go_on(said).get(said, Worth.DOUBTFUL)

    def again(self, ids: Sequence[int], doubtful: bool, instead: Sequence[int] = ()) -> "Quoting | None":
        """A guide from these ids on to what surely answers, of all that was looked at so far; None if nothing does.

        What an answer looks at late may be what it should have begun with. doubtful: None only if nothing is left but
        what is doubtful, because the right names may lead on. instead: of the ids of this answer.
        """
        guide = Quoting(self._question, self._tokenizer, again=True)
        for place, (header, text) in self._seen.items():
            guide._see(place, header, text)
        guide._quotes.settle(self._tokenizer.raw(instead))
        left = guide._quotes.go_on(self._tokenizer.raw(ids)).values()
        return guide if Worth.SURE in left or (doubtful and Worth.POSSIBLE in left) else None

    def _see(self, place: tuple[int, int], header: str, text: str) -> None:
        self._seen[place] = (header, text)
        self._quotes.see(header, text)

    def _next(self, said: bytes) -> tuple[set[int], set[int]]:
        """Tokens that lead to a quote, and those that lead to an answer that says there is none."""
        quoting, absent = set[int](), set[int]()
        done = set[tuple[bytes, bool]]()
        answers = self._quotes.go_on(said)
        least = Worth.DOUBTFUL
        if self._again:
            least = Worth.SURE if Worth.SURE in answers.values() else Worth.POSSIBLE
        for answer in (answer for answer, worth in answers.items() if worth >= least):
            missing = _absent(answer)
            rest, into = answer[len(said) :], absent if missing else quoting
            if not rest:
                into.update(self._tokenizer.eos_ids)
            elif (rest[:32], missing) not in done:
                done.add((rest[:32], missing))
                into.update(self._tokenizer.prefixes(rest))
        return quoting, absent


@dataclass(eq=False)
class Try:
    """A question on its way to an answer.

    ids: of the answer so far, of which `begun` were there from the beginning and `kept` may become a quote, or are the
    model's own words. missed: of attention not read by the try that this one goes on from.
    """

    prompt: list[int]
    guide: Quoting | None
    ids: list[int] = field(default_factory=list)
    kept: int = 0
    missed: float = 0.0
    row: KVRow | None = None

    def __post_init__(self) -> None:
        self.begun = tuple(self.ids)

    def guided(self, ids: Sequence[int], logits_V: Tensor, row: KVRow) -> Tensor:
        """The guide of the request (`herd.engine`) that goes on with it."""
        assert self.guide is not None
        return self.guide([*self.begun, *ids], logits_V, row)

    def take(self, id: int) -> None:
        """Go on with this token."""
        self.ids.append(id)
        if self.guide is None or self.guide.quotes(self.ids):
            self.kept = len(self.ids)

    @property
    def sure(self) -> bool:
        """Whether it ended as a quote that surely answers."""
        return self.guide is not None and self.guide.worth(self.ids) is Worth.SURE

    @property
    def doubted(self) -> bool:
        """Whether it ended without a quote, or with a doubtful one."""
        return self.guide is not None and self.kept < len(self.ids)

    def or_sure(self, second: "Try | None") -> "Try":
        """The one that counts: a second one only if it is sure, so nothing of it may be told before its end."""
        return second if second is not None and second.sure else self

    def again(self) -> "Try | None":
        """If this one is doubted: another that may end better, from where they part."""
        if not self.doubted:
            return None
        assert self.guide is not None
        assert isinstance(self.row, ContextRow)
        kept, worth = self.ids[: self.kept], self.guide.worth(self.ids)
        guide = self.guide.again(kept, worth is Worth.DOUBTFUL, instead=self.ids)
        return None if guide is None else Try(self.prompt, guide, kept, self.kept, self.row.missed)


def _absent(answer: bytes) -> bool:
    return answer.endswith(ABSENT.encode())
