"""Requests that go on from tokens that another engine made: what follows is what would have followed there."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from herd.engine import Engine, Request, Sampler, Token, stream
from herd.model import KVRow, Transformer
from tests.model.tiny_models import CHUNK, build, tiny, tokens

SAMPLERS = [
    Sampler(),
    Sampler(repetition_penalty=1.4, frequency_penalty=0.3, logprobs=2),
    Sampler(temperature=0.9, seed=1),
    Sampler(temperature=1.5, top_k=30, top_p=0.9, min_p=0.02, presence_penalty=0.5, seed=2, logprobs=0),
]


@pytest.fixture(scope="module")
def model() -> Transformer:
    return build(tiny())


class OddAndEven:
    """A guide: whether the next token is odd or even depends on all of the answer."""

    def __call__(self, ids: list[int], logits_V: Tensor, row: KVRow) -> Tensor:
        wanted = (len(ids) + sum(ids)) % 2
        return logits_V.masked_fill(torch.arange(len(logits_V)) % 2 != wanted, -torch.inf)


def answers(engine: Engine, *requests: Request) -> list[list[Token]]:
    found: dict[int, list[Token]] = {engine.submit(request): [] for request in requests}
    for token in stream(engine):
        found[token.request].append(token)
    return list(found.values())


@settings(max_examples=40)
@given(
    length=st.integers(1, 2 * CHUNK),
    sampler=st.sampled_from(SAMPLERS),
    guided=st.booleans(),
    named=st.booleans(),
    cut=st.integers(0, 2 * CHUNK),
    beside=st.booleans(),
    prompt_tokens=st.sampled_from([3, 64]),
)
def test_the_rest_of_an_answer(
    model: Transformer,
    length: int,
    sampler: Sampler,
    guided: bool,
    named: bool,
    cut: int,
    beside: bool,
    prompt_tokens: int,
) -> None:
    prompt = tokens(1, length, length)[0].tolist()
    request = Request(prompt, 2 * CHUNK + 1, sampler, eos_ids=[7], guide=OddAndEven() if guided else None)
    [whole] = answers(Engine(model), request)
    said = [token.id for token in whole]
    cut = min(cut, len(said) - 1)
    names = prompt if named else None
    rest = replace(request, made=said[:cut], names=names, guide=OddAndEven() if guided else None)
    others = [Request(prompt, 9, names=names), Request(prompt[::-1], 4)] if beside else []
    found = answers(Engine(model, prompt_tokens=prompt_tokens), rest, *others)[0]
    assert [token.id for token in found] == said[cut:]
    assert [token.finish for token in found] == [token.finish for token in whole[cut:]]
