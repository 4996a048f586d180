"""Many requests at a time, one forward pass a step (continuous batching).

Shape suffixes: N tokens of a step, E sequences that choose a token, D hidden, V vocabulary.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from herd.engine.prefixes import Block, Prefixes
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
        self._chunk = chunk = transformer.config.attention_chunk_size
        self.prefixes = Prefixes(transformer.config, dtype, packed=transformer.packed is not None)
        limits = (rows, memory, (prompt_tokens, beside))
        self._scheduler = Scheduler(*limits, chunk, self.cache.start_position, self.prefixes)
        self._next_id, self._vision, self._memory = 0, vision, memory

    def submit(self, request: Request) -> int:
        """Queue a request; the number that names it in `Token`, counted from 0.

        PromptError if it can never run: a bad prompt, patches that are not those of its images, more positions than
        the model has, or more keys and values than fit into memory.
        """
        cfg = self.transformer.config
        check_prompt(cfg, request.prompt, self.cache.start_position + request.max_tokens)
        assert request.names is None or len(request.names) == len(request.prompt), "each token has a name"
        patches, row = self._patches(request), self._open(request)
        id, self._next_id = self._next_id, self._next_id + 1
        draws = Draws(request.sampler, request.prompt, cfg.vocab_size, request.made)
        self._scheduler.waiting.append(Job(id, request, row, draws, patches))
        return id

    def _patches(self, request: Request) -> list[int]:
        if self._vision is not None:
            return places(request.prompt, self._vision.config.image_token_index, request.images)
        if request.images:
            raise PromptError(f"this engine has no image encoder; submit no images (given: {len(request.images):,})")
        return []

    def _open(self, request: Request) -> KVRow:
        """Memory for a request. PromptError if it is more than there is."""
        prompt, limit = len(request.prompt), self._memory
        row = self.cache.open(prompt + request.max_tokens, prompt)
        if limit is not None and row.nbytes > limit:
            raise PromptError(
                f"prompt ({prompt:,} tokens) and answer (up to {request.max_tokens:,}) need {row.nbytes:,} bytes "
                f"for keys and values; this engine has {limit:,}: shorten them, or give it more memory"
            )
        return row

    def add(self, scope: str, names: Sequence[int], blocks: Sequence[Block]) -> None:
        """See `Prefixes.add`; as far as there is memory."""
        self.prefixes.add(scope, names, blocks, self._scheduler.left)

    def allow(self, memory: int) -> None:
        """Have so many bytes of keys and values for now; what needs more waits."""
        self._scheduler.memory = memory

    def cancel(self, id: int, *, keep: bool = False) -> bool:
        """End a request and give its memory back; False if it has ended. keep: let others begin with what it has seen,
        as where it ends by itself."""
        job = self._scheduler.find(id)
        if job is not None:
            if keep:
                self._scheduler.keep(job)
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
        """Bytes of keys and values that are set aside for the requests that run, and those of what is kept."""
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
                self._scheduler.remove(piece.job)
            raise
        for piece in pieces:
            piece.job.advance(len(piece.ids))
            # Local layers will forget what they saw of the first chunk, and answers make their own way.
            if piece.job.seen in (piece.job.begun, self._chunk):
                self._scheduler.keep(piece.job)
        tokens = [job.take(choice) for job, choice in zip(choosing, choices, strict=True)]
        for job, token in zip(choosing, tokens, strict=True):
            if token.finish:
                self._scheduler.keep(job)
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
