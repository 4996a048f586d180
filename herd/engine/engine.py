"""Many requests at a time, one forward pass a step (continuous batching).

Shape suffixes: N tokens of a step, E sequences that choose a token, D hidden, V vocabulary.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from herd.engine.request import Job, Request, Token, check_prompt
from herd.engine.sampler import Draws, Sampler, choose
from herd.engine.scheduler import Piece, Scheduler
from herd.errors import PromptError
from herd.model import Cache, KVCache, KVRow, Memory, Transformer

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
    ) -> None:
        """cache None: requests see nothing but themselves. At most `rows` requests run at a time, with `memory` bytes
        of keys and values (None: any), and see `prompt_tokens` tokens of prompts in a step."""
        assert rows > 0 and prompt_tokens > 0, (rows, prompt_tokens)
        dtype = transformer.memory_dtype
        self.transformer = transformer
        self.cache: Memory = KVCache(transformer.config, dtype) if cache is None else cache
        chunk = transformer.config.attention_chunk_size
        self._scheduler = Scheduler(rows, memory, prompt_tokens, chunk, self.cache.start_position)
        self._next_id = 0

    def submit(self, request: Request) -> int:
        """Queue a request; the number that names it in `Token`, counted from 0.

        PromptError if it can never run: a bad prompt, more positions than the model has, or more keys and values than
        fit into memory.
        """
        cfg, limit = self.transformer.config, self._scheduler.memory
        prompt, tokens = list(request.prompt), len(request.prompt) + request.max_tokens
        check_prompt(cfg, prompt, self.cache.start_position + request.max_tokens)
        row = self.cache.open(tokens, len(prompt))
        if limit is not None and row.nbytes > limit:
            raise PromptError(
                f"prompt ({len(prompt):,} tokens) and answer (up to {request.max_tokens:,}) need {row.nbytes:,} bytes "
                f"for keys and values; this engine has {limit:,}: shorten them, or give it more memory"
            )
        id, self._next_id = self._next_id, self._next_id + 1
        draws = Draws(request.sampler, prompt, cfg.vocab_size)
        self._scheduler.waiting.append(Job(id, request, row, draws, prompt))
        return id

    def cancel(self, id: int) -> bool:
        """End a request and give its memory back; False if it has ended before."""
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
        """Bytes of keys and values that are set aside for the requests that run."""
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
            piece.job.seen += len(piece.ids)
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
    states_1ND = transformer.states(ids_1N, positions_1N, cache)
    return transformer.logits(states_1ND[0, torch.tensor(ends, dtype=torch.long, device=device)])


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
