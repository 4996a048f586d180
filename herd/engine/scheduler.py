"""Which request gets how many tokens of the next step. Holds no tensors and knows no model."""

from collections import deque
from dataclasses import dataclass

from herd.engine.prefixes import Prefixes
from herd.engine.request import Job

WORTH = 64  # tokens that are not computed again: for fewer, no job waits


@dataclass(frozen=True)
class Piece:
    """The next tokens of a job that the model sees; `chooses` if they are its last, so that a token follows."""

    job: Job
    ids: list[int]
    chooses: bool


class Scheduler:
    """First come, first served. A job runs as soon as there is a row, and memory for all it can ever need.

    So a job that runs is never interrupted for want of memory. The first one that waits is not overtaken by smaller
    ones, so every job runs at last; where it needs memory of what is kept, that is given up. A job whose beginning
    another one is about to see follows it: it has a row, but gives its turns to the other one, and begins behind what
    that has seen.
    """

    def __init__(
        self,
        rows: int,
        memory: int | None,
        prompt_tokens: tuple[int, int],
        chunk: int | None,
        start: int,
        prefixes: Prefixes,
    ) -> None:
        """At most so many jobs, bytes of keys and values (None: any), and tokens of prompts in one step: where one job
        runs, and where several do.

        chunk: of attention; no piece reaches over the end of one. start: position of the first token of every job.
        prefixes: what jobs may begin with.
        """
        self.rows, self.memory, self.prompt_tokens = rows, memory, prompt_tokens
        self.chunk, self.start, self.prefixes = chunk, start, prefixes
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self._following: dict[Job, tuple[Job, int]] = {}  # what runs and has not begun: whom, up to how many tokens

    @property
    def memory_used(self) -> int:
        """Bytes that are set aside for the jobs that run, and those of what is kept."""
        return sum(job.row.nbytes for job in self.running) + self.prefixes.nbytes

    @property
    def left(self) -> int | None:
        """Bytes that what is kept may take beside the jobs that run; None: any."""
        return None if self.memory is None else self.memory - sum(job.row.nbytes for job in self.running)

    def find(self, id: int) -> Job | None:
        """A job that waits or runs."""
        return next((job for job in (*self.running, *self.waiting) if job.id == id), None)

    def remove(self, job: Job) -> None:
        """Forget a job and give its memory back."""
        (self.running if job in self.running else self.waiting).remove(job)
        self._following.pop(job, None)
        job.row.close()

    def keep(self, job: Job) -> None:
        """Let others begin with what a job has seen, if it is named."""
        if job.names is not None and job.seen > job.cached:
            self.prefixes.keep(job.request.scope, job.names[: job.seen], job.row, self.left)

    def plan(self) -> list[Piece]:
        """The next step: one token of every answer, and prompts as far as prompt_tokens go.

        So an answer goes on in every step, however long the prompts beside it are.
        """
        self._admit()
        for job, (first, tokens) in [*self._following.items()]:
            if first not in self.running:
                self._begin(job)
            elif first.seen >= tokens:
                self.keep(first)
                self._begin(job)
        shares, pieces = self._shares(), []
        for job in self.running:
            count = shares.get(job, len(job.ids) - job.seen)
            if count:
                stop = job.seen + count
                pieces.append(Piece(job, job.ids[job.seen : stop], stop == len(job.ids)))
        return pieces

    def _shares(self) -> dict[Job, int]:
        """Tokens that are seen of each prompt: a quarter of all is the oldest's, so that it goes on, whatever comes;
        then those come that have the fewest left, so that a short one does not wait for a long one. With one that is
        seen to its end the step ends, too, or the first token of its answer would wait for parts of others."""
        prompts = [job for job in self.running if not job.answering]
        shares, left = dict.fromkeys(prompts, 0), self.prompt_tokens[len(self.running) - len(self._following) > 1]

        def give(turn: Job, most: int) -> int:
            job, stop = self._following.get(turn, (turn, len(turn.ids)))
            rest = most if self.chunk is None else self.chunk - (self.start + job.seen) % self.chunk - shares[job]
            count = max(0, min(stop - job.seen - shares[job], most, rest))
            shares[job] += count
            return count

        for job in prompts[:1]:
            left -= give(job, (left + 3) // 4)
        ends = False
        for job in sorted(prompts, key=lambda job: len(job.ids) - job.seen):
            if ends and len(job.ids) - job.seen > left:
                break
            left -= give(job, left)
            ends = ends or job.seen + shares[job] == len(job.ids)
        return shares

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.rows:
            first, left = self.waiting[0], self.left
            if first.names is not None:
                self.prefixes.find(first.request.scope, first.names)  # so that others are given up first
            if left is not None and not self.prefixes.shrink(left - first.row.nbytes):
                return
            self.running.append(self.waiting.popleft())
            self._begin(first)

    def _begin(self, job: Job) -> None:
        """Let a job go on behind what is kept of its beginning, or follow the one that has most of what is not."""
        self._following.pop(job, None)
        known = self.prefixes.known(job.request.scope, job.names or ())
        others = [its for its in self.running if its is not job and its not in self._following]
        shared = [job.shared(its) for its in others] if job.begun - known > WORTH else []
        tokens = max(shared, default=0)
        if tokens - known >= WORTH and self.prefixes.fits(tokens, self.left):
            first = others[shared.index(tokens)]
            if first.seen < tokens:
                self._following[job] = first, tokens
                return
            self.keep(first)
        job.begin(self.prefixes)
