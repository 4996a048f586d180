"""Forward passes that train the layers an upcycled model has grown, on hidden states of the frozen layers below.

First looking is trained alone: where the global layer's queries look, among all chunks of the step at once, as they
will in a context on disk. Then it stays fixed, and answering is trained: what is copied, and the layers above.

Shape suffixes: C chunks, Q questions, T tokens of a row, N context tokens of all chunks, O tokens of other
chunks, R answer rows (tokens whose successor is trained), H query heads, G key/value heads, h query heads of one of
them, d head_dim, D hidden.
"""

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from herd.data.pool import NO_EVIDENCE
from herd.kernels import attend, merge_partials
from herd.model import Transformer
from herd.model.attention import causal_attention
from herd.model.cache import visible
from herd.train.construct import fixed_weights


@dataclass(frozen=True)
class Batch:
    """One step, ready for `Grown`. evidence_R indexes the N context tokens; NULL: rows' first tokens."""

    chunk_CTD: Tensor  # hidden states of chunks, padded right
    chunk_lengths: list[int]
    chunk_ids_N: Tensor  # token ids of the context
    other_OD: Tensor  # states of further chunks after the new local layer, as `after_local` last gave them
    question_QTD: Tensor
    question_ids_QT: Tensor  # padded with -1
    row_R: Tensor  # question of each answer row
    token_R: Tensor  # and its place in the question
    target_R: Tensor  # id of the token that follows
    evidence_R: Tensor  # place of that token in the context, NO_EVIDENCE or NULL_EVIDENCE
    first_R: Tensor  # whether a copy begins there, or an absence shows
    blind_RG: Tensor  # whether a head is made to find nothing, when answers are trained
    context_tokens: int  # the length this context stands for: position of the questions, and dilution
    text_BTD: Tensor  # plain text
    text_ids_BT: Tensor


NOTHING = -2  # target of a row that is not to look anything up: a token of the question
_LOST = -30.0  # log of a mass that is as good as nothing


