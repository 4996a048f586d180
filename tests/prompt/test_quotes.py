"""Answers as quotes: which answers a text allows, and that nothing else is allowed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd.prompt.quotes import ABSENT, Quotes, Worth, phrases

HEADER = "# a/b.py:1 method send in class Wire, method stop in class Wire.Inner"
CODE = '''LIMIT = 100  # KiB
MY_LIMIT = 7
def send(self, data, *,
         flags=(1, 2)):
    """Send data over the wire, all of
    it. Then wait.
    """
    return stop(self)
'''


def allowed(question: str, *texts: str) -> set[str]:
    """The answers that do not say that something is missing."""
    quotes = Quotes(question)
    for text in texts:
        quotes.see(HEADER, text)
    return {answer.decode() for answer in quotes.go_on(b"") if not answer.endswith(ABSENT.encode())}


def test_a_constant_is_its_line() -> None:
    line = "LIMIT = 100  # KiB"
    assert allowed("What is LIMIT?", CODE) == {line, f"docs of LIMIT: {line}"}
    assert f"The size of {line}" in allowed("What is the size of LIMIT?", CODE)


def test_a_function_is_its_signature_or_its_first_sentence() -> None:
    answers = allowed("What are the parameters of send?", CODE)
    signature = "def send(self, data, *,\n         flags=(1, 2)):"
    assert signature in answers and "method send in class Wire" in answers
    assert f'docs of send: {signature}\n    """Send data over the wire, all of\n    it. Then wait.' in answers


def test_a_class_ends_with_its_name() -> None:
    assert "method stop in class Wire.Inner" in allowed("Which class has `stop`?", CODE)


def test_a_fact_names_attribute_and_entity() -> None:
    text = "Nothing.\nThe old mill: build_id=77 (checked)\nThe old mill has a roof.\nThe old miller: build id 3\n"
    answers = allowed("Which build id has the old mill?", text)
    assert "The build id of the old mill: build_id=77 (checked)" in answers
    assert not {a for a in answers if "has a roof" in a and a.startswith("The build id")}, (
        "a line without the attribute"
    )
    assert "The build id of the old miller: build id 3" not in allowed("Which build id has Old Mill?", text)


def test_a_fact_names_as_much_as_its_line_holds() -> None:
    question, start = "Please state which build id the old mill has.", "The build id of the old mill"
    text = "The old mill has build id 7\nold mill, build 8\n"
    answers = allowed(question, text)
    assert {f"{start} has build id 7", "The build of old mill, build 8"} < answers
    shortened = {"The build of the old mill has build id 7", "The build id of old mill has build id 7"}
    assert not shortened & answers


@pytest.mark.parametrize(
    ("question", "text", "right", "wrong"),
    [
        ("Which colour has the merry otter?", "the merry otter: colour red", "colour of the merry otter", "of otter"),
        ("Name the patient of Ann Lee's id.", "patient of Ann Lee: id 7", "id of patient of Ann Lee", "of Ann Lee"),
        ("Name the main gate of mill 7.", "The main gate of mill 7 is red", "main gate of mill 7", "of gate of mill 7"),
    ],
)
def test_of_things_within_each_other_the_one_is_named_that_tells_most(
    question: str, text: str, right: str, wrong: str
) -> None:
    answers = {answer for answer in allowed(question, text) if not answer.startswith("docs of")}
    assert any(answer.startswith(f"The {right}") for answer in answers)
    assert not [answer for answer in answers if f"{wrong}:" in answer and f"The {right}" not in answer], answers


def test_a_name_is_told_with_its_attribute() -> None:
    answers = allowed("Please state which PIN Kornodra has.", "Kornodra: PIN 318\nKornodra\n")
    assert {"The PIN of Kornodra: PIN 318", "Kornodra"} <= answers and "Kornodra: PIN 318" not in answers


def test_a_second_line_names_words() -> None:
    quotes = Quotes("Which title has the mill?")
    quotes.see("", 'title of the mill ")\nx ) == 3\n')
    assert not [answer for answer in quotes.go_on(b'The title of the mill ")') if b"\n" in answer]
    again = Quotes("Which title is on record for the mill?")
    again.see("", "title of the mill is the title 7\n")
    lines = [answer for answer in again.go_on(b"The title of the mill is the title 7") if b"\n" in answer]
    assert lines and not [answer for answer in lines if b"of the title is" in answer or b"of title is" in answer]


def test_an_ordinary_word_that_is_set_is_doubtful() -> None:
    """`token: 7` may be the token of anything."""
    quotes = Quotes("Name the token of the empty mill.")
    quotes.see("", "token: 7\nthe empty mill has the token 9\n")
    worth = {answer.decode(): its for answer, its in quotes.go_on(b"").items()}
    assert worth["The empty mill of token: 7"] is Worth.DOUBTFUL
    assert worth["The token of the empty mill has the token 9"] is Worth.SURE


def test_a_line_is_sure_if_it_alone_has_the_identifier_that_was_called_missing() -> None:
    for text, sure in [("(weight_7 red)\n", True), ("(weight_7 red)\nuse(weight_7)\n", False)]:
        quotes = Quotes("What is weight_7?")
        quotes.see("", text)
        assert quotes.go_on(b"")[b"weight_7 red)"] is Worth.POSSIBLE
        quotes.settle(f"weight_7{ABSENT}".encode())
        assert (quotes.go_on(b"")[b"weight_7 red)"] is Worth.SURE) == sure
    quotes.settle(f"def weight_7{ABSENT}".encode())
    assert Worth.SURE not in quotes.go_on(b"").values(), "a definition is another thing than a line"


