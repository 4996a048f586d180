"""A ragged batch of prompts → their continuations, one token per sequence and step.

Shape suffixes: B batch, T tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from herd.config import TextConfig
from herd.engine.sampler import Sampler
from herd.errors import PromptError
from herd.model import Cache, KVCache, Transformer

PREFILL_TOKENS = 1024  # tokens per sequence and forward pass; bounds the memory of a long prompt
_PAD = 0  # any id: position -1 hides it


@dataclass(frozen=True)
class Token:
    """One event of `stream`: sequence `row` went on with `id`; `last` if it ends here (end token or length)."""

    row: int
    id: int
    last: bool


def generate(
    transformer: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    cache: Cache | None = None,
    eos_ids: Sequence[int] = (),
    sampler: Sampler | None = None,
    start_position: int = 0,
) -> list[list[int]]:
    """Continuations of all prompts, without the end tokens. Arguments as for `stream`."""
    out: list[list[int]] = [[] for _ in prompts]
    events = stream(
        transformer,
        prompts,
        max_tokens=max_tokens,
        cache=cache,
        eos_ids=eos_ids,
        sampler=sampler,
        start_position=start_position,
    )
    for token in events:
        if token.id not in eos_ids:
            out[token.row].append(token.id)
    return out


@torch.inference_mode()
def stream(
    transformer: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    cache: Cache | None = None,
    eos_ids: Sequence[int] = (),
    sampler: Sampler | None = None,
    start_position: int = 0,
) -> Iterator[Token]:
    """Yield every new token of every prompt as it is chosen, end tokens included.

    The first token of each prompt stands at start_position (what came before is in the cache). cache None: a fresh
    KVCache. sampler None: greedy. A sequence ends with one of eos_ids or after max_tokens. PromptError for an empty
    prompt, an id outside the vocabulary, or a length that does not fit max_position_embeddings.
    """
    cfg = transformer.config
    check_prompts(cfg, prompts, start_position + max_tokens)
    if not prompts or max_tokens < 1:
        return
    cache = KVCache(cfg) if cache is None else cache
    sampler = Sampler() if sampler is None else sampler
    streams = sampler.streams(len(prompts))
    device = transformer.model.embed_tokens.weight.device
    logits_BV = _prefill(transformer, prompts, cache, start_position, device)
    positions = [start_position + len(prompt) for prompt in prompts]
    running = set(range(len(prompts)))
    for step in range(1, max_tokens + 1):
        chosen = sampler.choose(logits_BV, streams)
        for row in sorted(running):
            last = chosen[row] in eos_ids or step == max_tokens
            if last:
                running.discard(row)
            yield Token(row, chosen[row], last)
        if not running:
            return
        # A finished row stays in the batch as padding, so that the cache keeps one shape.
        here = [positions[row] + step - 1 if row in running else -1 for row in range(len(prompts))]
        ids_BT = torch.tensor(chosen, device=device).unsqueeze(1)
        positions_BT = torch.tensor(here, device=device).unsqueeze(1)
        logits_BV = transformer(ids_BT, positions_BT, cache, last_only=True)[:, -1]


def _prefill(
    transformer: Transformer, prompts: Sequence[Sequence[int]], cache: Cache, start: int, device: torch.device
) -> Tensor:
    """Feed the prompts, right-padded and in pieces; logits after the last token of each, [B, V]."""
    lengths_B = torch.tensor([len(prompt) for prompt in prompts])
    longest = int(lengths_B.max())
    ids_BT = torch.full((len(prompts), longest), _PAD)
    for row, prompt in enumerate(prompts):
        ids_BT[row, : len(prompt)] = torch.tensor(prompt)
    steps_T = torch.arange(longest)
    positions_BT = torch.where(steps_T < lengths_B[:, None], start + steps_T, -1)
    logits_BV = torch.empty(len(prompts), transformer.config.vocab_size, device=device)
    for first in range(0, longest, PREFILL_TOKENS):
        piece = slice(first, first + PREFILL_TOKENS)
        ids, positions = ids_BT[:, piece].to(device), positions_BT[:, piece].to(device)
        out_BV = transformer(ids, positions, cache, last_only=True)[:, -1]
        ends_here_B = (lengths_B > first) & (lengths_B <= first + PREFILL_TOKENS)
        logits_BV[ends_here_B] = out_BV[ends_here_B]
    return logits_BV


def check_prompts(cfg: TextConfig, prompts: Sequence[Sequence[int]], others: int = 0) -> None:
    """PromptError for an empty prompt, an id outside the vocabulary, or more positions than the model has.

    others: positions needed besides the prompt (what stands before it, and the answer).
    """
    limit = cfg.max_position_embeddings
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise PromptError(f"prompt {row} is empty; a model needs at least one token to go on from")
        wrong = next((i for i in prompt if not 0 <= i < cfg.vocab_size), None)
        if wrong is not None:
            raise PromptError(f"prompt {row} holds the id {wrong}; the vocabulary has ids 0 to {cfg.vocab_size - 1}")
        if len(prompt) + others > limit:
            raise PromptError(
                f"prompt {row} needs {len(prompt) + others:,} positions (context, prompt and answer); "
                f"this model has {limit:,}; shorten the prompt or allow fewer new tokens"
            )
