"""Many requests at a time, one forward pass a step (continuous batching).

Shape suffixes: N tokens of a step, E sequences that choose a token, D hidden, V vocabulary.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from herd.engine.request import Job, Request, Token, check_prompt
from herd.engine.sampler import Draws, Sampler, choose
from herd.engine.scheduler import Piece, Scheduler
from herd.errors import PromptError
from herd.model import Cache, KVCache, KVRow, Memory, Transformer
from herd.model.fusion import Patches, places
from herd.model.vision import Vision

ROWS = 64
PROMPT_TOKENS = 1024  # of a step; bounds its memory and how long answers wait for prompts beside them


class Engine:
    """Runs requests together. Each gets the tokens it would get alone.

    That holds up to the rounding of matrix products, whose order of sums depends on the size of a batch. An engine
    belongs to one thread.
    """

    def __init__(
        self,
        transformer: Transformer,
        *,
        cache: Memory | None = None,
        rows: int = ROWS,
        memory: int | None = None,
        prompt_tokens: int = PROMPT_TOKENS,
        beside: int | None = None,
        vision: Vision | None = None,
    ) -> None:
        """cache None: requests see nothing but themselves. At most `rows` requests run at a time, with `memory` bytes
        of keys and values (None: any), and see `prompt_tokens` tokens of prompts in a step; `beside` where several run
        (None: no fewer), so that none waits long for another's prompt. vision: what images of prompts are seen with,
        None if they have none."""
        beside = prompt_tokens if beside is None else beside
        assert rows > 0 and prompt_tokens > 0 and beside > 0, (rows, prompt_tokens, beside)
        dtype = transformer.memory_dtype
        self.transformer = transformer
        self.cache: Memory = KVCache(transformer.config, dtype) if cache is None else cache
        chunk = transformer.config.attention_chunk_size
        self._scheduler = Scheduler(rows, memory, (prompt_tokens, beside), chunk, self.cache.start_position)
        self._next_id, self._vision = 0, vision

    def submit(self, request: Request) -> int:
        """Queue a request; the number that names it in `Token`, counted from 0.

        PromptError if it can never run: a bad prompt, patches that are not those of its images, more positions than
        the model has, or more keys and values than fit into memory; or if what it goes on from is not kept.
        """
        cfg, before = self.transformer.config, self._kept(request)
        known = [] if before is None else before.ids
        ids = [*known, *request.prompt]
        check_prompt(cfg, request.prompt, self.cache.start_position + len(known) + request.max_tokens)
        patches = [len(known) + place for place in self._patches(request)]
        row = self._open(request) if before is None else _room_in(before, len(ids) + request.max_tokens)
        id, self._next_id = self._next_id, self._next_id + 1
        draws = Draws(request.sampler, ids, cfg.vocab_size)
        seen = 0 if before is None else self._scheduler.kept.pop(before.id).seen
        kept = before is not None or request.room > 0
        self._scheduler.waiting.append(Job(id, request, row, draws, ids, patches, seen, kept))
        return id

    def _kept(self, request: Request) -> Job | None:
        if request.after is not None and request.after not in self._scheduler.kept:
            raise PromptError(
                f"request {request.after} cannot be gone on from: it left no room, has not ended or was given up; "
                "submit its tokens again"
            )
        return None if request.after is None else self._scheduler.kept[request.after]

    def _patches(self, request: Request) -> list[int]:
        if self._vision is not None:
            return places(request.prompt, self._vision.config.image_token_index, request.images)
        if request.images:
            raise PromptError(f"this engine has no image encoder; submit no images (given: {len(request.images):,})")
        return []

    def _open(self, request: Request) -> KVRow:
        """Memory for a request that goes on from no other. PromptError if it is more than there is."""
        prompt, limit = len(request.prompt), self._scheduler.memory
        row = self.cache.open(prompt + request.max_tokens + request.room, prompt)
        if limit is not None and row.nbytes > limit:
            room = f" and room for {request.room:,} more" if request.room else ""
            raise PromptError(
                f"prompt ({prompt:,} tokens) and answer (up to {request.max_tokens:,}){room} need {row.nbytes:,} bytes "
                f"for keys and values; this engine has {limit:,}: shorten them, or give it more memory"
            )
        return row

    def keep(self, ids: Sequence[int], row: KVRow) -> int:
        """Go on as if a request had ended with these tokens, all but the last of which `row` remembers: the number by
        which other requests go on from it."""
        id, self._next_id = self._next_id, self._next_id + 1
        draws = Draws(Sampler(), ids, self.transformer.config.vocab_size)
        self._scheduler.kept[id] = Job(id, Request(ids, 1), row, draws, list(ids), seen=len(ids) - 1, kept=True)
        return id

    def release(self, id: int) -> KVRow | None:
        """Hand over the memory of a request that has ended and left room; None if it was given back."""
        job = self._scheduler.kept.pop(id, None)
        return None if job is None else job.row

    def forget(self, id: int) -> None:
        """Give back the memory of a request that has ended and left room, unless it is given back already."""
        if id in self._scheduler.kept:
            self._scheduler.kept.pop(id).row.close()

    def cancel(self, id: int) -> bool:
        """End a request and give its memory back, unless it left room and answers already; False if it has ended."""
        job = self._scheduler.find(id)
        if job is not None:
            self._scheduler.remove(job)
        return job is not None

    def row(self, id: int) -> KVRow:
        """The memory of a request that waits or runs. What it notes for citations outlives the request."""
        job = self._scheduler.find(id)
        assert job is not None, f"request {id} has ended"
        return job.row

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._scheduler.waiting and not self._scheduler.running

    @property
    def running(self) -> list[int]:
        """The requests that have a row, the oldest first."""
        return [job.id for job in self._scheduler.running]

    @property
    def memory_used(self) -> int:
        """Bytes of keys and values that are set aside for the requests that run or may be gone on from."""
        return self._scheduler.memory_used

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """One forward pass: every answer goes on by a token, prompts by a piece. What is interrupted ends."""
        pieces = self._scheduler.plan()
        if not pieces:
            return []
        try:
            logits_EV = forward(self.transformer, self.cache, pieces)
            choosing = [piece.job for piece in pieces if piece.chooses]
            guided = [job.guided(logits_V) for job, logits_V in zip(choosing, logits_EV, strict=True)]
            choices = choose(guided, [job.draws for job in choosing])
        except BaseException:
            # Some layers remember this step and some do not, so these requests cannot go on; others can.
            for piece in pieces:
                self._scheduler.remove(piece.job, broken=True)
            raise
        for piece in pieces:
            piece.job.advance(len(piece.ids))
        tokens = [job.take(choice) for job, choice in zip(choosing, choices, strict=True)]
        for job, token in zip(choosing, tokens, strict=True):
            if token.finish:
                self._scheduler.remove(job)
        return tokens


def forward(transformer: Transformer, memory: Memory, pieces: Sequence[Piece]) -> Tensor:
    """Logits [E, V] after the last token of each piece that chooses. Pieces stand side by side, without padding."""
    device = transformer.model.embed_tokens.weight.device
    ids, positions, ends = list[int](), list[int](), list[int]()
    for piece in pieces:
        first = memory.start_position + piece.job.seen
        ids += piece.ids
        positions += range(first, first + len(piece.ids))
        if piece.chooses:
            ends.append(len(ids) - 1)
    cache: Cache = memory.rows([piece.job.row for piece in pieces], [len(piece.ids) for piece in pieces])
    ids_1N, positions_1N = torch.tensor([ids], device=device), torch.tensor([positions], device=device)
    states_1ND = transformer.states(ids_1N, positions_1N, cache, _patches(pieces, device))
    return transformer.logits(states_1ND[0, torch.tensor(ends, dtype=torch.long, device=device)])


def _patches(pieces: Sequence[Piece], device: torch.device) -> Patches | None:
    """The features of images in a step; a piece may hold any part of an image."""
    at, features, first = list[int](), list[Tensor](), 0
    for piece in pieces:
        job = piece.job
        low, high = (bisect_left(job.patches, place) for place in (job.seen, job.seen + len(piece.ids)))
        if job.features_ND is not None and low < high:
            at += [first + place - job.seen for place in job.patches[low:high]]
            features.append(job.features_ND[low:high].to(device))
        first += len(piece.ids)
    return Patches(torch.tensor(at, device=device), torch.cat(features)) if at else None


def _room_in(before: Job, tokens: int) -> KVRow:
    """The memory of a request for another one behind it. PromptError if it is too little."""
    if tokens > before.row.tokens:
        raise PromptError(
            f"with prompt and answer there would be {tokens:,} tokens in room for {before.row.tokens:,}; "
            "leave more room with the first request, or submit all tokens anew"
        )
    return before.row


def stream(engine: Engine) -> Iterator[Token]:
    """Every token of every request, until none is left."""
    while not engine.idle:
        yield from engine.step()


def generate(
    transformer: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    cache: Memory | None = None,
    eos_ids: Sequence[int] = (),
    sampler: Sampler | None = None,
) -> list[list[int]]:
    """Continuations of all prompts, without the end tokens. sampler None: greedy. See `Engine` and `Request`."""
    out: list[list[int]] = [[] for _ in prompts]
    engine = Engine(transformer, cache=cache)
    for prompt in prompts:
        engine.submit(Request(prompt, max_tokens, sampler or Sampler(), eos_ids))
    for token in stream(engine):
        if token.id not in eos_ids:
            out[token.request].append(token.id)
    return out
