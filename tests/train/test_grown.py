"""The training forward is the model's own forward over the same context."""

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from herd.config import TextConfig
from herd.data.pool import NO_EVIDENCE, NULL_EVIDENCE
from herd.model import Transformer
from herd.model.cache import KVCache, KVRows, visible
from herd.train.grown import Batch, Grown, LowRank
from tests.model.tiny_models import build

CHUNK, AT, LENGTHS, QUESTIONS = 16, 2, (16, 11), (7, 10)
FIRSTS = [0, 16, 27]  # of both chunks and the question
CONFIG = TextConfig(
    vocab_size=97,
    hidden_size=32,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=24,
    intermediate_size_mlp=48,
    num_local_experts=4,
    num_experts_per_tok=1,
    max_position_embeddings=1024,
    moe_layers=(AT,),
    no_rope_layers=(1, 1, 0, 1, 1),
    attention_chunk_size=CHUNK,
    floor_scale=16,
    use_qk_norm=False,
)


class Recording(KVRows):
    """Keeps the attention probabilities of the global layer [B, H, T, S]."""

    def __init__(self, rows: int) -> None:
        cache = KVCache(CONFIG)
        super().__init__([cache.open(64) for _ in range(rows)])
        self.at = torch.empty(rows, 0, dtype=torch.long)

    def attend(self, layer, q, k, v, positions):
        out = super().attend(layer, q, k, v, positions)
        if layer == AT:
            self.at = torch.cat([self.at, positions], 1)
            keys = torch.zeros(*self.at.shape, *k.shape[2:])
            keys[self.at >= 0] = torch.cat([row.remembered(AT)[0] for row in self.rows])
            logits = torch.einsum("bthd,bshd->bhts", q, keys.repeat_interleave(2, 2)) / math.sqrt(8)
            self.mass = logits.masked_fill(~visible(positions, self.at, None).unsqueeze(1), -math.inf).softmax(-1)
        return out


def upcycled_like(config: TextConfig = CONFIG) -> Transformer:
    """The new local layer (below the global one) looks everywhere alike."""
    model = build(config)
    torch.nn.init.zeros_(model.blocks[AT - 1].self_attn.q_proj.weight)
    return model


@pytest.fixture
def model() -> Transformer:
    return upcycled_like()


def world(model: Transformer, context_tokens: int = sum(LENGTHS)) -> tuple[Batch, list[torch.Tensor]]:
    """A batch over two chunks, two questions and a text, and the token ids it was made from."""
    torch.manual_seed(3)
    ids = [torch.randint(97, (n,)) for n in (*LENGTHS, *QUESTIONS, 12)]
    ids[2][1:3] = ids[2][5:7]  # the first question says two tokens again

    @torch.no_grad()
    def states(*rows):
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        positions = torch.arange(padded.shape[1]).expand_as(padded)
        return model.blocks[0](model.model.embed_tokens(padded), positions, None)

    row = torch.tensor([0, 0, 0, 1, 1])
    token = torch.tensor([3, 4, 5, 6, 8])
    target = torch.stack([ids[2 + r][t + 1] for r, t in zip(row, token, strict=True)])
    evidence = torch.tensor([5, 20, NO_EVIDENCE, NULL_EVIDENCE, 26])
    first = torch.tensor([True, False, False, True, False])
    chunks, questions, text = states(*ids[:2]), states(*ids[2:4]), states(ids[4])
    question_ids = torch.nn.utils.rnn.pad_sequence(ids[2:4], batch_first=True, padding_value=-1)
    batch = Batch(
        chunk_CTD=chunks,
        chunk_lengths=list(LENGTHS),
        chunk_ids_N=torch.cat(ids[:2]),
        question_QTD=questions,
        question_ids_QT=question_ids,
        row_R=row,
        token_R=token,
        target_R=target,
        evidence_R=evidence,
        first_R=first,
        other_OD=torch.empty(0, 32),
        blind_RG=torch.zeros(5, 2, dtype=torch.bool),
        context_tokens=context_tokens,
        text_BTD=text,
        text_ids_BT=ids[4].unsqueeze(0),
    )
    return batch, ids


