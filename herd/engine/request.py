"""What an engine is asked for, and what it says.

Shape suffixes: V vocabulary, N tokens of images, D hidden.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from herd.config import TextConfig
from herd.engine.sampler import Choice, Draws, Sampler
from herd.errors import PromptError
from herd.model import KVRow

Finish = Literal["stop", "length"]
# Given the answer's ids so far, the logits [V] of the next one and the request's memory: logits to choose from.
Guide = Callable[[Sequence[int], Tensor, KVRow], Tensor]


@dataclass(frozen=True)
class Request:
    """Go on from these token ids until one of eos_ids, or for max_tokens. PromptError if max_tokens is below 1, or room
    below 0 or given again.

    guide: changes the logits before each choice, for instance to leave out what may not come next (-inf). images: the
    features [tokens, D] of each image in the prompt, in their order (`herd.model.vision`). room: memory for so many
    tokens more, which requests may need that go on from this one. after: the request that this one goes on from, which
    left room and has ended; the prompt then is what comes behind all of its tokens.
    """

    prompt: Sequence[int]
    max_tokens: int
    sampler: Sampler = field(default_factory=Sampler)
    eos_ids: Sequence[int] = ()
    guide: Guide | None = None
    images: Sequence[Tensor] = ()
    room: int = 0
    after: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", tuple(self.prompt))  # the caller may go on with its list
        object.__setattr__(self, "images", tuple(self.images))
        if self.max_tokens < 1:
            raise PromptError(f"max_tokens is {self.max_tokens}; an answer has at least one token")
        if self.room < 0 or (self.room and self.after is not None):
            raise PromptError(f"room is {self.room}; it is 0 or more, and given with the first request of several only")


@dataclass(frozen=True)
class Token:
    """Request `request` went on with `id`, an end token included. finish: why it ends here, None if it does not.

    logprob and top (id and logprob of the most likely tokens) if the sampler asks for them.
    """

    request: int
    id: int
    finish: Finish | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False)
class Job:
    """A request that waits or runs: its tokens so far, how many of them the model has seen, its memory.

    ids: with those of the requests that it goes on from, to begin with up to the end of the prompt. patches: where
    features of images take the places of embeddings. kept: whether its memory outlives it.
    """

    id: int
    request: Request
    row: KVRow
    draws: Draws
    ids: list[int]
    patches: list[int] = field(default_factory=list)
    seen: int = 0
    kept: bool = False

    def __post_init__(self) -> None:
        self.begun = len(self.ids)
        self.features_ND = torch.cat(list(self.request.images)) if self.request.images else None

    @property
    def answering(self) -> bool:
        """Whether the model has seen the prompt."""
        return self.seen >= self.begun

    def advance(self, tokens: int) -> None:
        """The model has seen so many tokens more; what images look like is then in its memory."""
        self.seen += tokens
        if self.features_ND is not None and self.answering:
            self.features_ND, self.request = None, replace(self.request, images=())

    def guided(self, logits_V: Tensor) -> Tensor:
        """Logits as the request's guide leaves them."""
        guide = self.request.guide
        return logits_V if guide is None else guide(self.ids[self.begun :], logits_V, self.row)

    def take(self, choice: Choice) -> Token:
        """Go on with the chosen token."""
        self.ids.append(choice.id)
        finish: Finish | None = None
        if choice.id in self.request.eos_ids:
            finish = "stop"
        elif len(self.ids) - self.begun == self.request.max_tokens:
            finish = "length"
        return Token(self.id, choice.id, finish, choice.logprob, choice.top)


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
