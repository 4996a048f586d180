"""Questions: literal quotes, unique evidence, disjoint splits, determinism, speed."""

import inspect
import time
from pathlib import Path
from random import Random

import pytest

from herd.data import code, fact_templates, facts, phrasings, prose, words
from herd.data.question import Question

CHUNK = '''# http/client.py:120 method putrequest in class HTTPConnection, method close in class HTTPConnection
HTTP_PORT = 80
_LIMIT: int = 65536  # bytes
name = compute()

class HTTPConnection:
    default_port = HTTP_PORT
    auto_open = 1

    def putrequest(self, method, url,
                   skip_host=False):
        """Send a request to the server.

        More text.
        """
        local_value = 12345
        return local_value

    def close(self, flag="(", *args):
        pass
'''


def check(question: Question, text: str) -> None:
    assert question.answer == question.prefix + question.copied + question.suffix
    assert question.value in question.copied
    for copied, evidence in question.hops or ((question.copied, question.evidence),):
        assert copied in question.answer
        assert text.count(evidence) == 1
        assert evidence.count(copied) == 1


def test_code_questions_quote_the_chunk() -> None:
    asked = code.questions(CHUNK, Random(0))
    for question in asked:
        check(question, CHUNK)
    found = {(question.family, question.answer) for question in asked}
    assert ("constant", "HTTP_PORT = 80") in found
    assert ("constant", "_LIMIT: int = 65536  # bytes") in found
    assert ("constant", "auto_open = 1") in found
    assert ("parameters", "def putrequest(self, method, url,\n                   skip_host=False):") in found
    assert ("parameters", 'def close(self, flag="(", *args):') in found
    assert ("class", "method close in class HTTPConnection") in found
    assert any(family == "docstring" and answer.endswith("Send a request to the server.") for family, answer in found)
    assert not {"local_value", "name", "default_port"} & {question.key for question in asked}


def test_names_defined_twice_are_not_asked() -> None:
    text = "# a.py:1\nLIMIT = 5\nLIMIT = 6\nOTHER = 7\n"
    assert [question.key for question in code.questions(text, Random(0))] == ["OTHER"]


def test_c_defines() -> None:
    text = "# a.h:1\n#define MAX_FOO 128 /* many */\n#define F(x) (x)\n#define MAX_FOO_BAR 12\n"
    asked = code.questions(text, Random(1))
    assert [question.answer for question in asked] == ["MAX_FOO 128 /* many */", "MAX_FOO_BAR 12"]


@pytest.mark.parametrize("split", words.SPLITS)
@pytest.mark.parametrize("family", ["fact", "latest", "two-hop"])
def test_facts(split: str, family: str) -> None:
    rng = Random(3)
    for _ in range(400):
        fact = facts.make(rng, split, family)
        text = "\n".join(["# a:1", *fact.distractors, fact.older, fact.first_hop, fact.sentence]) + "\n"
        assert fact.questions
        for question in fact.questions:
            check(question, text)
            assert question.answer.endswith(question.copied) and fact.sentence.endswith(question.copied)
            assert question.value in question.copied and "\n" not in fact.sentence


@pytest.mark.parametrize("kind", facts.KINDS)
def test_kind_of_value(kind: str) -> None:
    assert facts.make(Random(1), "held_out", "fact", kind).questions[0].kind == kind


def test_absent_says_the_name() -> None:
    question = code.absent("constant", Random(0), lambda name: False)
    assert question.answer == f"{question.key} is not in the context." and question.key in question.question
    assert code.absent("docstring", Random(0), lambda name: False).answer.startswith("docs of ")
    assert facts.absent(Random(0)).answer.endswith(" is not in the context.")


def test_splits_are_disjoint_and_large_enough() -> None:
    assert len(fact_templates.PLAIN["train"]) >= 60 and len(fact_templates.PLAIN["held_out"]) >= 15
    for table in (fact_templates.PLAIN, fact_templates.NAMED, fact_templates.ASK, fact_templates.ASK_NAMED):
        assert not set(table["train"]) & set(table["held_out"])
    for family in code.FAMILIES:
        train, held = (set(phrasings.CODE[family][split][0]) for split in words.SPLITS)
        assert len(train) >= 8 and not train & held


def test_prose() -> None:
    text = (
        "# ls.1:1\nOPTIONS\n       -a, --all\n              Do not ignore entries.  More.\n\n"
        "       -l     Use a long listing.\n"
    )
    asked = prose.questions(text, Random(0))
    assert {question.key for question in asked} == {"--all", "-l"}
    for question in asked:
        check(question, text)


def test_fast_and_deterministic() -> None:
    text = "# inspect.py:1\n" + Path(inspect.getsourcefile(inspect) or "").read_text()[20_000:21_800]
    assert code.questions(text, Random(5)) == code.questions(text, Random(5))
    start = time.process_time()
    for seed in range(100):
        code.questions(text, Random(seed))
    assert time.process_time() - start < 0.5
    assert facts.make(Random(7)) == facts.make(Random(7))
