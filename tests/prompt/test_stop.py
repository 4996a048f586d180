"""Stop strings: the text before the first one, however it was cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd.errors import PromptError
from herd.prompt import StopText


def reference(text: str, stops: list[str]) -> str:
    """Read on until a stop string stands at the end; of several the longest."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))]
    return text


LETTERS = st.text("ab☃", max_size=20)


@given(pieces=st.lists(LETTERS, max_size=6), stops=st.lists(st.text("ab☃", min_size=1, max_size=4), max_size=3))
def test_the_text_before_the_first_stop_string(pieces: list[str], stops: list[str]) -> None:
    text, out, whole = StopText(stops), "", "".join(pieces)
    expected = reference(whole, stops)
    for piece in pieces:
        out += text.push(piece)
        assert expected.startswith(out), "nothing is taken back"
    assert (text.found is None) == (expected == whole)
    held = text.finish()
    assert out + held == expected
    assert any(stop.startswith(held) for stop in stops) or not held, "no more is held back than could be needed"


def test_text_is_held_back_only_while_it_could_be_a_start() -> None:
    text = StopText("</end>")
    assert [text.push(c) for c in "a<b</en"] == ["a", "", "<b", "", "", "", ""]
    assert text.push("d") == "" and text.push("o") == "</endo" and text.found is None
    assert text.push("x</end>y") == "x" and text.found == "</end>"
    assert text.push("more") == "" == text.finish()


def test_a_single_stop_string_is_not_a_list_of_letters() -> None:
    assert StopText("ab").push("ba, and ab") == "ba, and "
    with pytest.raises(PromptError, match="empty"):
        StopText(["a", ""])
