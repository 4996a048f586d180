"""Hold an answer to quotes of what the model looks at.

Shape suffix: V vocabulary.
"""

import math
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from herd.context.cache import ContextRow
from herd.model import KVRow
from herd.prompt.quotes import ABSENT, Quotes

LOOKED = 0.01  # of a look's attention: chunks with less are not quoted
_ABSENT_COST = 4.0  # nats that "not in the context" has to be likelier than a quote


class Pieces(Protocol):
    """What this needs of a tokenizer."""

    eos_ids: list[int]

    def decode(self, ids: list[int]) -> str: ...

    def raw(self, ids: Sequence[int]) -> bytes: ...

    def prefixes(self, data: bytes) -> list[int]: ...


class Quoting:
    """Guides one answer (`herd.engine.Request`): only tokens that lead to a quote, or to its absence, are left.

    What can be quoted grows with what the answer's tokens look at. There is always a token left.
    """

    def __init__(self, question: str, tokenizer: Pieces) -> None:
        self._quotes, self._tokenizer = Quotes(question), tokenizer
        self._seen: set[tuple[int, int]] = set()

    def __call__(self, ids: Sequence[int], logits_V: Tensor, row: KVRow) -> Tensor:
        """Logits of the next token after the answer's ids, -inf for those that lead to no answer."""
        assert isinstance(row, ContextRow)
        for store, chunk in row.looked_at(LOOKED):
            if (id(store), chunk) not in self._seen:
                self._seen.add((id(store), chunk))
                header, _, text = self._tokenizer.decode(store.ids(chunk)).partition("\n")
                self._quotes.see(header, text)
        quoting, absent = self._next(self._tokenizer.raw(ids))
        guided_V = logits_V.new_full(logits_V.shape, -math.inf)
        for tokens, cost in ((absent - quoting, _ABSENT_COST if quoting else 0.0), (quoting, 0.0)):
            index = list(tokens)
            guided_V[index] = logits_V[index] - cost
        return guided_V

    def _next(self, said: bytes) -> tuple[set[int], set[int]]:
        """Tokens that lead to a quote, and those that lead to an answer that says there is none."""
        quoting, absent = set[int](), set[int]()
        done = set[tuple[bytes, bool]]()
        for answer in self._quotes.go_on(said):
            missing = answer.endswith(ABSENT.encode())
            rest, into = answer[len(said) :], absent if missing else quoting
            if not rest:
                into.update(self._tokenizer.eos_ids)
            elif (rest[:32], missing) not in done:
                done.add((rest[:32], missing))
                into.update(self._tokenizer.prefixes(rest))
        return quoting, absent
