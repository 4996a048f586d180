"""A pool's evidence points at the very text that the answer repeats."""

from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from herd.data import pool as module
from herd.data.pool import NO_EVIDENCE, NULL_EVIDENCE, Pool, build
from herd.data.question import Question
from herd.errors import ConfigError
from herd.prompt import Tokenizer
from tests.data.tiny_text import recipe, tokenizer, write_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    write_files(folder)
    return folder


@pytest.fixture(scope="module")
def made(folder: Path) -> tuple[Pool, Tokenizer]:
    words = tokenizer(folder)
    return build(recipe(folder), words), words


def chunk_ids(pool: Pool, i: int) -> list[int]:
    return pool.chunk_ids_N[pool.chunk_start_C[i] : pool.chunk_start_C[i + 1]].tolist()


def answers(pool: Pool) -> list[tuple[int, list[int], np.ndarray]]:
    """For each question: its number, the answer's ids, and the evidence of each of them."""
    found = []
    for q, start in enumerate(pool.question_start_Q[:-1]):
        first, stop = start + pool.answer_start_Q[q], pool.question_start_Q[q + 1]
        found.append((q, pool.question_ids_M[first:stop].tolist(), pool.evidence_M[first - 1 : stop - 1]))
        assert (pool.evidence_M[start : first - 1] == NO_EVIDENCE).all()
    return found


def test_evidence_points_at_the_text_the_answer_copies(made: tuple[Pool, Tokenizer]) -> None:
    pool, words = made
    copied = 0
    for q, ids, evidence in answers(pool):
        places = [i for i, place in enumerate(evidence) if place >= 0]
        if not places:
            continue
        context = chunk_ids(pool, pool.chunk_of_Q[q])
        text, ends = words.decode(context), np.cumsum([len(words.decode([i])) for i in context])
        if len(text) != ends[-1] or not text.isascii():
            continue
        for i in places:
            said, stop = words.decode([ids[i]]), int(ends[evidence[i]])
            start = stop - len(words.decode([context[evidence[i]]]))
            # An answer's token may begin with the blank before the copy.
            assert any(text.startswith(s, at) for s in (said, said.lstrip(" ")) for at in range(start, stop)), said
            copied += 1
        assert [evidence[i] for i in places] == sorted(evidence[i] for i in places) or pool.family_Q[q] == "two-hop"
    assert copied > 300


def test_null_stands_where_the_key_is_complete(made: tuple[Pool, Tokenizer]) -> None:
    pool, words = made
    absent = 0
    for q, ids, evidence in answers(pool):
        nulls = np.flatnonzero(evidence == NULL_EVIDENCE)
        is_absent = pool.family_Q[q].startswith("absent")
        assert is_absent == (pool.chunk_of_Q[q] < 0) == (len(nulls) == 1)
        if is_absent:
            assert (evidence[evidence != NULL_EVIDENCE] == NO_EVIDENCE).all()
            assert words.decode(ids[nulls[0] :]) == " is not in the context."
            assert pool.twin_of_Q[q] < len(pool.chunk_start_C) - 1
            absent += 1
    assert absent > 5


def test_questions_end_their_turn(made: tuple[Pool, Tokenizer]) -> None:
    pool, words = made
    for _, ids, evidence in answers(pool):
        assert ids[-1] == words.token_id("<|im_end|>")
        assert evidence[-1] == NO_EVIDENCE


def test_keys_are_unique(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = defaultdict(set)
    add = module._Writer.add_question

    def record(self: module._Writer, question: Question, chunk: int, text: str) -> None:
        asked[question.key].add(chunk)
        add(self, question, chunk, text)

    monkeypatch.setattr(module._Writer, "add_question", record)
    both = (f"{folder}/one.py", f"{folder}/two.py")  # one chunk each
    build(recipe(folder, paths=both, chunks=2, questions_per_chunk=99), tokenizer(folder))
    assert all(len(chunks) == 1 for key, chunks in asked.items() if key)
    assert {"ONLY_ONE", "ONLY_TWO"} <= asked.keys()
    assert "SHARED_NAME" not in asked


def test_text_of_a_folder_stays_together(tmp_path: Path) -> None:
    for folder in ("apples", "pears", "plums"):
        (tmp_path / folder).mkdir()
        for name in ("one", "two", "three"):
            lines = "".join(f"{folder}_{name}_{i} = {i}\n" for i in range(60))
            (tmp_path / folder / f"{name}.py").write_text(lines)
    words = tokenizer(tmp_path / "apples")
    pool = build(recipe(tmp_path, chunks=18, facts_per_chunk=0, chunk_size=300), words)
    folders = [words.decode(chunk_ids(pool, i)).split("/")[0] for i in range(len(pool.chunk_start_C) - 1)]
    changes = sum(a != b for a, b in pairwise(folders))
    assert len(set(folders)) == 3 and changes <= 5  # twice over all three at the most
    assert len(folders) > 9


def test_quotes_begin_with_words_that_stand_in_one_place(tmp_path: Path) -> None:
    said = "this line says the same in both of the files that there are here"
    for name in ("one", "two"):
        own = "".join(f"{name} number {i} is what this line of the file begins with\n" for i in range(12))
        (tmp_path / f"{name}.py").write_text(f"{said}\n" * 12 + own)
    words = tokenizer(tmp_path)
    one_each = {"chunks": 2, "chunk_size": 1200, "questions_per_chunk": 99}
    pool = build(recipe(tmp_path, **one_each, facts_per_chunk=0, quotes_per_chunk=20), words)
    starts = pool.question_start_Q
    asked = [
        words.decode(pool.question_ids_M[starts[q] : starts[q + 1]].tolist())
        for q in np.flatnonzero(pool.family_Q == "quote")
    ]
    assert asked and not any(said[:14] in text for text in asked)


def test_same_seed_same_pool(made: tuple[Pool, Tokenizer], folder: Path, tmp_path: Path) -> None:
    pool, words = made
    pool.save(tmp_path / "pool.npz")
    loaded = Pool.load(tmp_path / "pool.npz")
    again = build(recipe(folder), words)
    for name, array in vars(pool).items():
        for other in (loaded, again):
            assert np.array_equal(vars(other)[name], array), name
            assert vars(other)[name].dtype == array.dtype
    assert [p.name for p in tmp_path.iterdir()] == ["pool.npz"]
    other = build(recipe(folder, seed=1), words)
    assert not np.array_equal(other.question_ids_M, pool.question_ids_M)


def test_held_out_files_are_not_read(made: tuple[Pool, Tokenizer], folder: Path) -> None:
    pool, words = made
    texts = [words.decode(chunk_ids(pool, i)) for i in range(len(pool.chunk_start_C) - 1)]
    assert not any("HELD_OUT" in text or "secret" in text for text in texts)
    with_it = build(recipe(folder, hold_out=()), words)
    assert "HELD_OUT" in words.decode(with_it.chunk_ids_N.tolist())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"paths": ("{stdlib}/no such folder/*.py",)}, "match no file"),
        ({"paths": ("{nowhere}/*.py",)}, r"\{nowhere\}.*\{stdlib\}"),
        ({"chunk_size": 4000}, "hold no chunk of 1000 tokens"),
    ],
)
def test_recipes_that_give_no_pool(folder: Path, changes: dict[str, object], message: str) -> None:
    if "chunk_size" in changes:
        changes = {**changes, "paths": (f"{folder}/one.py",)}
    with pytest.raises(ConfigError, match=message):
        build(recipe(folder, **changes), tokenizer(folder))