def test_a_second_hop_goes_on_from_the_first_line() -> None:
    quotes = Quotes("What is the salary of the boss of Ann Lee?")
    quotes.see("", "Ann Lee's boss is Bo Ek\n")
    first = b"The boss of Ann Lee's boss is Bo Ek"
    assert first in quotes.go_on(b"The boss of Ann")
    quotes.see("", "salary (Bo Ek): 12\n")
    assert first + b"\nThe salary of Bo Ek): 12" in quotes.go_on(first)
    assert first + b"\nThe salary of Bo Ek" + ABSENT.encode() in quotes.go_on(first + b"\n")
    assert not [answer for answer in quotes.go_on(first + b"\n") if answer.startswith(first + b"\nThe boss of")]
    assert not [answer for answer in quotes.go_on(first + b"\n") if b" of Ann" in answer[len(first) :]]


def test_without_a_text_only_absence_is_left() -> None:
    quotes = Quotes("What is LIMIT?")
    assert quotes.go_on(b"")
    assert all(answer.endswith(ABSENT.encode()) for answer in quotes.go_on(b""))
    assert [*quotes.go_on(b"LIMIT")] == [b"LIMIT" + ABSENT.encode()]


def test_a_text_seen_later_allows_only_what_goes_on_from_what_is_said() -> None:
    quotes = Quotes("What is LIMIT?")
    quotes.go_on(b"LIMIT")
    quotes.see(HEADER, CODE)
    assert set(quotes.go_on(b"LIMIT")) == {b"LIMIT = 100  # KiB", b"LIMIT" + ABSENT.encode()}


def test_what_a_question_asks_with_is_no_thing() -> None:
    answers = allowed("Please state which limit Ann Lee has.", "state = self.limit\nlimit (Ann Lee): 7\n")
    assert "The limit of Ann Lee): 7" in answers and not [a for a in answers if " of state" in a]


def test_what_tells_what_it_names_is_sure() -> None:
    quotes = Quotes("What is the size of LIMIT in send?")
    quotes.see(HEADER, CODE + "print(LIMIT)\nsend = 3\n")
    worth = {answer.decode(): its for answer, its in quotes.go_on(b"").items()}
    sure = {answer for answer, its in worth.items() if its is Worth.SURE}
    signature = "def send(self, data, *,\n         flags=(1, 2)):"
    assert {"LIMIT = 100  # KiB", "The size of LIMIT = 100  # KiB", signature, "method send in class Wire"} < sure
    assert worth["LIMIT)"] is worth["LIMIT" + ABSENT] is Worth.POSSIBLE
    # An ordinary word is doubtful beside a name, but for its definition.
    assert worth["send = 3"] is worth["send" + ABSENT] is Worth.DOUBTFUL
    assert "def send" + ABSENT not in worth and worth["def LIMIT" + ABSENT] is Worth.POSSIBLE


def test_ordinary_words_are_not_doubtful_alone() -> None:
    quotes = Quotes("What is the size of the old mill?")
    quotes.see("", "size of the old mill: 7\n")
    assert quotes.go_on(b"")[b"The size of the old mill: 7"] is Worth.SURE
    assert Worth.DOUBTFUL not in quotes.go_on(b"").values()
    begun = Quotes("Regarding the old mill, what size should I use?")
    assert Worth.DOUBTFUL not in begun.go_on(b"").values(), "questions begin with a capital"
    named = Quotes("Which key has item UU-44?")
    named.see("", "key = 3\nkey of item UU-44: 7\n")
    assert named.go_on(b"")[b"The item UU-44 of key = 3"] is Worth.DOUBTFUL
    assert named.go_on(b"")[b"The key of item UU-44: 7"] is Worth.SURE


@pytest.mark.parametrize("question", ["What is this?", "?", "", "Tell me.", "☃ ☃"])
def test_a_question_that_names_nothing_still_has_answers(question: str) -> None:
    """Whatever is asked, there is something that can be said."""
    quotes = Quotes(question)
    quotes.see(HEADER, CODE)
    assert quotes.go_on(b"")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Name the PIN of Ann's cat.", ["Name", "PIN", "Ann's", "Ann", "Ann's cat", "cat"]),
        ("Which colour has gate 7?", ["colour", "gate 7"]),
        ("Where is Ann Lee, or the key?", ["Ann Lee", "key"]),
    ],
)
def test_phrases_are_whole_words_and_names(text: str, found: list[str]) -> None:
    assert phrases(text, 2) == found


PIECES = ["Ann", "Lee", "old", "mill", "PIN", "is", "of", "the", "limit_x", "def", "(", ")", ":", "7", "É", "☃", "\n"]
WORDS = st.lists(st.sampled_from(PIECES), max_size=25)


@given(WORDS, st.lists(WORDS, max_size=3))
def test_every_quote_stands_in_a_text(asked: list[str], texts: list[list[str]]) -> None:
    said = [" ".join(words) for words in texts]
    for answer in allowed(" ".join(asked), *said):
        name = answer.removeprefix("docs of ").removeprefix("The ")
        quotes = (name, *(name[at + len(" of ") :] for at in range(len(name)) if name.startswith(" of ", at)))
        quotes += (answer.partition(": ")[2],) if answer.startswith("docs of ") else ()
        assert any(quote.lower() in text.lower() for quote in quotes if quote for text in (HEADER, *said)), answer
        assert any(answer[-length:] in text for length in range(1, 3) for text in (HEADER, *said)), (
            "as the text spells it"
        )
