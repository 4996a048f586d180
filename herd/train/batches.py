"""Steps drawn from a pool: some chunks, and questions about them. Seed and step number decide alone."""

import math
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from herd.data.bank import pad
from herd.data.pool import NO_EVIDENCE, Pool
from herd.train.grown import Batch
from herd.train.recipe import Recipe


class Batches:
    def __init__(self, recipe: Recipe, pool: Pool, chunk_states_ND: Tensor, question_states_MD: Tensor) -> None:
        self.recipe, self.pool = recipe, pool
        self.chunk_states, self.question_states = chunk_states_ND, question_states_MD
        self._lengths = np.diff(pool.question_start_Q)
        order = np.argsort(pool.chunk_of_Q, kind="stable")
        bounds = np.searchsorted(pool.chunk_of_Q[order], np.arange(-1, len(pool.chunk_start_C)))
        self._about = [order[a:b] for a, b in pairwise(bounds)]  # [0]: absent questions

    def draw(self, step: int, *, few: bool) -> Batch:
        """The batch of one step; `few`: of the smallest number of chunks, and of short questions."""
        r, pool = self.recipe, self.pool
        rng = np.random.default_rng((r.seed, step))
        chunks = rng.choice(len(pool.chunk_start_C) - 1, self._chunk_count(rng, few), replace=False)
        questions = self._questions(chunks, rng, few)
        lengths = [int(n) for n in pool.chunk_start_C[chunks + 1] - pool.chunk_start_C[chunks]]
        first_of = dict(zip(chunks.tolist(), np.cumsum([0, *lengths[:-1]]).tolist(), strict=True))
        rows, tokens, targets, evidence = [], [], [], []
        for i, q in enumerate(questions.tolist()):
            start, stop = (int(x) for x in pool.question_start_Q[q : q + 2])
            answer = np.arange(start + int(pool.answer_start_Q[q]) - 1, stop - 1)
            place = pool.evidence_M[answer]
            rows.append(np.full(len(answer), i))
            tokens.append(answer - start)
            targets.append(pool.question_ids_M[answer + 1])
            evidence.append(np.where(place >= 0, place + first_of.get(int(pool.chunk_of_Q[q]), 0), place))
        kept = _thin(np.concatenate(evidence), r.batch.rows, rng)
        # Copying is learnt from contexts whose evidence stands out; only looking is trained under full dilution.
        longest = math.log(max((r.loss.dilute_answers_to if few else r.loss.dilute_to) / sum(lengths), 1.0))
        text, text_ids = self._text(chunks, rng)
        return Batch(
            chunk_CTD=pad([_row(self.chunk_states, pool.chunk_start_C, c) for c in chunks]),
            chunk_lengths=lengths,
            question_QTD=pad([_row(self.question_states, pool.question_start_Q, q) for q in questions]),
            row_R=_long(rows)[kept],
            token_R=_long(tokens)[kept],
            target_R=_long(targets)[kept],
            evidence_R=_long(evidence)[kept],
            context_tokens=int(sum(lengths) * math.exp(rng.uniform(0, longest))),
            text_BTD=text,
            text_ids_BT=text_ids,
        )

    def _chunk_count(self, rng: np.random.Generator, few: bool) -> int:
        low, high = self.recipe.batch.chunks
        high = low if few else high
        return min(round(math.exp(rng.uniform(math.log(low), math.log(high)))), len(self.pool.chunk_start_C) - 1)

    def _questions(self, chunks: np.ndarray, rng: np.random.Generator, few: bool) -> np.ndarray:
        """Questions these chunks answer, and some they do not."""
        r = self.recipe
        # Rows of like length waste little padding: often only short questions, sometimes any.
        longest = np.quantile(self._lengths, rng.choice((0.4, 0.7, 0.85 if few else 1.0)))
        present = np.concatenate([self._about[c + 1] for c in chunks])
        present = present[self._lengths[present] <= longest]
        absent = rng.choice(self._about[0], min(len(self._about[0]), 4 * r.batch.questions), replace=False)
        absent = absent[~np.isin(self.pool.twin_of_Q[absent], chunks) & (self._lengths[absent] <= longest)]
        count = min(int(r.pool.absent_share * r.batch.questions), len(absent))
        chosen = rng.choice(present, min(r.batch.questions - count, len(present)), replace=False)
        return np.concatenate([chosen, absent[:count]])

    def _text(self, chunks: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        pool, batch = self.pool, self.recipe.batch
        starts = [
            int(pool.chunk_start_C[c]) for c in rng.choice(chunks, min(batch.text_rows, len(chunks)), replace=False)
        ]
        spans = [(s, min(s + batch.text_tokens, len(pool.chunk_ids_N))) for s in starts]
        spans = [(s, e) for s, e in spans if e - s == batch.text_tokens]
        if not spans:
            return torch.empty(0), torch.empty(0)
        states = torch.stack([self.chunk_states[s:e] for s, e in spans])
        return states, torch.stack([torch.from_numpy(pool.chunk_ids_N[s:e].astype(np.int64)) for s, e in spans])


def _row(states: Tensor, start: np.ndarray, i: int) -> Tensor:
    return states[int(start[i]) : int(start[i + 1])]


def _thin(evidence_R: np.ndarray, most: int, rng: np.random.Generator) -> Tensor:
    """Which answer rows are trained: all where a copy begins or an absence shows, and others up to `most`."""
    before = np.concatenate([[NO_EVIDENCE], evidence_R[:-1]])
    first = (evidence_R != NO_EVIDENCE) & (evidence_R != before + 1)
    priority = rng.random(len(evidence_R)) + first
    return torch.from_numpy(np.sort(np.argsort(-priority, kind="stable")[:most]))


def _long(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))
