"""A closed-form start for looking: a global layer that finds what followed the same tokens before.

The heads of the new local layer look 0 to 8 tokens back and write a code of the token they see into directions of the
residual stream that are little used. In each of three groups the token m back is turned by a fixed rotation, m - 1
times, so that one sum holds them all; the groups differ in how many they hold. Keys read these sums; queries read them
moved on by one token, so that a query matches the keys that follow the same tokens. All maps are fitted by ridge
regression. What matches nothing looks at the row's own first token. Training starts from here.

Shape suffixes: N tokens, C rows of text, D hidden, K directions written, H query heads, G key/value heads, d head_dim,
T tokens of a row, V kinds of tokens.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from herd.model.attention import Attention
from herd.model.moe import DenseMLP, MoE
from herd.model.transformer import Block

LAGS = tuple(range(9))  # tokens back, one for each head
_SEEN = (3, 5, 8)  # tokens that a key of each group holds
_DECAY = 0.95  # weight of each further token
_WRITE = 8.0  # size of a code in the residual stream, relative to that of one of its channels
_MATCH = 50.0  # logit of a full match
_SINK = 0.5  # logit of a row's own first token, relative to that
_SINK_KEY = 60.0  # length of that token's key: a long one needs little of the query


@dataclass(frozen=True)
class Sample:
    """Hidden states below the new layers: of whole rows of text, and of tokens that stand first in a row."""

    states_ND: Tensor
    ids_N: Tensor
    start_C: list[int]  # where rows begin, C + 1
    firsts_FD: Tensor  # those that questions and chunks begin with, then others

    def rows(self) -> Iterator[slice]:
        return (slice(a, b) for a, b in zip(self.start_C, self.start_C[1:], strict=False))


@torch.no_grad()
def construct(local: Block, top: Block, sample: Sample) -> None:
    """Set all weights of both layers that looking depends on. Needs nine heads in three groups."""
    cfg = local.self_attn.cfg
    D, G, d = cfg.hidden_size, cfg.num_key_value_heads, cfg.head_dim
    assert (cfg.num_attention_heads, G) == (len(LAGS), len(_SEEN)), "the construction is for nine heads in three"
    generator = torch.Generator().manual_seed(0)
    x_ND = normed(sample.states_ND)
    for norm in (local.input_layernorm, local.post_attention_layernorm, top.input_layernorm):
        norm.weight.fill_(1.0)
    codes_Nd, weight_N1 = _codes(x_ND, sample.ids_N, d)
    quiet_DK = torch.linalg.eigh(x_ND.T @ x_ND).eigenvectors[:, : (G + 1) * d]  # directions that carry the least
    mix_GHdd, step_GHdd = _mixing(G, d, generator)
    look_back(local.self_attn, constant(x_ND))
    local.self_attn.v_proj.weight.copy_(regress(x_ND * weight_N1, codes_Nd * weight_N1).repeat(G, 1))
    size = sample.states_ND.float().pow(2).mean(-1).sqrt().mean()
    own_dHd = torch.eye(d, cfg.num_attention_heads * d)  # the first head sees the token itself
    into_KHd = torch.cat([mix_GHdd.transpose(1, 2).reshape(G * d, -1), own_dHd])
    local.self_attn.o_proj.weight.copy_(size * _WRITE * quiet_DK @ into_KHd)
    assert isinstance(local.feed_forward, DenseMLP)
    for linear in (local.feed_forward.gate_proj, local.feed_forward.up_proj):
        nn.init.normal_(linear.weight, std=D**-0.5, generator=generator)
    nn.init.zeros_(local.feed_forward.down_proj.weight)
    y_ND = normed(after(local, sample))
    longest = max(row.stop - row.start for row in sample.rows())
    weights_HTT = fixed_weights(local.self_attn, x_ND.mean(0), longest)
    keys_NGd = _sums(codes_Nd, sample, weights_HTT, mix_GHdd)
    queries_NGd = _sums(codes_Nd, sample, weights_HTT, step_GHdd)
    scale = (_MATCH * d**0.5) ** 0.5
    keys_KD, queries_KD = (scale * regress(y_ND, target.flatten(1)) for target in (keys_NGd, queries_NGd))
    keys_KD, queries_KD = _add_sink(keys_KD, queries_KD, y_ND, firsts_after(local, sample), G)
    group = cfg.num_attention_heads // G
    queries_HD = queries_KD.unflatten(0, (G, d)).repeat_interleave(group, 0).flatten(0, 1)
    top.self_attn.k_proj.weight.copy_(keys_KD)
    top.self_attn.q_proj.weight.copy_(queries_HD + 0.002 * torch.randn(queries_HD.shape, generator=generator))


def look_back(attn: Attention, constant_D: Tensor) -> None:
    """Heads that look LAGS tokens back.

    Queries and keys are the same for every token, so rotary embedding alone decides: the logit is a sum of cosines
    that peaks at the offset. constant_D: gives about 1 for every normed state.
    """
    cfg = attn.cfg
    d = cfg.head_dim
    frequency = cfg.rope_theta ** (-torch.arange(0, d, 2) / d)
    q_Hd, k_Gd = torch.zeros(cfg.num_attention_heads, d), torch.zeros(cfg.num_key_value_heads, d)
    k_Gd[:, 0::2] = 4.0
    for head, offset in enumerate(LAGS):
        size, angle = (frequency > 0.02) * 14.0, frequency * offset
        # The query stands `offset` tokens after the key it looks for, so it is turned back by as much.
        q_Hd[head, 0::2], q_Hd[head, 1::2] = size * torch.cos(angle), -size * torch.sin(angle)
    attn.q_proj.weight.copy_(torch.outer(q_Hd.flatten(), constant_D))
    attn.k_proj.weight.copy_(torch.outer(k_Gd.flatten(), constant_D))


@torch.no_grad()
def fixed_weights(attn: Attention, typical_D: Tensor, length: int) -> Tensor:
    """Attention weights [H, T, T], in the model's type, of heads whose queries and keys never depend on the token."""
    x_BTD = typical_D.to(attn.q_proj.weight.dtype).expand(1, length, -1)
    positions_BT = torch.arange(length).unsqueeze(0)
    q_HTd = attn.query(x_BTD, positions_BT)[0].transpose(0, 1).float()
    k_GTd = attn.key_value(x_BTD, positions_BT)[0][0].transpose(0, 1).float()
    k_HTd = k_GTd.repeat_interleave(len(q_HTd) // len(k_GTd), 0)
    logits = q_HTd @ k_HTd.transpose(1, 2) / math.sqrt(q_HTd.shape[-1])
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    return logits.masked_fill(later, -math.inf).softmax(-1).to(attn.q_proj.weight.dtype)


def written_directions(local: Block) -> Tensor:
    """An orthonormal basis [D, K] of the directions that the new local layer's attention writes, the largest first."""
    cfg = local.self_attn.cfg
    written = (cfg.num_key_value_heads + 1) * cfg.head_dim
    return torch.linalg.svd(local.self_attn.o_proj.weight.detach().float()).U[:, :written]


@torch.no_grad()
def erase(local: Block, top: Block, sample: Sample) -> None:
    """Make the global layer's shared expert take away again what the new local layer has written.

    Only keys and queries need that; the layers above were trained without it. With its gates held constant the expert
    is a linear map; it is fitted to undo the writing.
    """
    assert isinstance(top.feed_forward, MoE)
    expert = top.feed_forward.shared_expert
    above_ND = after(local, sample)
    written_ND = above_ND - sample.states_ND.float()
    x_ND = normed(above_ND)
    width = min(expert.up_proj.out_features, written_directions(local).shape[1])
    read_DF = written_directions(local)[:, :width]
    gate = torch.tensor(4.0)
    undo_DF = regress(nn.functional.silu(gate) * x_ND @ read_DF, -written_ND)
    expert.gate_proj.weight[:width] = gate * constant(x_ND)
    expert.up_proj.weight[:width] = read_DF.T
    expert.down_proj.weight[:, :width] = undo_DF
    top.post_attention_layernorm.weight.fill_(1.0)


def after(local: Block, sample: Sample) -> Tensor:
    """States [N, D] after the new local layer, float32."""
    return torch.cat([_through(local, sample.states_ND[row]) for row in sample.rows()])


@torch.no_grad()
def _through(local: Block, states_TD: Tensor) -> Tensor:
    x_BTD = states_TD.to(local.self_attn.v_proj.weight.dtype).unsqueeze(0)
    return local(x_BTD, torch.arange(len(states_TD)).unsqueeze(0), None)[0].float()


@torch.no_grad()
def firsts_after(local: Block, sample: Sample) -> Tensor:
    """Normed states [F, D], float32, after the new local layer of tokens that stand first in a row."""
    x_FTD = sample.firsts_FD.to(local.self_attn.v_proj.weight.dtype).unsqueeze(1)
    return normed(local(x_FTD, torch.zeros(len(x_FTD), 1, dtype=torch.long), None)[:, 0])


def normed(x: Tensor) -> Tensor:
    """RMS-normed in float32, without a weight."""
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


def discriminant(x_ND: Tensor, ids_N: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Linear map [size, D] to a code of the token, best direction first, and the mean [D] to subtract before it.

    Linear discriminant analysis between kinds of tokens, whitened: all directions vary alike from kind to kind, so
    that the codes of unrelated tokens are nearly orthogonal.
    """
    kinds, kind_N, count = ids_N.unique(return_inverse=True, return_counts=True)
    weight_N = ((count.clamp(max=16) / count) * (count >= 3))[kind_N]  # frequent tokens must not decide alone
    total = weight_N.sum()
    mean_D = (weight_N.unsqueeze(1) * x_ND).sum(0) / total
    centred_ND = x_ND - mean_D
    sums_VD = torch.zeros(len(kinds), x_ND.shape[1]).index_add(0, kind_N, weight_N.unsqueeze(1) * centred_ND)
    share_V1 = torch.zeros(len(kinds)).index_add(0, kind_N, weight_N).clamp(min=1e-6).unsqueeze(1)
    means_VD = sums_VD / share_V1
    rest_ND = centred_ND - means_VD[kind_N]
    within_DD = (rest_ND * weight_N.unsqueeze(1)).T @ rest_ND / total
    within_DD += 0.05 * within_DD.diagonal().mean() * torch.eye(len(within_DD))
    inverse_DD = torch.linalg.inv(torch.linalg.cholesky(within_DD))
    between_DD = inverse_DD @ ((means_VD * share_V1).T @ means_VD / total) @ inverse_DD.T
    values, vectors = torch.linalg.eigh(between_DD)
    values, vectors = values.flip(0)[:size], vectors.flip(1)[:, :size]
    return (inverse_DD.T @ (vectors * (values + 1).rsqrt())).T, mean_D


def _codes(x_ND: Tensor, ids_N: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """A code of length 1 for every token [N, size], the same at all its places, and the weights [N, 1] of a fit."""
    map_dD, mean_D = discriminant(x_ND, ids_N, size)
    kinds, kind_N, count = ids_N.unique(return_inverse=True, return_counts=True)
    sums_Vd = torch.zeros(len(kinds), size).index_add(0, kind_N, (x_ND - mean_D) @ map_dD.T)
    codes_Vd = nn.functional.normalize(sums_Vd, dim=-1)
    return codes_Vd[kind_N], (count.clamp(max=16) / count).sqrt()[kind_N].unsqueeze(1)


def _mixing(G: int, d: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """How the heads' codes make up the keys of each group, and the queries one token earlier: each [G, H, d, d]."""
    keys, queries = torch.zeros(G, len(LAGS), d, d), torch.zeros(G, len(LAGS), d, d)
    for g, seen in enumerate(_SEEN[:G]):
        turn, begin = (torch.linalg.qr(torch.randn(d, d, generator=generator)).Q for _ in range(2))
        for back in range(seen):
            keys[g, back + 1] = _DECAY**back * torch.linalg.matrix_power(turn, back) @ begin
            queries[g, back] = keys[g, back + 1]
        energy = sum(_DECAY ** (2 * back) for back in range(seen))
        keys[g] /= energy**0.5
        queries[g] /= energy**0.5
    return keys, queries


def _sums(codes_Nd: Tensor, sample: Sample, weights_HTT: Tensor, mix_GHdd: Tensor) -> Tensor:
    """What keys or queries should hold [N, G, d]: the mix of what the heads see of exact codes."""
    parts = []
    for row in sample.rows():
        codes_Td = codes_Nd[row]
        seen_HTd = weights_HTT[:, : len(codes_Td), : len(codes_Td)].float() @ codes_Td
        parts.append(torch.einsum("ghde,hte->tgd", mix_GHdd, seen_HTd))
    return torch.cat(parts)


def _add_sink(keys_KD: Tensor, queries_KD: Tensor, y_ND: Tensor, firsts_FD: Tensor, G: int) -> tuple[Tensor, Tensor]:
    """Give every row's first token a key of its own, and every query a constant part that matches it.

    The key lies where other keys vary least, so that they match the constant part as little as possible.
    """
    d = len(keys_KD) // G
    keys_NGd = (y_ND @ keys_KD.T).unflatten(1, (G, d))
    least = [torch.linalg.eigh(keys_NGd[:, g].T @ keys_NGd[:, g]).eigenvectors[:, 0] for g in range(G)]
    # Nothing else may lie along that direction, or the long key would make it loud.
    across_KK = torch.eye(G * d) - torch.block_diag(*(torch.outer(e, e) for e in least))
    sink_K = _SINK_KEY * torch.cat(least)
    keys_KD = across_KK @ keys_KD
    is_first_D = _telling(y_ND, firsts_FD)
    keys_KD = keys_KD + torch.outer(sink_K - keys_KD @ firsts_FD.mean(0), is_first_D)
    share = _SINK * _MATCH * d**0.5 / _SINK_KEY**2
    return keys_KD, across_KK @ queries_KD + share * torch.outer(sink_K, constant(y_ND))


def _telling(y_ND: Tensor, firsts_FD: Tensor) -> Tensor:
    """The direction [D] that gives 1 for rows' first tokens, which are all much alike, and about 0 for all others."""
    mean_D = firsts_FD.mean(0)
    gram_DD = y_ND.T @ y_ND / len(y_ND) + firsts_FD.T @ firsts_FD / len(firsts_FD)
    found_D = torch.linalg.solve(gram_DD + 1e-3 * torch.eye(len(gram_DD)), mean_D)
    return found_D / (found_D @ mean_D)


def constant(x_ND: Tensor) -> Tensor:
    """The direction [D] that gives about 1 for every state."""
    return torch.linalg.solve(x_ND.T @ x_ND + torch.eye(x_ND.shape[1]), x_ND.sum(0))


def regress(x_NK: Tensor, y_ND: Tensor) -> Tensor:
    """Ridge regression: W [D, K] with x @ W.T about y."""
    gram_KK = x_NK.T @ x_NK
    gram_KK += 1e-3 * gram_KK.diagonal().mean() * torch.eye(len(gram_KK))
    return torch.linalg.solve(gram_KK, x_NK.T @ y_ND).T
