"""What an engine is asked for, and what it says.

Shape suffixes: V vocabulary, N tokens of images, D hidden.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from herd.config import TextConfig
from herd.engine.prefixes import Prefixes, common
from herd.engine.sampler import Choice, Draws, Sampler
from herd.errors import PromptError
from herd.model import KVRow

Finish = Literal["stop", "length"]
# Given the answer's ids so far, the logits [V] of the next one and the request's memory: logits to choose from.
Guide = Callable[[Sequence[int], Tensor, KVRow], Tensor]


@dataclass(frozen=True)
class Request:
    """Go on from these token ids until one of eos_ids, or for max_tokens. PromptError if max_tokens is below 1.

    guide: changes the logits before each choice, for instance to leave out what may not come next (-inf). images: the
    features [tokens, D] of each image in the prompt, in their order (`herd.model.vision`). names: of the prompt's
    tokens (`named`); the request then goes on from what is kept of those of its scope that begin the same, and is kept
    itself. None: neither. made: tokens of the answer that another engine chose before; they count to max_tokens, and
    those that follow are the ones that would have followed there.
    """

    prompt: Sequence[int]
    max_tokens: int
    sampler: Sampler = field(default_factory=Sampler)
    eos_ids: Sequence[int] = ()
    guide: Guide | None = None
    images: Sequence[Tensor] = ()
    names: Sequence[int] | None = None
    scope: str = ""
    made: Sequence[int] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", tuple(self.prompt))  # the caller may go on with its list
        object.__setattr__(self, "images", tuple(self.images))
        if self.max_tokens < 1:
            raise PromptError(f"max_tokens is {self.max_tokens}; an answer has at least one token")


@dataclass(frozen=True)
class Token:
    """Request `request` went on with `id`, an end token included. finish: why it ends here, None if it does not.

    logprob and top (id and logprob of the most likely tokens) if the sampler asks for them. cached: tokens of the
    prompt that were not computed, for they were kept.
    """

    request: int
    id: int
    finish: Finish | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    cached: int = 0


@dataclass(eq=False)
class Job:
    """A request that waits or runs: its tokens so far, how many of them the model has seen, its memory.

    patches: where features of images take the places of embeddings. names: of its tokens, None if nothing is kept.
    cached: tokens of the prompt that were kept.
    """

    id: int
    request: Request
    row: KVRow
    draws: Draws
    patches: list[int] = field(default_factory=list)
    seen: int = 0
    cached: int = 0

    def __post_init__(self) -> None:
        names, made = self.request.names, self.request.made
        self.ids, self.names = [*self.request.prompt, *made], None if names is None else [*names, *made]
        self.begun = len(self.ids)
        self.features_ND = torch.cat(list(self.request.images)) if self.request.images else None

    @property
    def answering(self) -> bool:
        """Whether the model has seen the prompt."""
        return self.seen >= self.begun

    def shared(self, other: "Job") -> int:
        """How many tokens both prompts begin with, if others may begin with them; the last one is computed anyway."""
        if self.names is None or other.names is None or self.request.scope != other.request.scope:
            return 0
        return min(common(self.names, other.names), self.begun - 1, other.begun)

    def begin(self, prefixes: Prefixes) -> None:
        """Remember what is kept of its prompt."""
        if self.names is not None:
            self.seen = self.cached = prefixes.fill(self.request.scope, self.names, self.row)

    def advance(self, tokens: int) -> None:
        """The model has seen so many tokens more; what images look like is then in its memory."""
        self.seen += tokens
        if self.features_ND is not None and self.answering:
            self.features_ND, self.request = None, replace(self.request, images=())

    def guided(self, logits_V: Tensor) -> Tensor:
        """Logits as the request's guide leaves them."""
        guide = self.request.guide
        return logits_V if guide is None else guide(self.ids[len(self.request.prompt) :], logits_V, self.row)

    def take(self, choice: Choice) -> Token:
        """Go on with the chosen token."""
        self.ids.append(choice.id)
        if self.names is not None:
            self.names.append(choice.id)
        finish: Finish | None = None
        if choice.id in self.request.eos_ids:
            finish = "stop"
        elif len(self.ids) - len(self.request.prompt) == self.request.max_tokens:
            finish = "length"
        return Token(self.id, choice.id, finish, choice.logprob, choice.top, self.cached)


def check_prompt(cfg: TextConfig, prompt: Sequence[int], others: int = 0) -> None:
    """PromptError for an empty prompt, an id outside the vocabulary, or more positions than the model has.

    others: positions needed besides the prompt (what stands before it, and the answer).
    """
    limit, needed = cfg.max_position_embeddings, len(prompt) + others
    if not prompt:
        raise PromptError("the prompt is empty; a model needs at least one token to go on from")
    wrong = next((i for i in prompt if not 0 <= i < cfg.vocab_size), None)
    if wrong is not None:
        raise PromptError(f"the prompt holds the id {wrong}; the vocabulary has ids 0 to {cfg.vocab_size - 1}")
    if needed > limit:
        raise PromptError(
            f"the prompt needs {needed:,} positions (context, prompt and answer); this model has {limit:,}; "
            "shorten the prompt or allow fewer new tokens"
        )
