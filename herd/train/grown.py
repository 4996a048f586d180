"""Forward passes that train the layers an upcycled model has grown, on hidden states of the frozen layers below.

The global layer's queries look at all chunks of the step at once, as they will look at a context on disk.

Shape suffixes: C chunks, Q questions, T tokens of a row, N context tokens of all chunks, R answer rows (tokens whose
successor is trained), H query heads, G key/value heads, d head_dim, D hidden.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from herd.data.pool import NO_EVIDENCE
from herd.kernels import merge_partials
from herd.model import Transformer
from herd.model.attention import Attention, causal_attention


@dataclass(frozen=True)
class Batch:
    """One step, ready for `Grown`. evidence_R indexes the N context tokens; NULL is the row's own first token."""

    chunk_CTD: Tensor  # hidden states of chunks, padded right
    chunk_lengths: list[int]
    question_QTD: Tensor
    row_R: Tensor  # question of each answer row
    token_R: Tensor  # and its place in the question
    target_R: Tensor  # id of the token that follows
    evidence_R: Tensor  # place of that token in the context, NO_EVIDENCE or NULL_EVIDENCE
    context_tokens: int  # the length this context stands for: position of the questions, and dilution
    text_BTD: Tensor  # plain text
    text_ids_BT: Tensor


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
        self.top.requires_grad_(True)
        self.local.self_attn.v_proj.requires_grad_(True)
        self.local.self_attn.o_proj.requires_grad_(True)
        self.local.input_layernorm.requires_grad_(True)
        self._weights_HTT = _fixed_weights(self.local.self_attn, typical_D, self.chunk)
        if rank:
            for block in self.above:
                for part in (block.self_attn, block.feed_forward):
                    for name, linear in list(part.named_children()):
                        assert isinstance(linear, nn.Linear), "layers above the global one are dense"
                        setattr(part, name, LowRank(linear, rank, scale))
        self.parameters = {n: p for n, p in transformer.named_parameters() if p.requires_grad}

    def losses(self, batch: Batch, *, through: bool) -> dict[str, Tensor]:
        """Terms of the loss: evidence, quiet, and with `through` (the layers above run too) answer and text."""
        x_CTD, quiet = self._local(batch.chunk_CTD)
        keep_CT = torch.arange(x_CTD.shape[1]) < torch.tensor(batch.chunk_lengths).unsqueeze(1)
        k_CTGd, v_CTGd = self.top.self_attn.key_value(self.top.input_layernorm(x_CTD), _positions(x_CTD))
        context = (k_CTGd[keep_CT], v_CTGd[keep_CT])
        x_QTD, quiet_q = self._local(batch.question_QTD)
        out_QTHd, evidence = self._global(x_QTD, context, batch, through)
        losses = {"evidence": evidence, "quiet": quiet + quiet_q}
        if not through:
            return losses
        answer_RD = self._finish(x_QTD, out_QTHd)[batch.row_R, batch.token_R]
        logits_RV = self.lm_head(self.norm(answer_RD)).float()
        losses["answer"] = F.cross_entropy(logits_RV, batch.target_R)
        losses["correct"] = (logits_RV.detach().argmax(-1) == batch.target_R).float().mean()
        if len(batch.text_BTD):
            losses["text"] = self._text(batch)
        return losses

    def _local(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Output of the new local layer, and the size of what it adds relative to what was there.

        Its heads look at fixed distances (`look_back`), so their attention weights are the same for every row, and
        its feed-forward part is silent.
        """
        attn, T = self.local.self_attn, x_BTD.shape[1]
        v_BTGd = attn.v_proj(self.local.input_layernorm(x_BTD)).unflatten(-1, (-1, self.cfg.head_dim))
        v_GTBd = v_BTGd.permute(2, 1, 0, 3)
        weights_GhTT = self._weights_HTT[:, :T, :T].unflatten(0, (v_GTBd.shape[0], -1))
        out_GhTBd = (weights_GhTT @ v_GTBd.flatten(2).unsqueeze(1)).unflatten(-1, v_GTBd.shape[2:])
        added_BTD = attn.o_proj(out_GhTBd.flatten(0, 1).permute(2, 1, 0, 3).flatten(2))
        ratio = added_BTD.float().pow(2).mean() / x_BTD.float().pow(2).mean()
        return x_BTD + added_BTD, ratio

    def _global(
        self, x_QTD: Tensor, context: tuple[Tensor, Tensor], batch: Batch, through: bool
    ) -> tuple[Tensor, Tensor]:
        """Attention of questions over the context and themselves [Q, T, H, d], and the evidence loss."""
        attn = self.top.self_attn
        x_QTD = self.top.input_layernorm(x_QTD)
        start = -(-batch.context_tokens // self.chunk) * self.chunk
        q_QTHd = attn.query(x_QTD, _positions(x_QTD) + start)
        k_QTGd, v_QTGd = attn.key_value(x_QTD, _positions(x_QTD))
        dilution = math.log(max(1.0, batch.context_tokens / len(context[0])))
        out_RHd, evidence = _answer_rows(q_QTHd, k_QTGd, v_QTGd, context, batch, dilution)
        if not through:
            return out_RHd, evidence
        with torch.no_grad():
            out_QTHd = _prompt_rows(q_QTHd, k_QTGd, v_QTGd, context, dilution)
        return out_QTHd.index_put((batch.row_R, batch.token_R), out_RHd), evidence

    def _finish(self, x_BTD: Tensor, out_BTHd: Tensor) -> Tensor:
        x_BTD = x_BTD + self.top.self_attn.o_proj(out_BTHd.flatten(2))
        x_BTD = x_BTD + self.top.feed_forward(self.top.post_attention_layernorm(x_BTD))
        for block in self.above:
            x_BTD = block(x_BTD, _positions(x_BTD), None)
        return x_BTD

    def _text(self, batch: Batch) -> Tensor:
        """Cross-entropy of plain text without any context."""
        x_BTD, _ = self._local(batch.text_BTD)
        normed = self.top.input_layernorm(x_BTD)
        q = self.top.self_attn.query(normed, _positions(x_BTD))
        k, v = self.top.self_attn.key_value(normed, _positions(x_BTD))
        x_BTD = self._finish(x_BTD, causal_attention(q, k, v, None))
        logits = self.lm_head(self.norm(x_BTD[:, :-1])).float()
        return F.cross_entropy(logits.flatten(0, 1), batch.text_ids_BT[:, 1:].flatten())


def _positions(x_BTD: Tensor) -> Tensor:
    return torch.arange(x_BTD.shape[1]).expand(x_BTD.shape[:2])


def _answer_rows(
    q_QTHd: Tensor, k_QTGd: Tensor, v_QTGd: Tensor, context: tuple[Tensor, Tensor], batch: Batch, dilution: float
) -> tuple[Tensor, Tensor]:
    """Attention output [R, H, d] of the answer rows and -log(mass on the evidence), with virtual dilution.

    Every context token but the evidence counts exp(dilution) times, as if the context were that much longer.
    """
    k_NGd, v_NGd = context
    N, G = k_NGd.shape[:2]
    q_GRgd = q_QTHd[batch.row_R, batch.token_R].unflatten(1, (G, -1)).transpose(0, 1) / math.sqrt(q_QTHd.shape[-1])
    q_flat = q_GRgd.flatten(1, 2)
    far = (q_flat @ k_NGd.permute(1, 2, 0)).float().view(*q_GRgd.shape[:3], N)
    k_RTGd, v_RTGd = k_QTGd[batch.row_R], v_QTGd[batch.row_R]
    near = torch.einsum("grhd,rtgd->grht", q_GRgd, k_RTGd).float()
    later_RT = torch.arange(k_QTGd.shape[1]) > batch.token_R.unsqueeze(1)
    near = near.masked_fill(later_RT.unsqueeze(1), -math.inf)
    bias_RN = torch.full((len(batch.row_R), N), dilution)
    found = batch.evidence_R >= 0
    bias_RN[found, batch.evidence_R[found]] = 0.0
    logits = torch.cat([far + bias_RN.unsqueeze(1), near], -1)
    log_p = logits - logits.logsumexp(-1, keepdim=True)
    p = log_p.exp().to(v_NGd.dtype)
    out = (p[..., :N].flatten(1, 2) @ v_NGd.transpose(0, 1)).view_as(q_GRgd)
    out = out + torch.einsum("grht,rtgd->grhd", p[..., N:], v_RTGd)
    known = batch.evidence_R != NO_EVIDENCE
    place_R = torch.where(found, batch.evidence_R, N)[known]  # NULL: the question's own first token
    mass_GRh = log_p[:, known].gather(-1, place_R.view(1, -1, 1, 1).expand(G, -1, log_p.shape[2], 1)).squeeze(-1)
    # The heads of a group share keys; at least one of them must look at the evidence.
    evidence = -(mass_GRh.logsumexp(-1) - math.log(mass_GRh.shape[-1])).mean()
    return out.transpose(0, 1).flatten(1, 2), evidence


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


@torch.no_grad()
def _fixed_weights(attn: Attention, typical_D: Tensor, chunk: int) -> Tensor:
    """Attention weights [H, T, T], in the model's type, of heads whose queries and keys never depend on the token."""
    x_BTD = typical_D.to(attn.q_proj.weight.dtype).expand(1, chunk, -1)
    positions_BT = torch.arange(chunk).unsqueeze(0)
    q_HTd = attn.query(x_BTD, positions_BT)[0].transpose(0, 1).float()
    k_GTd = attn.key_value(x_BTD, positions_BT)[0][0].transpose(0, 1).float()
    k_HTd = k_GTd.repeat_interleave(len(q_HTd) // len(k_GTd), 0)
    logits = q_HTd @ k_HTd.transpose(1, 2) / math.sqrt(q_HTd.shape[-1])
    later = torch.ones(chunk, chunk, dtype=torch.bool).triu(1)
    return logits.masked_fill(later, -math.inf).softmax(-1).to(attn.q_proj.weight.dtype)
