"""Steps drawn from a pool: some chunks, and questions about them. Seed and step number decide alone."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from herd.data.bank import pad
from herd.data.pool import NO_EVIDENCE, Pool
from herd.train.grown import NOTHING, Batch
from herd.train.recipe import Phase, Recipe
from herd.train.rows import Rows

_AT_ONCE = 16  # chunks

Bank = dict[str, tuple[Rows, Tensor]]  # rows of each kind and the hidden states of their tokens [N, D]


class Batches:
    def __init__(self, recipe: Recipe, pool: Pool, bank: Bank, groups: int) -> None:
        """groups: key/value heads of the model."""
        self.recipe, self.pool, self._groups = recipe, pool, groups
        self.chunk_states, self.question_states = bank["chunks"][1], bank["questions"][1]
        self.passages, self.passage_states = bank["passages"]
        self._lengths = np.diff(pool.question_start_Q)
        self._count = len(pool.chunk_start_C) - 1
        order = np.argsort(pool.chunk_of_Q, kind="stable")
        bounds = np.searchsorted(pool.chunk_of_Q[order], np.arange(-1, self._count + 1))
        self._about = [order[a:b] for a, b in pairwise(bounds)]  # [0]: absent questions
        self._after_local_ND = self.chunk_states[:0]

    def refresh(self, after_local: Callable[[Tensor], Tensor]) -> None:
        """Compute the states of all chunks after the new local layer, from which steps take their other chunks."""
        start = self.pool.chunk_start_C
        self._after_local_ND = torch.empty_like(self.chunk_states)
        for first in range(0, self._count, _AT_ONCE):
            chunks = range(first, min(first + _AT_ONCE, self._count))
            x_CTD = after_local(pad([_row(self.chunk_states, start, c) for c in chunks]))
            for c, x_TD in zip(chunks, x_CTD, strict=True):
                _row(self._after_local_ND, start, c).copy_(x_TD[: start[c + 1] - start[c]])

    def draw(self, phase: Phase, step: int, *, looking: bool) -> Batch:
        """The batch of one step; `looking`: mostly rows whose evidence is known, and some of the questions' own."""
        pool = self.pool
        rng = np.random.default_rng((self.recipe.seed, looking, step))
        chunks = rng.choice(self._count, min(phase.chunks, self._count), replace=False)
        lengths = [int(n) for n in np.diff(pool.chunk_start_C)[chunks]]
        longest = math.log(max(phase.dilute_to / sum(lengths), 1.0))
        context_tokens = int(sum(lengths) * math.exp(rng.uniform(0, longest)))
        others = self._around(chunks, phase.around, context_tokens - sum(lengths))
        questions = self._questions(chunks, others, phase, rng)
        first_of = dict(zip(chunks.tolist(), np.cumsum([0, *lengths[:-1]]).tolist(), strict=True))
        rows, tokens, targets, evidence, firsts = [], [], [], [], []
        for i, q in enumerate(questions.tolist()):
            start, stop = (int(x) for x in pool.question_start_Q[q : q + 2])
            begin = start + int(pool.answer_start_Q[q]) - 1
            row = np.arange(start + 1 if looking else begin, stop - 1)
            place = pool.evidence_M[row]
            rows.append(np.full(len(row), i))
            tokens.append(row - start)
            targets.append(np.where(row >= begin, pool.question_ids_M[row + 1], NOTHING))
            evidence.append(np.where(place >= 0, place + first_of.get(int(pool.chunk_of_Q[q]), 0), place))
            firsts.append((place != NO_EVIDENCE) & (place != np.concatenate([[NO_EVIDENCE], place[:-1]]) + 1))
        kept = _thin(np.concatenate(evidence), np.concatenate(firsts), phase.rows, rng, looking)
        text, text_ids = self._text(phase, rng)
        evidence_R = _long(evidence)[kept]
        return Batch(
            chunk_CTD=pad([_row(self.chunk_states, pool.chunk_start_C, c) for c in chunks]),
            chunk_lengths=lengths,
            chunk_ids_N=_long([_row(pool.chunk_ids_N, pool.chunk_start_C, c) for c in chunks]),
            other_OD=self._rows_around(others),
            question_QTD=pad([_row(self.question_states, pool.question_start_Q, q) for q in questions]),
            question_ids_QT=pad([_long([_row(pool.question_ids_M, pool.question_start_Q, q)]) for q in questions], -1),
            row_R=_long(rows)[kept],
            token_R=_long(tokens)[kept],
            target_R=_long(targets)[kept],
            evidence_R=evidence_R,
            first_R=_long(firsts)[kept].bool(),
            blind_RG=_blind(evidence_R, self._groups, phase.blind, rng),
            context_tokens=context_tokens,
            text_BTD=text,
            text_ids_BT=text_ids,
        )

    def _around(self, chunks: np.ndarray, most: int, tokens: int) -> list[int]:
        """The chunks of the pool nearest to these, so many at the most, and so many tokens."""
        near = np.abs(np.arange(self._count) - chunks[:, None]).min(0)
        order = np.argsort(near, kind="stable")[len(chunks) :][:most]
        kept = np.cumsum(np.diff(self.pool.chunk_start_C)[order]) <= tokens
        return order[kept].tolist()

    def _rows_around(self, others: list[int]) -> Tensor:
        parts = [_row(self._after_local_ND, self.pool.chunk_start_C, c) for c in others]
        return torch.cat(parts) if parts else self._after_local_ND[:0]

    def _questions(self, chunks: np.ndarray, others: list[int], phase: Phase, rng: np.random.Generator) -> np.ndarray:
        """Questions these chunks answer, and some they and the others do not."""
        # Rows of like length waste little padding: often only short questions, sometimes nearly any.
        longest = np.quantile(self._lengths, rng.choice((0.5, 0.8, 0.97)))
        present = np.concatenate([self._about[c + 1] for c in chunks])
        present = present[self._lengths[present] <= longest]
        absent = rng.choice(self._about[0], min(len(self._about[0]), 4 * phase.questions), replace=False)
        there = np.isin(self.pool.twin_of_Q[absent], [*chunks, *others])
        absent = absent[~there & (self._lengths[absent] <= longest)]
        count = min(int(self.recipe.pool.absent_share * phase.questions), len(absent))
        chosen = rng.choice(present, min(phase.questions - count, len(present)), replace=False)
        return np.concatenate([chosen, absent[:count]])

    def _text(self, phase: Phase, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Passages of plain text: states and token ids."""
        starts = self.passages.start_R
        spans = [slice(starts[i], starts[i + 1]) for i in rng.choice(len(starts) - 1, phase.text_rows)]
        if not spans:
            return torch.empty(0), torch.empty(0)
        ids_BT = np.stack([self.passages.ids_N[span] for span in spans]).astype(np.int64)
        return torch.stack([self.passage_states[span] for span in spans]), torch.from_numpy(ids_BT)


def _row(flat: Any, start: np.ndarray, i: int) -> Any:
    return flat[int(start[i]) : int(start[i + 1])]


def _thin(evidence_R: np.ndarray, first_R: np.ndarray, most: int, rng: np.random.Generator, looking: bool) -> Tensor:
    """Which answer rows are trained: first those where a copy begins or an absence shows, then others up to `most`.

    For looking, up to two thirds as many rows without evidence come on top.
    """
    priority = rng.random(len(evidence_R)) + first_R
    order = np.argsort(-priority, kind="stable")
    if looking:
        known = evidence_R[order] != NO_EVIDENCE
        order = np.concatenate([order[known][:most], order[~known][: 2 * most // 3]])
    else:
        order = order[:most]
    return torch.from_numpy(np.sort(order))


def _blind(evidence_R: Tensor, G: int, share: float, rng: np.random.Generator) -> Tensor:
    """Which groups of each row are to find nothing [R, G]: some of those with evidence, never all of a row."""
    drawn_RG = rng.random((len(evidence_R), G))
    blind_RG = (drawn_RG < share) & (drawn_RG < drawn_RG.max(1, keepdims=True))
    return torch.from_numpy(blind_RG) & (evidence_R >= 0).unsqueeze(1)


def _long(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))
