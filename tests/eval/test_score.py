"""Scoring: what is exact and what is not."""

from random import Random

import pytest

from herd.data import code, facts
from herd.data.question import Question
from herd.eval import score

FACT = Question(
    "fact", "?", "The code of Ada (code: 481).", " (code: 481).", "x Ada (code: 481).", "481", "The code of Ada"
)
LINE = "LIMIT: int = 5  # not 5 x = 3"
CONSTANT = Question("constant", "?", LINE, LINE, f"\n{LINE}\n", "5", "LIMIT")
PARAMETERS = Question("parameters", "?", "def f(a,\n      b=(1, 2)) -> int:", "", "", "(a,\n      b=(1, 2))", "f")
CLASS = Question("class", "?", "method m in class C", "method m in class C", " method m in class C", "C", "m")
DOC = Question("docstring", "?", 'def g(a):\n    """Do it. Now."""', "", "", "Do it.", "g")


@pytest.mark.parametrize(
    ("question", "answer", "right"),
    [
        (FACT, " The code of Ada (code: 481).\n", True),
        (FACT, "The code of Ada has the code: 481).", True),
        (FACT, "It is 481).", False),
        (FACT, "The code of Ada (code: 4812).", False),
        (FACT, "The code of Ada (code: 481). Or 482.", False),
        (FACT, "The code of Ada is not in the context.", False),
        (FACT, "The code of Ada has the code: 3481).", False),
        (CONSTANT, "LIMIT = 5", True),
        (CONSTANT, LINE, True),
        (CONSTANT, "LIMIT = 5  # not", False),
        (CONSTANT, "LIMIT = 50", False),
        (PARAMETERS, "def f(a, b=(1, 2))", True),
        (PARAMETERS, "f(a, b=(1, 2))", True),
        (PARAMETERS, "def f(a, b=(1, 2)) -> int:", True),
        (PARAMETERS, "def f(a, b=(1, 2)) -> str:", False),
        (PARAMETERS, "def f(a, b=1)", False),
        (PARAMETERS, "def other(a, b=(1, 2))", False),
        (CLASS, "method m in class C.", True),
        (CLASS, "method m in class Cat", False),
        (DOC, 'def g(a): """Do it.', True),
        (DOC, 'def g(a): """Do it. Now."""', True),
        (DOC, 'def g(a): """Do it. Later."""', False),
        (DOC, 'def g(a): """Do it not.', False),
        (DOC.as_absent(), "g is not in the context.", True),
        (DOC.as_absent(), 'def g(a): """Do it.', False),
    ],
)
def test_exact(question: Question, answer: str, right: bool) -> None:
    assert score.exact(answer, question) is right


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("The code Ada (code: 481).", True),
        ("481).", True),
        ("The code of Ada (code: 1481).", False),
        ("The code of Ada (code: 481", False),
        ("The code of Ada is not in the context.", False),
    ],
)
def test_the_value_may_be_right_without_its_name(answer: str, right: bool) -> None:
    assert score.value_right(answer, FACT) is right


def test_the_expected_answer_is_always_exact() -> None:
    rng = Random(0)
    for _ in range(300):
        question = facts.make(rng, rng.choice(["train", "held_out"])).questions[0]
        assert score.exact(question.answer, question) and score.lenient(question.answer, question)
        assert not score.exact(question.as_absent().answer, question)
        assert score.exact(question.as_absent().answer, question.as_absent())
    text = "# a.h:1\n#define MAX 128\n"
    (define,) = code.questions(text, rng)
    assert all(score.exact(text, define) for text in ("MAX 128", "#define MAX 128", "MAX = 128"))
