"""`Model.generate`: stop strings over tokens and characters, logprobs, and what is refused."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import herd
from herd.model import Cache

PROMPT = [1, 2, 3]


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> herd.Model:
    return herd.load(tiny_model)


class Scripted(nn.Module):
    """A model that goes on from PROMPT with the given ids, whatever it sees."""

    def __init__(self, ids: Sequence[int], config: herd.config.TextConfig) -> None:
        super().__init__()
        self.ids, self.config, self.model = [*ids, *config.eos_token_id], config, nn.Module()
        self.model.embed_tokens = nn.Embedding(1, 1)
        self.memory_dtype, self.packed = torch.float32, None

    def states(self, ids_BT: Tensor, positions_BT: Tensor, cache: Cache, patches: None) -> Tensor:
        return positions_BT.unsqueeze(-1)

    def logits(self, x_E1: Tensor) -> Tensor:
        chosen_E = torch.tensor(self.ids)[x_E1[:, 0] - len(PROMPT) + 1]
        return nn.functional.one_hot(chosen_E, self.config.vocab_size).float()


def say(model: herd.Model, text: str, stop: str | Sequence[str], max_tokens: int = 100) -> tuple[herd.Generated, str]:
    """What comes of a model that says `text`, one byte a token; and what on_text was told."""
    scripted = replace(model, transformer=Scripted(model.tokenizer.encode(text), model.config))
    heard: list[str] = []
    made = scripted.generate(PROMPT, max_tokens=max_tokens, stop=stop, on_text=heard.append)
    return made, "".join(heard)


@pytest.mark.parametrize(
    ("stop", "before", "tokens"),
    [
        ("STOP", "Ein Café ☃, ", 19),
        (["nowhere", "fé ☃"], "Ein Ca", 13),
        (["☃, S", "é"], "Ein Caf", 9),
        ("E", "", 1),
    ],
)
def test_stop_strings_end_the_text(model: herd.Model, stop: str | list[str], before: str, tokens: int) -> None:
    made, heard = say(model, "Ein Café ☃, STOP it", stop)
    assert (made.text, heard, made.finish) == (before, before, "stop")
    assert len(made.ids) == len(made.tokens) == tokens, "the request ends with the token that completes it"


def test_without_a_stop_string(model: herd.Model) -> None:
    made, heard = say(model, "all of it ☃", ["☃☃", "no"])
    assert made.text == heard == "all of it ☃" == model.tokenizer.decode(made.ids)
    assert made.finish == "stop" and len(made.tokens) == len(made.ids) + 1, "the end token"
    made, heard = say(model, "all of it ☃", ["☃☃", "no"], max_tokens=12)
    assert made.text == heard == "all of it \ufffd" and made.finish == "length", "two bytes of three"
    made, _ = say(model, "all of it ☃", "\ufffd", max_tokens=12)
    assert made.text == "all of it " and made.finish == "stop"


@given(text=st.text("ab☃é ", max_size=12), stop=st.lists(st.text("ab☃é ", min_size=1, max_size=3), max_size=2))
def test_any_text_and_stop_strings(model: herd.Model, text: str, stop: list[str]) -> None:
    made, heard = say(model, text, stop)
    assert made.text == heard and text.startswith(heard)
    assert not any(s in heard for s in stop)
    assert heard == text or any(text[len(heard) :].startswith(s) for s in stop)


def test_logprobs_come_with_the_tokens(model: herd.Model) -> None:
    made = model.generate(PROMPT, max_tokens=5, sampler=herd.Sampler(logprobs=2))
    logprobs = model.logits([*PROMPT, *made.ids]).log_softmax(-1)
    for place, token in enumerate(made.tokens, len(PROMPT) - 1):
        assert token.logprob == pytest.approx(float(logprobs[place, token.id]), abs=1e-4)
        assert token.top[0][0] == token.id and token.top[1][1] < token.top[0][1]


def test_refusals(model: herd.Model) -> None:
    with pytest.raises(herd.PromptError, match="positions"):
        model.generate(PROMPT, max_tokens=1 << 20)
    with pytest.raises(herd.PromptError, match="max_tokens is 0"):
        model.generate(PROMPT, max_tokens=0)
    with pytest.raises(herd.PromptError, match="empty"):
        model.generate([], max_tokens=1)
