"""A question about one chunk of text, the answer that Cria is trained to give, and where the evidence stands."""

from __future__ import annotations

from dataclasses import dataclass, replace

from herd.prompt.quotes import NOT_IN_CONTEXT


@dataclass(frozen=True)
class Question:
    """`answer == prefix + copied + suffix`; `evidence` is literal chunk text that contains `copied` exactly once."""

    family: str  # constant | parameters | class | docstring | fact | latest | two-hop | option | definition | absent-*
    question: str
    answer: str
    copied: str  # substring of the answer that stands literally in the chunk ("" when absent)
    evidence: str  # literal substring of the chunk text, header included ("" when absent)
    value: str  # the part that evaluation scores (substring of copied; NOT_IN_CONTEXT when absent)
    key: str = ""  # what the question asks for: a name, or `The {attr} of {entity}`; must be unique in a context
    kind: str = ""  # kind of value (integer, uuid, ...), for tables of results
    hops: tuple[tuple[str, str], ...] = ()  # two-hop: (copied, evidence) of every step, in the order of the answer

    @property
    def prefix(self) -> str:
        """The part of the answer before `copied`."""
        return self.answer[: self.answer.rindex(self.copied)]

    @property
    def suffix(self) -> str:
        """The part of the answer after `copied`."""
        return self.answer[self.answer.rindex(self.copied) + len(self.copied) :]

    def as_absent(self) -> Question:
        """The same question, asked in a context that does not hold its evidence (the caller makes sure of that)."""
        # Every answer begins with the key, so that it is complete before the model has to know whether it is there.
        opening = {"parameters": "def ", "docstring": "docs of ", "class": "method "}.get(self.family, "")
        return replace(
            self,
            family=f"absent-{self.family}",
            answer=f"{opening}{self.key} is {NOT_IN_CONTEXT}.",
            copied="",
            evidence="",
            value=NOT_IN_CONTEXT,
            hops=(),
        )
