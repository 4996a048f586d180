"""The names that a context is looked at with: of every thing, as prose and as code write it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd.prompt.naming import namings


@pytest.mark.parametrize(
    ("question", "named"),
    [
        ("Which colour has the merry otter?", ["The colour of the merry otter", "[the merry otter].colour"]),
        ("Please state which PIN Gribra has.", ["The PIN of Gribra", "[Gribra].PIN", "[Gribra"]),
        ("Name the load of gate 7.", ["The load of gate 7", "[gate 7"]),
        ("Remind me of the cat of Ann Lee's id.", ["The id of the cat of Ann Lee", "The cat of Ann Lee", "[Ann Lee"]),
        ("What are the parameters of `read_all`?", ["def read_all", "[read_all"]),
    ],
)
def test_things_and_their_attributes_are_named(question: str, named: list[str]) -> None:
    found = namings(question)
    assert set(named) <= set(found)
    assert not [name for name in found if "Please" in name or "which" in name], "what asks is no thing"


@given(st.text() | st.lists(st.sampled_from(["of", "the", "Ann", "PIN", "x_1", "what", "7", "?"])).map(" ".join))
def test_names_are_few_and_of_words_of_the_question(question: str) -> None:
    found = namings(question)
    assert len(found) <= 12 and len(set(found)) == len(found)
    for name in found:
        assert set(name.lower().replace("[", " ").replace("].", " ").split()) - {"the", "of", "def"} <= set(
            question.lower().replace("'s", " ").replace("[", " ").replace("].", " ").split()
        ) or any(not char.isalnum() for char in question)
