"""What a step is made of: its chunks, those around them, and questions that both answer rightly."""

import numpy as np
import pytest
import torch

from herd.data.pool import build
from herd.train.batches import Batches
from herd.train.recipe import Model, Phase, Recipe
from herd.train.rows import Rows
from tests.data.tiny_text import recipe, tokenizer, write_files

GROUPS, D = 3, 4
MODEL = Model(global_layer=1, chunk=1024, experts=2, expert_width=8, lora_rank=0)


def phase(**changes: float) -> Phase:
    given = {"steps": 1, "questions": 12, "chunks": 2, "rows": 50, "dilute_to": 10**6, "lr": 0.1, "warmup": 0}
    return Phase(**{**given, "decay": 0.0, "around": 3, "blind": 0.5, **changes})


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> Batches:
    folder = tmp_path_factory.mktemp("sources")
    write_files(folder)
    texts = recipe(folder)
    pool = build(texts, tokenizer(folder))

    def numbered(rows: Rows) -> tuple[Rows, torch.Tensor]:
        """States that say which token of all they belong to."""
        return rows, torch.arange(len(rows.ids_N)).float().unsqueeze(1).expand(-1, D)

    bank = {
        "chunks": numbered(Rows(pool.chunk_ids_N, pool.chunk_start_C)),
        "questions": numbered(Rows(pool.question_ids_M, pool.question_start_Q)),
        "passages": numbered(Rows(pool.chunk_ids_N[:32], np.array([0, 16, 32]))),
    }
    return Batches(Recipe(texts, MODEL, phase(), phase()), pool, bank, GROUPS)


def of_chunks(batches: Batches, states: torch.Tensor) -> set[int]:
    """The chunks that these states come from."""
    return set((np.searchsorted(batches.pool.chunk_start_C, states[:, 0].numpy(), side="right") - 1).tolist())


def test_other_chunks_are_the_nearest_ones_as_they_were_refreshed(batches: Batches) -> None:
    batches.refresh(lambda x: x + 0.25)
    for step in range(20):
        batch = batches.draw(phase(), step, looking=True)
        own = of_chunks(batches, torch.cat([x[:n] for x, n in zip(batch.chunk_CTD, batch.chunk_lengths, strict=True)]))
        assert (batch.other_OD % 1 == 0.25).all()
        others = of_chunks(batches, batch.other_OD)
        assert len(own) == 2 and not own & others
        assert len(batch.other_OD) + sum(batch.chunk_lengths) <= batch.context_tokens
        distance = {c: min(abs(c - mine) for mine in own) for c in range(len(batches.pool.chunk_start_C) - 1)}
        rest = [distance[c] for c in distance if c not in own | others]
        assert not others or not rest or max(distance[c] for c in others) <= min(rest)


def test_absent_questions_ask_for_nothing_in_the_other_chunks(batches: Batches) -> None:
    batches.refresh(lambda x: x)
    pool, seen = batches.pool, 0
    for step in range(40):
        batch = batches.draw(phase(questions=30), step, looking=False)
        present = of_chunks(batches, batch.other_OD) | of_chunks(batches, batch.chunk_CTD[:, 0])
        asked = np.searchsorted(pool.question_start_Q, batch.question_QTD[:, 0, 0].numpy())
        twins = pool.twin_of_Q[asked]
        assert not set(twins.tolist()) & present
        seen += int((twins >= 0).sum())
    assert seen


def test_some_heads_are_blind_where_there_is_evidence_and_never_all_of_them(batches: Batches) -> None:
    blind = [batches.draw(phase(), step, looking=False) for step in range(20)]
    rows = torch.cat([b.blind_RG for b in blind])
    found = torch.cat([b.evidence_R for b in blind]) >= 0
    assert not rows[~found].any() and not rows.all(1).any()
    assert 0.2 < rows[found].float().mean() < 0.6
