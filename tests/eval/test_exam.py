"""Needles and lookup exams: where evidence stands, that names are unique, lengths, and tables of results."""

from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest

from herd.context.chunks import cut
from herd.data import code
from herd.errors import ConfigError, SourceError
from herd.eval import baselines, corpus, lookup, needle, report
from herd.eval import exam as exam_


class Bytes:
    """A tokenizer of one token for three characters."""

    def encode(self, text: str) -> list[int]:
        return [0] * (len(text) // 3 + 1)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]


@dataclass
class Cite:
    source: str
    lines: tuple[int, int]


@dataclass
class Reply:
    text: str
    citations: list[Cite]


MODEL = SimpleNamespace(tokenizer=Bytes(), config=SimpleNamespace(attention_chunk_size=512))


@pytest.fixture(scope="module")
def exam() -> exam_.Exam:
    return exam_.prepare(MODEL, ("networkx", "asyncio", "http", "email"), 60_000, 40, 20, 0)


def test_lengths() -> None:
    assert [corpus.tokens_of(text) for text in ("128K", "1m", 77)] == [131072, 1048576, 77]
    with pytest.raises(ConfigError, match="length"):
        corpus.tokens_of("12G")


def test_needles_stand_where_they_say() -> None:
    files = [corpus.File(f"p/{i}.py", f"line = {i}\n" * 50) for i in range(7)]
    hidden, needles = needle.hide(files, needle.draw(30, needle.KINDS, Random(0)))
    texts = {file.name: file.text.splitlines() for file in hidden}
    assert len(needles) == 30 and len({n.question.key for n in needles}) == 30
    for item in needles:
        assert texts[item.source][item.line - 1] == item.fact.sentence
    assert sum(len(lines) for lines in texts.values()) == 350 + 30
    assert [n.depth for n in needles] == sorted(n.depth for n in needles)
    answers = [Reply(n.question.answer, [Cite(n.source, (n.line, n.line))]) for n in needles]
    table = needle._table(needles, answers)
    assert table["exact"] == 1 and table["first_citation_right"] == 1 and set(table["by_depth"].values()) == {1.0}


def test_fill_gives_the_length_or_says_why_not() -> None:
    files = [corpus.File(f"p/{i}.py", "x = 1\n" * 600) for i in range(5)]
    chosen, tokens = corpus.fill(files, 3000, MODEL.tokenizer, 512)
    assert 3000 <= tokens <= 3512 and len(chosen) == 3
    cut_again = [c for f in chosen for c in cut(f.name, f.text, MODEL.tokenizer, 512)]
    assert sum(len(c.ids) for c in cut_again) == tokens
    with pytest.raises(SourceError, match="shorter"):
        corpus.fill(files, 10**9, MODEL.tokenizer, 512)


def test_longer_texts_go_on_with_other_files(monkeypatch: pytest.MonkeyPatch) -> None:
    held_out = [corpus.File(f"p/{i}.py", f"x = {i}\n" * 600) for i in range(5)]
    more = [corpus.File(f"torch/{i}.py", f"x = {i}\n" * 600) for i in (3, 7, 8, 7)]
    monkeypatch.setattr(corpus, "package_files", lambda packages: more if packages == corpus.FILLER else [])
    files, _ = corpus.fill(corpus.with_filler(held_out, 0), 8000, MODEL.tokenizer, 512)
    assert files[:5] == held_out and {file.name for file in files[5:]} == {"torch/7.py", "torch/8.py"}
    assert corpus.filler_in(files) == ["torch"] and corpus.filler_in(held_out) == []
    with pytest.raises(SourceError, match="shorter"):
        corpus.fill(corpus.with_filler(held_out, 0), 10_000, MODEL.tokenizer, 512)


@pytest.mark.parametrize("length", ["128K", "1M"])
def test_lengths_that_the_held_out_packages_fill_are_as_if_there_were_no_filler(length: str) -> None:
    tokens, ordered = corpus.tokens_of(length), corpus.shuffled(corpus.package_files(corpus.HELD_OUT), 0)
    without = corpus.fill(ordered, tokens, MODEL.tokenizer, 512)
    assert corpus.fill(corpus.with_filler(ordered, 0), tokens, MODEL.tokenizer, 512) == without
    assert corpus.filler_in(without[0]) == []


def test_so_are_the_files_of_an_exam() -> None:
    packages, tokens = ("networkx", "asyncio", "http", "email"), 131_072
    ordered = exam_._constants_first(corpus.package_files(packages), tokens, 0)
    without, _ = corpus.fill(ordered, tokens, MODEL.tokenizer, 512)
    assert exam_.prepare(MODEL, packages, tokens, 40, 20, 0).files == without


def test_nothing_in_filler_is_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    packages, more = ("asyncio", "http", "email"), ("networkx",)
    monkeypatch.setattr(corpus, "FILLER", more)
    asked = exam_.prepare(MODEL, packages, 700_000, 40, 20, 0)
    assert corpus.filler_in(asked.files) == ["networkx"]
    assert {item.source.split("/")[0] for item in asked.items} <= set(packages)
    text = "\n".join(file.text for file in asked.files)
    defined = code.definitions(text)
    assert all(defined[item.question.key] == 1 for item in asked.items)
    # Some files of the packages stay outside, so that real names can be asked for that are not there.
    inside = {file.name for file in asked.files}
    outside = "\n".join(file.text for file in corpus.package_files(packages) if file.name not in inside)
    assert sum(code.definitions(outside)[question.key] > 0 for question in asked.absent) == 8
    assert not any(question.key in text for question in asked.absent)


def test_write_leaves_nothing_else(tmp_path: Path) -> None:
    corpus.write([corpus.File("a/b.py", "1\n"), corpus.File("c.py", "2\n")], tmp_path / "s")
    before = (tmp_path / "s/c.py").stat().st_mtime_ns
    corpus.write([corpus.File("c.py", "2\n"), corpus.File("d/e.py", "3\n")], tmp_path / "s")
    assert sorted(p.name for p in (tmp_path / "s").rglob("*.py")) == ["c.py", "e.py"]
    assert (tmp_path / "s/c.py").stat().st_mtime_ns == before


def test_exam_is_balanced_and_answerable(exam: exam_.Exam) -> None:
    everything = "\n".join(file.text for file in exam.files)
    definitions = code.definitions(everything)
    assert [sum(i.question.family == f for i in exam.items) for f in code.FAMILIES] == [10] * 4
    by_name = {file.name: corpus.lines_of(file.text) for file in exam.files}
    for item in exam.items:
        source, chunk = exam.chunks[item.chunk]
        assert source == item.source and item.question.copied in chunk.text
        assert chunk.first_line <= item.lines[0] <= item.lines[1] <= chunk.last_line
        assert definitions[item.question.key] == 1
        assert item.question.key in by_name[source][item.lines[0] - 1]
    for question in exam.absent:
        assert question.key not in everything
    assert len(exam.absent) == 20


def test_tables_of_a_perfect_model(exam: exam_.Exam) -> None:
    answers = [Reply(i.question.answer, [Cite(i.source, (i.lines[1], i.lines[1]))]) for i in exam.items]
    table = lookup._table(exam.items, answers)
    assert table["exact"] == 1 and table["first_citation_right"] == 1 and table["said_absent"] == 0
    assert lookup._absent_table(exam.absent, [Reply(q.answer, []) for q in exam.absent])["right"] == 1


def test_bm25_finds_definitions(exam: exam_.Exam) -> None:
    found = baselines.measure(exam.chunks, exam.items, None, lambda text: None)
    assert found["bm25"]["in_top_5"]["all"] > 0.6 and "rag" not in found


def test_report_names_no_path(tmp_path: Path) -> None:
    head = report.about("herd eval needle", "cria", "abc", 0)
    assert "/" not in str(head["machine"]["cpu"]) or "\\" not in str(head)
    report.write_json(head, tmp_path / "deep" / "x.json")
    assert (tmp_path / "deep" / "x.json").read_text().startswith("{")