class LowRank(nn.Module):
    """A frozen linear layer with a trainable update of low rank: W + scale * B A."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.weight, self.scale = linear.weight, scale
        self.lora_a = nn.Parameter(torch.randn(rank, linear.in_features, dtype=self.weight.dtype) * 0.02)
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, rank, dtype=self.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + F.linear(F.linear(x, self.lora_a), self.lora_b) * self.scale


class Grown:
    """The new local layer, the global layer, and low-rank updates above them; everything else is frozen."""

    def __init__(self, transformer: Transformer, rank: int, scale: float, typical_D: Tensor) -> None:
        """typical_D: mean of the normed states below the new layers; fixes where the new local layer looks."""
        self.cfg = transformer.config
        (self.at,) = self.cfg.global_layers
        assert self.cfg.attention_chunk_size is not None, "an upcycled model has chunks"
        self.chunk = self.cfg.attention_chunk_size
        transformer.requires_grad_(False)
        layers = transformer.blocks
        self.local, self.top, self.above = layers[self.at - 1], layers[self.at], layers[self.at + 1 :]
        self.norm, self.lm_head = transformer.model.norm, transformer.lm_head
        self._weights_HTT = fixed_weights(self.local.self_attn, typical_D, self.chunk)
        if rank:
            for block in self.above:
                for part in (block.self_attn, block.feed_forward):
                    for name, linear in list(part.named_children()):
                        assert isinstance(linear, nn.Linear), "layers above the global one are dense"
                        setattr(part, name, LowRank(linear, rank, scale))
        attn = self.local.self_attn
        looking = [self.local.input_layernorm, attn.v_proj, attn.o_proj, self.local.post_attention_layernorm]
        looking += [self.local.feed_forward, self.top.input_layernorm]
        looking += [self.top.self_attn.q_proj, self.top.self_attn.k_proj]
        answering = [self.top.self_attn.v_proj, self.top.self_attn.o_proj, self.top.post_attention_layernorm]
        answering += [self.top.feed_forward]
        names = {id(p): name for name, p in transformer.named_parameters()}
        self.looking = {names[id(p)]: p for module in looking for p in module.parameters()}
        self.answering = {names[id(p)]: p for module in answering for p in module.parameters()}
        self.answering |= {name: p for name, p in transformer.named_parameters() if "lora_" in name}

    def look(self, batch: Batch) -> dict[str, Tensor]:
        """Losses of looking, means over all heads of -log of attention mass.

        evidence: the mass on it, or on rows' first tokens where there is none to be found. echo: in rows without
        evidence, the mass that does no harm, see `_harmless`. idle: see `_idle`.
        """
        q_QTHd, k_QTGd, keys_NGd, _, _ = self._queries_and_keys(batch)
        known = batch.evidence_R != NO_EVIDENCE
        q_GRhd = _of_rows(q_QTHd, batch, keys_NGd.shape[1])
        rest_GRh = torch.full(q_GRhd.shape[:3], -math.inf)
        if len(batch.other_OD):
            rest_GRh[:, known] = _LogSumExp.apply(q_GRhd[:, known], self._others(batch)[0])
        log_p = _log_attention(q_GRhd, k_QTGd, keys_NGd, rest_GRh, batch)[..., :-1]
        rows, place_R = known.nonzero().flatten(), batch.evidence_R[known]
        mass_RGh = log_p[:, rows, :, place_R.clamp(min=0)]
        mass_RGh[place_R < 0] = log_p[:, rows[place_R < 0]][..., _firsts(batch)].logsumexp(-1).transpose(0, 1)
        weight_R = 1.0 + batch.first_R[known]  # where a copy begins, or an absence shows, most is lost or won
        # Beyond the floor a look is lost: another one is worth more.
        evidence = -(mass_RGh.clamp(min=_LOST).mean((1, 2)) * weight_R).sum() / weight_R.sum()
        losses = {"evidence": evidence, "mass": mass_RGh.detach().exp().mean()}
        if not known.all():
            losses["echo"] = -_harmless(log_p[:, ~known], batch, ~known).clamp(min=_LOST).mean()
        if len(batch.text_BTD):
            losses["idle"] = self._idle(batch)
        return losses

    def answer(self, batch: Batch) -> dict[str, Tensor]:
        """Losses of answering: answer tokens, and plain text without a context."""
        with torch.no_grad():
            q_QTHd, k_QTGd, keys_NGd, x_NTD, x_QTD = self._queries_and_keys(batch)
            q_GRhd = _of_rows(q_QTHd, batch, keys_NGd.shape[1])
            rest_GRhd, rest_GRh = _elsewhere(q_GRhd, *self._others(batch))
            p = _log_attention(q_GRhd, k_QTGd, keys_NGd, rest_GRh, batch).exp().to(keys_NGd.dtype)
            p = _blinded(p, batch.blind_RG, len(keys_NGd))
            elsewhere_RHd = (p[..., -1:] * rest_GRhd).transpose(0, 1).flatten(1, 2)
        values_NGd, v_QTGd = self._values(x_NTD), self._values(x_QTD)
        with torch.no_grad():
            out_QTHd = _prompt_rows(q_QTHd, k_QTGd, v_QTGd, (keys_NGd, values_NGd), _dilution(batch, len(keys_NGd)))
        out_RHd = _outputs(p[..., :-1], values_NGd, v_QTGd[batch.row_R]) + elsewhere_RHd
        out_QTHd = out_QTHd.index_put((batch.row_R, batch.token_R), out_RHd)
        answer_RD = self._finish(x_QTD, out_QTHd)[batch.row_R, batch.token_R]
        logits_RV = self.lm_head(self.norm(answer_RD)).float()
        losses = {"answer": F.cross_entropy(logits_RV, batch.target_R)}
        losses["correct"] = (logits_RV.detach().argmax(-1) == batch.target_R).float().mean()
        if len(batch.text_BTD):
            losses["text"] = self._text(batch)
        return losses

    def _queries_and_keys(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Queries [Q, T, H, d] and keys [Q, T, G, d] of questions, keys [N, G, d] of the context, and both's states."""
        x_CTD, attn = self._local(batch.chunk_CTD), self.top.self_attn
        x_ND = x_CTD[torch.arange(x_CTD.shape[1]) < torch.tensor(batch.chunk_lengths).unsqueeze(1)]
        keys_NGd = attn.key_value(self.top.input_layernorm(x_ND).unsqueeze(0), _positions(x_ND.unsqueeze(0)))[0][0]
        x_QTD = self._local(batch.question_QTD)
        normed_QTD = self.top.input_layernorm(x_QTD)
        start = -(-batch.context_tokens // self.chunk) * self.chunk
        q_QTHd = attn.query(normed_QTD, _positions(x_QTD) + start)
        return q_QTHd, attn.key_value(normed_QTD, _positions(x_QTD))[0], keys_NGd, x_ND, x_QTD

    def after_local(self, chunk_CTD: Tensor) -> Tensor:
        """States of chunks after the new local layer, to be kept as other chunks of later steps."""
        with torch.no_grad():
            return self._local(chunk_CTD)

    @torch.no_grad()
    def _others(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Keys and values [O, G, d] of the other chunks."""
        x_1OD = batch.other_OD.to(batch.question_QTD.dtype).view(1, len(batch.other_OD), self.cfg.hidden_size)
        k_1OGd, v_1OGd = self.top.self_attn.key_value(self.top.input_layernorm(x_1OD), _positions(x_1OD))
        return k_1OGd[0], v_1OGd[0]

    def _values(self, x: Tensor) -> Tensor:
        return self.top.self_attn.v_proj(self.top.input_layernorm(x)).unflatten(-1, (-1, self.cfg.head_dim))

    def _local(self, x_BTD: Tensor) -> Tensor:
        """Output of the new local layer. Its heads look at fixed distances, alike for every row (`look_back`)."""
        attn, T = self.local.self_attn, x_BTD.shape[1]
        v_BTGd = attn.v_proj(self.local.input_layernorm(x_BTD)).unflatten(-1, (-1, self.cfg.head_dim))
        v_GTBd = v_BTGd.permute(2, 1, 0, 3)
        weights_GhTT = self._weights_HTT[:, :T, :T].unflatten(0, (v_GTBd.shape[0], -1))
        out_GhTBd = (weights_GhTT @ v_GTBd.flatten(2).unsqueeze(1)).unflatten(-1, v_GTBd.shape[2:])
        x_BTD = x_BTD + attn.o_proj(out_GhTBd.flatten(0, 1).permute(2, 1, 0, 3).flatten(2))
        return x_BTD + self.local.feed_forward(self.local.post_attention_layernorm(x_BTD))

    def _finish(self, x_BTD: Tensor, out_BTHd: Tensor) -> Tensor:
        x_BTD = x_BTD + self.top.self_attn.o_proj(out_BTHd.flatten(2))
        x_BTD = x_BTD + self.top.feed_forward(self.top.post_attention_layernorm(x_BTD))
        for block in self.above:
            x_BTD = block(x_BTD, _positions(x_BTD), None)
        return x_BTD

    def _idle(self, batch: Batch) -> Tensor:
        """-log of the mass on the row's own first token, in plain text: only answers look things up."""
        _, q_BTHd, k_BTGd = self._in_text(batch)
        positions_BT = _positions(q_BTHd[..., 0])
        _, lse_BTH = attend(q_BTHd, k_BTGd, k_BTGd, visible(positions_BT, positions_BT, None))
        group = q_BTHd.shape[2] // k_BTGd.shape[2]
        first_BHd = k_BTGd[:, 0].repeat_interleave(group, 1)
        logit_BTH = torch.einsum("bthd,bhd->bth", q_BTHd, first_BHd).float() / math.sqrt(q_BTHd.shape[-1])
        return -(logit_BTH - lse_BTH)[:, 1:].clamp(min=_LOST).mean()

    def _in_text(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """States, queries and keys of the rows of plain text."""
        x_BTD, attn = self._local(batch.text_BTD), self.top.self_attn
        normed_BTD = self.top.input_layernorm(x_BTD)
        k_BTGd, _ = attn.key_value(normed_BTD, _positions(x_BTD))
        return x_BTD, attn.query(normed_BTD, _positions(x_BTD)), k_BTGd

    def _text(self, batch: Batch) -> Tensor:
        """Cross-entropy of plain text without any context."""
        with torch.no_grad():
            x_BTD, q, k = self._in_text(batch)
        x_BTD = self._finish(x_BTD, causal_attention(q, k, self._values(x_BTD), None))
        logits = self.lm_head(self.norm(x_BTD[:, :-1])).float()
        return F.cross_entropy(logits.flatten(0, 1), batch.text_ids_BT[:, 1:].flatten())


def _positions(x_BTD: Tensor) -> Tensor:
    return torch.arange(x_BTD.shape[1]).expand(x_BTD.shape[:2])


def _harmless(log_p: Tensor, batch: Batch, rows_R: Tensor) -> Tensor:
    """Log of the mass [G, R, h] on tokens that equal the next one, and of some of the mass on rows' first tokens.

    That is half: so a look is better than none if it is right more often than not. Where the row says again what it
    has said before, two tokens at least, it is a tenth.
    """
    target_R1, said_RT = batch.target_R[rows_R].unsqueeze(1), batch.question_ids_QT[batch.row_R[rows_R]]
    same_RN = torch.cat([batch.chunk_ids_N == target_R1, said_RT == target_R1], 1)
    weight_RN = torch.where(same_RN, 0.0, -math.inf)
    last_R1 = said_RT.gather(1, batch.token_R[rows_R].unsqueeze(1))
    before_RT = torch.arange(said_RT.shape[1] - 1) < batch.token_R[rows_R].unsqueeze(1)
    again_R1 = ((said_RT[:, :-1] == last_R1) & (said_RT[:, 1:] == target_R1) & before_RT).any(1, keepdim=True)
    weight_RN[:, _firsts(batch)] = torch.where(again_R1, math.log(0.1), math.log(0.5))
    return (log_p + weight_RN.unsqueeze(1)).logsumexp(-1)


def _firsts(batch: Batch) -> list[int]:
    """Places, in the context and then the question, of the tokens that looks are for which find nothing."""
    return [*accumulate([0, *batch.chunk_lengths])]


def _dilution(batch: Batch, tokens: int) -> float:
    """What makes every context token but the evidence count as often as if the context were longer."""
    return math.log(max(1.0, batch.context_tokens / tokens))


def _of_rows(q_QTHd: Tensor, batch: Batch, G: int) -> Tensor:
    """Scaled queries [G, R, h, d] of the answer rows."""
    return q_QTHd[batch.row_R, batch.token_R].unflatten(1, (G, -1)).transpose(0, 1) / math.sqrt(q_QTHd.shape[-1])


class _LogSumExp(torch.autograd.Function):
    """Log of the sum of exp(q k) over other chunks [G, R, h]. Its gradient is the mean key, which attention gives."""

    @staticmethod
    def forward(ctx: Any, q_GRhd: Tensor, keys_OGd: Tensor) -> Tensor:
        mean_GRhd, lse_GRh = _elsewhere(q_GRhd, keys_OGd, keys_OGd)
        ctx.save_for_backward(mean_GRhd)
        return lse_GRh

    @staticmethod
    def backward(ctx: Any, grad_GRh: Tensor) -> tuple[Tensor, None]:
        (mean_GRhd,) = ctx.saved_tensors
        return (grad_GRh.unsqueeze(-1) * mean_GRhd).to(mean_GRhd.dtype), None


def _elsewhere(q_GRhd: Tensor, keys_OGd: Tensor, values_OGd: Tensor) -> tuple[Tensor, Tensor]:
    """Attention output [G, R, h, d] over other chunks alone, and the log of the sum of exp(q k) [G, R, h]."""
    if not len(keys_OGd):
        return torch.zeros_like(q_GRhd), torch.full(q_GRhd.shape[:3], -math.inf)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    q, k, v = (x.unsqueeze(0) for x in (q_GRhd.flatten(1, 2), keys_OGd.transpose(0, 1), values_OGd.transpose(0, 1)))
    out, lse = flash(q, k, v, scale=1.0)
    return out[0].view_as(q_GRhd), lse[0].view(q_GRhd.shape[:3])


def _blinded(p: Tensor, blind_RG: Tensor, N: int) -> Tensor:
    """Attention [G, R, h, ...] of which some heads see nothing but their row's first token, which stands at N."""
    nothing = torch.zeros_like(p[0, 0, 0])
    nothing[N] = 1.0
    return torch.where(blind_RG.T[..., None, None], nothing, p)


def _log_attention(q_GRhd: Tensor, k_QTGd: Tensor, keys_NGd: Tensor, rest_GRh: Tensor, batch: Batch) -> Tensor:
    """Log attention [G, R, h, N + T + 1] of the answer rows over the context, their own row, and other chunks in sum.

    rest_GRh: log of the sum of exp(q k) over the other chunks; -inf where these are not looked at.
    """
    N = len(keys_NGd)
    far = (q_GRhd.flatten(1, 2) @ keys_NGd.permute(1, 2, 0)).float().view(*q_GRhd.shape[:3], N)
    near = torch.einsum("grhd,rtgd->grht", q_GRhd, k_QTGd[batch.row_R]).float()
    later_RT = torch.arange(k_QTGd.shape[1]) > batch.token_R.unsqueeze(1)
    near = near.masked_fill(later_RT.unsqueeze(1), -math.inf)
    looked_R1 = rest_GRh[0, :, :1].isfinite()
    bias_R1 = torch.where(looked_R1, _dilution(batch, N + len(batch.other_OD)), _dilution(batch, N))
    bias_RN = bias_R1.repeat(1, N)
    found = batch.evidence_R >= 0
    bias_RN[found, batch.evidence_R[found]] = 0.0
    rest = (rest_GRh + bias_R1).unsqueeze(-1)
    return torch.cat([far + bias_RN.unsqueeze(1), near, rest], -1).log_softmax(-1)


def _outputs(p: Tensor, values_NGd: Tensor, v_RTGd: Tensor) -> Tensor:
    """Attention output [R, H, d] of the answer rows from their attention [G, R, h, N + T]."""
    N, (G, R, h, _) = len(values_NGd), p.shape
    far = (p[..., :N].flatten(1, 2) @ values_NGd.transpose(0, 1)).view(G, R, h, -1)
    return (far + torch.einsum("grht,rtgd->grhd", p[..., N:], v_RTGd)).transpose(0, 1).flatten(1, 2)


def _prompt_rows(
    q_QTHd: Tensor, k_QTGd: Tensor, v_QTGd: Tensor, context: tuple[Tensor, Tensor], dilution: float
) -> Tensor:
    """Attention output [Q, T, H, d] of all rows, without gradients: flash attention over context, then themselves."""
    group = q_QTHd.shape[2] // k_QTGd.shape[2]
    q, k, v = (x.flatten(0, 1).transpose(0, 1).unsqueeze(0) for x in (q_QTHd, *(c.unsqueeze(0) for c in context)))
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    Q, T = q_QTHd.shape[:2]
    far, far_lse = (x[0].transpose(0, 1).unflatten(0, (Q, T)) for x in flash(q, k, v))
    k, v = (x.transpose(1, 2).repeat_interleave(group, 1) for x in (k_QTGd, v_QTGd))
    near, near_lse = flash(q_QTHd.transpose(1, 2), k, v, is_causal=True)
    parts = [
        (far.float(), far_lse + dilution),
        (near.transpose(1, 2).float(), near_lse.transpose(1, 2)),
    ]
    return merge_partials(parts)[0].to(q_QTHd.dtype)