def own_forward(model: Transformer, ids: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [B, T, V] and attention over real context tokens and the row [B, H, T, S] of both questions."""
    cache = Recording(2)
    for i, chunk in enumerate(ids[:2]):
        positions = i * CHUNK + torch.arange(len(chunk))
        model(chunk.expand(2, -1), positions.expand(2, -1), cache)
    rows = torch.nn.utils.rnn.pad_sequence(ids[2:4], batch_first=True)
    positions = 2 * CHUNK + torch.arange(rows.shape[1]).expand_as(rows).clone()
    positions[0, QUESTIONS[0] :] = -1
    return model(rows, positions, cache), cache.mass


def merged(model: Transformer, grown_model: Transformer) -> Transformer:
    """A copy of the plain model, with the low-rank updates of the trained one added to its weights."""
    plain, trained = deepcopy(model), dict(grown_model.named_modules())
    for name, module in plain.named_modules():
        if isinstance(trained[name], LowRank):
            update = trained[name].lora_b @ trained[name].lora_a * trained[name].scale
            module.weight.data.add_(update.detach())
    return plain


def test_losses_are_those_of_the_models_own_forward(model: Transformer) -> None:
    batch, ids = world(model)
    trained = deepcopy(model)
    grown = Grown(trained, 3, 0.5, torch.randn(32))
    low_rank = [m for m in trained.modules() if isinstance(m, LowRank)]
    assert len(low_rank) == 2 * 7
    for module in low_rank:
        torch.nn.init.normal_(module.lora_b, std=0.3)
    looking, losses = grown.look(batch), grown.answer(batch)
    plain = merged(model, trained)
    with torch.no_grad():
        logits, mass = own_forward(plain, ids)
        text_logits = plain(batch.text_ids_BT)
    picked = logits[batch.row_R, batch.token_R]
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(losses["answer"], cross_entropy(picked, batch.target_R), **close)
    torch.testing.assert_close(losses["correct"], (picked.argmax(-1) == batch.target_R).float().mean())
    torch.testing.assert_close(looking["evidence"], evidence_loss(batch, mass), **close)
    torch.testing.assert_close(looking["echo"], echo_loss(batch, ids, mass), **close)
    torch.testing.assert_close(looking["idle"], idle_loss(plain, batch.text_ids_BT), **close)
    torch.testing.assert_close(losses["text"], cross_entropy(text_logits[0, :-1], batch.text_ids_BT[0, 1:]), **close)


def evidence_loss(batch: Batch, mass: torch.Tensor) -> torch.Tensor:
    """-log of the mass on the evidence or on first tokens of rows; rows where a copy begins count twice."""
    terms, weights = [], []
    for row, token, place, first in zip(batch.row_R, batch.token_R, batch.evidence_R, batch.first_R, strict=True):
        if place != NO_EVIDENCE:
            places = [place] if place >= 0 else FIRSTS
            terms.append(-mass[row, :, token, places].sum(-1).log().mean())
            weights.append(1.0 + first)
    weight = torch.tensor(weights)
    return (torch.stack(terms) * weight).sum() / weight.sum()


def echo_loss(batch: Batch, ids: list[torch.Tensor], mass: torch.Tensor) -> torch.Tensor:
    """-log of the mass on tokens that equal the next one and some of that on firsts, where there is no evidence."""
    terms = []
    for row, token, target, place in zip(batch.row_R, batch.token_R, batch.target_R, batch.evidence_R, strict=True):
        if place == NO_EVIDENCE:
            helps = (torch.cat([*ids[:2], ids[2 + row]]) == target).float()
            helps[FIRSTS] = 0.1 if (row, token) == (0, 5) else 0.5
            terms.append(-(mass[row, :, token, : len(helps)] @ helps).log().mean())
    return torch.stack(terms).mean()


def idle_loss(model: Transformer, ids_BT: torch.Tensor) -> torch.Tensor:
    """-log of the mass that all later tokens of a text give to its first one."""
    cache = Recording(len(ids_BT))
    with torch.no_grad():
        model(ids_BT, None, cache)
    return -cache.mass[:, :, 1:, 0].log().mean()


def test_dilution_repeats_the_distractors() -> None:
    """Every context token but the evidence counts as often as the context stands for."""
    model = upcycled_like(replace(CONFIG, attn_temperature_tuning=False))
    batch, ids = world(model, context_tokens=3 * sum(LENGTHS))
    with torch.no_grad():
        _, mass = own_forward(model, ids)
        evidence = Grown(model, 0, 1.0, torch.randn(32)).look(batch)["evidence"]
    diluted = mass.clone()
    for row, token, place in zip(batch.row_R, batch.token_R, batch.evidence_R, strict=True):
        weight = torch.ones(mass.shape[-1])
        weight[: sum(LENGTHS)] = 3
        if place >= 0:
            weight[place] = 1
        counted = mass[row, :, token] * weight
        diluted[row, :, token] = counted / counted.sum(-1, keepdim=True)
    torch.testing.assert_close(evidence, evidence_loss(batch, diluted), rtol=1e-4, atol=1e-5)


def test_other_chunks_count_as_chunks_of_the_context(model: Transformer) -> None:
    """Losses and gradients of queries are the same; keys and values of other chunks get no gradient."""
    whole, _ = world(model)
    grown = Grown(model, 0, 1.0, torch.randn(32))
    row = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1])  # all tokens that have a successor
    token = torch.tensor([*range(6), *range(9)])
    whole = replace(
        whole,
        row_R=row,
        token_R=token,
        target_R=whole.question_ids_QT[row, token + 1],
        evidence_R=torch.tensor([5, 7, 3] * 5),
        first_R=torch.tensor([True, False, False] * 5),
        blind_RG=torch.zeros(15, 2, dtype=torch.bool),
    )
    near, far = LENGTHS
    other = grown.after_local(whole.chunk_CTD)[1, :far]
    parted = replace(
        whole, chunk_CTD=whole.chunk_CTD[:1], chunk_lengths=[near], chunk_ids_N=whole.chunk_ids_N[:near], other_OD=other
    )
    gradients, attn = [], model.blocks[AT].self_attn
    for batch in (whole, parted):
        for weight in (attn.q_proj.weight, attn.v_proj.weight):
            weight.requires_grad_(True)
            weight.grad = None
        looking, answering = grown.look(batch), grown.answer(batch)
        (looking["evidence"] + answering["answer"]).backward()
        gradients.append((looking["evidence"].detach(), answering["answer"].detach(), attn.q_proj.weight.grad))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_blind_heads_see_nothing_of_the_context(model: Transformer) -> None:
    batch, _ = world(model)
    grown = Grown(model, 0, 1.0, torch.randn(32))
    row, token = torch.tensor([0] * 6 + [1] * 9), torch.tensor([*range(6), *range(9)])
    everything = {"row_R": row, "token_R": token, "target_R": batch.question_ids_QT[row, token + 1]}
    everything |= {"evidence_R": torch.full((15,), 5), "first_R": torch.zeros(15, dtype=torch.bool)}
    for blind in (True, False):
        seeing = replace(batch, **everything, blind_RG=torch.full((15, 2), blind))
        elsewhere = replace(seeing, chunk_CTD=seeing.chunk_CTD.flip(2))
        with torch.no_grad():
            same = torch.equal(grown.answer(seeing)["answer"], grown.answer(elsewhere)["answer"])
        assert same == blind


def test_each_phase_trains_what_is_its_own(model: Transformer) -> None:
    batch, _ = world(model)
    grown = Grown(model, 3, 0.5, torch.randn(32))
    own, top = f"model.layers.{AT - 1}.", f"model.layers.{AT}."
    looks = {f"{own}self_attn.{part}_proj.weight" for part in "vo"}
    looks |= {f"{own}feed_forward.{part}_proj.weight" for part in ("gate", "up", "down")}
    looks |= {f"{own}{part}_layernorm.weight" for part in ("input", "post_attention")}
    looks |= {f"{top}self_attn.{part}_proj.weight" for part in "qk"} | {f"{top}input_layernorm.weight"}
    assert grown.looking.keys() == looks
    names = {name for name, _ in model.named_parameters()}
    above = {name for name in names if name.startswith(top) or "lora_" in name}
    assert grown.answering.keys() == above - looks
    for parameters, losses in ((grown.looking, grown.look), (grown.answering, grown.answer)):
        model.requires_grad_(False)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        terms = losses(batch)
        sum(terms[name] for name in ("evidence", "answer", "text") if name in terms).backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == (name in parameters), name
            parameter.grad = None


def test_low_rank_equals_merged_weights() -> None:
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(12, 7, bias=False), torch.randn(5, 12)
    low_rank = LowRank(linear, 3, 0.25)
    assert torch.equal(low_rank(x), linear(x))
    torch.nn.init.normal_(low_rank.lora_b)
    weight = linear.weight + 0.25 * low_rank.lora_b @ low_rank.lora_a
    torch.testing.assert_close(low_rank(x), x @ weight.T)
