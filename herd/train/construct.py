"""A closed-form start for the grown layers: a global layer that already continues what it has seen before.

The new local layer copies a code of each of the last few tokens into little-used directions of the residual stream.
The global layer's keys read those codes, so that a key knows the tokens before it; its queries read the same codes one
token later, so that a query matches the keys that follow the same tokens. A third of the key space holds the average
of wider windows instead, which matches paraphrases. Training starts from here, with nothing left to discover.

Shape suffixes: N tokens, D hidden, H query heads, G key/value heads, d head_dim, T tokens of a chunk.
"""

from copy import deepcopy

import torch
from torch import Tensor

from herd.model.attention import Attention
from herd.model.moe import MoE
from herd.model.transformer import Block

SHARP = (1, 2, 3, 4, 5, 6)  # tokens back
WIDE = (6, 14, 32)  # width in tokens
_DECAY = (0.95, 0.8)  # weight of each further token, for the two groups that match runs of tokens
_WRITE = 1.5  # size of the codes in the residual stream, relative to its own
_COPY = 0.5  # size of a copied token's direction, likewise; LOG 1 says what a larger one does
_FULL_MATCH = 25.0  # logit of a full match
_WIDE_MATCH = 16.0  # what takes the place of a full match's length for wide windows, whose codes share a large mean
_ROW = 1024  # tokens of text that are looked at together
_SINK = 0.4  # logit of a row's own first token, relative to a full match: what a query sees that matches nothing


@torch.no_grad()
def construct(
    local: Block, top: Block, states_ND: Tensor, ids_N: Tensor, unembedding_VD: Tensor, first: Tensor
) -> None:
    """Set the weights of both layers from hidden states below them (a sample of whole text) and their token ids.

    first: hidden state [D] of the token that every question begins with. Needs nine heads in three groups.
    """
    cfg = local.self_attn.cfg
    D, G, d = cfg.hidden_size, cfg.num_key_value_heads, cfg.head_dim
    assert (cfg.num_attention_heads, G) == (len(SHARP) + len(WIDE), 3), "the construction is for nine heads in three"
    generator = torch.Generator().manual_seed(0)
    size = states_ND.float().pow(2).mean(-1).sqrt().mean()
    x_ND = normed(states_ND)
    constant_D = torch.linalg.solve(x_ND.T @ x_ND + torch.eye(D), x_ND.sum(0))  # x @ constant is about 1
    code_dD = _token_code(x_ND, ids_N, d, constant_D)
    quiet_DK = torch.linalg.eigh(x_ND.T @ x_ND).eigenvectors[:, : G * d]  # directions that carry the least
    mix_GKHd, step_Gdd, first_Gdd = _mixing(G, d, generator)
    look_back(local.self_attn, constant_D)
    local.self_attn.v_proj.weight.copy_(code_dD.repeat(G, 1))
    local.self_attn.o_proj.weight.copy_(size * _WRITE * quiet_DK @ mix_GKHd)
    for block in (local, top):
        block.input_layernorm.weight.fill_(1.0)
    read_KD = quiet_DK.T / _WRITE
    match = _self_match(mix_GKHd, d)
    scale_G = (_FULL_MATCH * d**0.5 / match).sqrt()
    keys_GdD = read_KD.view(G, d, D) * scale_G.view(-1, 1, 1)
    queries_GdD = step_Gdd @ keys_GdD + scale_G.view(-1, 1, 1) * (first_Gdd @ code_dD)
    sink_GD = (keys_GdD @ _after(local, first)).unsqueeze(-1)
    weight_G = _SINK * _FULL_MATCH * d**0.5 / sink_GD.pow(2).sum((1, 2))
    queries_GdD = queries_GdD + weight_G.view(-1, 1, 1) * sink_GD * constant_D
    group = cfg.num_attention_heads // G
    noise = torch.randn(cfg.num_attention_heads * d, D, generator=generator) * 0.002
    top.self_attn.k_proj.weight.copy_(keys_GdD.flatten(0, 1))
    top.self_attn.q_proj.weight.copy_(queries_GdD.repeat_interleave(group, 0).flatten(0, 1) + noise)
    whole = len(states_ND) // _ROW * _ROW
    above_ND = normed(states_ND[:whole].float() + written(local, states_ND[:whole]))
    _copying(top, above_ND, ids_N[: len(above_ND)], unembedding_VD, _after(local, first), size)


@torch.no_grad()
def erase(local: Block, top: Block, states_ND: Tensor) -> None:
    """Make the global layer's shared expert take away again what the new local layer has written.

    Only keys and queries need those codes; the layers above were trained without them. With its gates held constant
    the expert is a linear map; it is fitted to undo the writing. states_ND: text below the local layer.
    """
    assert isinstance(top.feed_forward, MoE)
    expert = top.feed_forward.shared_expert
    states_ND = states_ND[: len(states_ND) // _ROW * _ROW]
    written_ND = written(local, states_ND)
    x_ND = normed(states_ND.float() + written_ND)
    width = expert.up_proj.out_features
    read_DF = torch.linalg.svd(local.self_attn.o_proj.weight.float()).U[:, :width]
    constant_D = torch.linalg.solve(x_ND.T @ x_ND + torch.eye(len(x_ND.T)), x_ND.sum(0))
    gate = torch.tensor(4.0)
    features_NF = torch.nn.functional.silu(gate) * x_ND @ read_DF
    gram = features_NF.T @ features_NF
    undo_FD = -torch.linalg.solve(gram + 1e-4 * gram.diagonal().mean() * torch.eye(width), features_NF.T @ written_ND)
    expert.gate_proj.weight.copy_((gate * constant_D).expand(width, -1))
    expert.up_proj.weight.copy_(read_DF.T)
    expert.down_proj.weight.copy_(undo_FD.T)
    top.post_attention_layernorm.weight.fill_(1.0)


def written(local: Block, states_ND: Tensor) -> Tensor:
    """What the new local layer's attention adds to states [N, D], taken as rows of _ROW tokens; float32."""
    exact = deepcopy(local).float()
    x_BTD = states_ND.float().view(-1, _ROW, states_ND.shape[1])
    positions_BT = torch.arange(_ROW).expand(x_BTD.shape[:2])
    rows = zip(x_BTD.split(8), positions_BT.split(8), strict=True)
    return torch.cat([exact.self_attn(exact.input_layernorm(x), at, None).flatten(0, 1) for x, at in rows])


def look_back(attn: Attention, constant_D: Tensor) -> None:
    """Heads that look SHARP tokens back, or over about the last WIDE tokens.

    Queries and keys are the same for every token, so rotary embedding alone decides: the logit is a sum of cosines
    that peaks at the offset.
    """
    cfg = attn.cfg
    d = cfg.head_dim
    frequency = cfg.rope_theta ** (-torch.arange(0, d, 2) / d)
    q_Hd, k_Gd = torch.zeros(cfg.num_attention_heads, d), torch.zeros(cfg.num_key_value_heads, d)
    k_Gd[:, 0::2] = 4.0
    for head, offset in enumerate((*SHARP, *WIDE)):
        sharp = head < len(SHARP)
        size = (frequency > 0.02) * 14.0 if sharp else torch.exp(-frequency * offset) * 8.0
        angle = frequency * (offset if sharp else offset / 2)
        # The query stands `offset` tokens after the key it looks for, so it is turned back by as much.
        q_Hd[head, 0::2], q_Hd[head, 1::2] = size * torch.cos(angle), -size * torch.sin(angle)
    attn.q_proj.weight.copy_(torch.outer(q_Hd.flatten(), constant_D))
    attn.k_proj.weight.copy_(torch.outer(k_Gd.flatten(), constant_D))


def normed(x: Tensor) -> Tensor:
    """RMS-normed in float32, without a weight."""
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


def _token_code(x_ND: Tensor, ids_N: Tensor, size: int, constant_D: Tensor) -> Tensor:
    """Linear map [size, D] from normed states to a code of the token: discriminant analysis between tokens.

    Directions in which tokens differ most, relative to how one token differs between its places; codes have length
    about 1 and mean 0.
    """
    kinds, kind_N, count = ids_N.unique(return_inverse=True, return_counts=True)
    weight_N = ((count.clamp(max=16) / count) * (count >= 3))[kind_N]  # frequent tokens must not decide alone
    total = weight_N.sum()
    centred = x_ND - (weight_N.unsqueeze(1) * x_ND).sum(0) / total
    sums = torch.zeros(len(kinds), x_ND.shape[1]).index_add(0, kind_N, weight_N.unsqueeze(1) * centred)
    share = torch.zeros(len(kinds)).index_add(0, kind_N, weight_N).clamp(min=1e-6).unsqueeze(1)
    means = sums / share
    rest = centred - means[kind_N]
    within = (rest * weight_N.unsqueeze(1)).T @ rest / total
    within += 0.05 * within.diagonal().mean() * torch.eye(len(within))
    inverse = torch.linalg.inv(torch.linalg.cholesky(within))
    values, vectors = torch.linalg.eigh(inverse @ ((means * share).T @ means / total) @ inverse.T)
    values, vectors = values[-size:], vectors[:, -size:]
    code = (inverse.T @ (vectors * (values / (values + 1)).sqrt())).T
    code = code - torch.outer(code @ (x_ND - centred)[0], constant_D)
    return code / (x_ND @ code.T).norm(dim=-1).mean()


def _mixing(G: int, d: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """How head outputs become key space, and how a query moves it on by one token.

    Returns mix [G * d, H * d], step [G, d, d] and first [G, d, d]. In a group that matches runs, the token m back is
    turned by step^(m-1); a query is first(own token) + step(what the key of its own place holds).
    """
    heads = len(SHARP) + len(WIDE)
    mix = torch.zeros(G, d, heads, d)
    step, first = torch.zeros(G, d, d), torch.zeros(G, d, d)
    for g, decay in enumerate(_DECAY):
        turn = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q
        first[g], step[g] = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q, decay * turn
        for head in range(len(SHARP)):
            mix[g, :, head] = torch.linalg.matrix_power(step[g], head) @ first[g]
    step[G - 1] = torch.eye(d)
    for head, width in enumerate(WIDE, len(SHARP)):
        # An average over w tokens is about 1 / sqrt(w) long.
        mix[G - 1, :, head] = torch.eye(d) * width**0.5 / len(WIDE)
    return mix.view(G * d, heads * d), step, first


def _self_match(mix: Tensor, d: int) -> Tensor:
    """Squared length [G] of the key of independent tokens: the product of a key with a query that matches it fully."""
    G = len(mix) // d
    sharp = mix.view(G, d, -1, d)[:, :, : len(SHARP)].pow(2).sum((1, 2, 3)) / d
    return torch.where(sharp > 0, sharp, torch.full((G,), _WIDE_MATCH))


def _after(local: Block, state_D: Tensor) -> Tensor:
    """Normed state [D] after the local layer of a token that stands first in its chunk (all heads look at itself)."""
    attn = local.self_attn
    value = attn.v_proj.weight.float() @ normed(state_D)
    group = attn.cfg.num_attention_heads // attn.cfg.num_key_value_heads
    heads = value.view(-1, attn.cfg.head_dim).repeat_interleave(group, 0).flatten()
    return normed(state_D.float() + attn.o_proj.weight.float() @ heads)


def _copying(top: Block, x_ND: Tensor, ids_N: Tensor, unembedding_VD: Tensor, sink_D: Tensor, size: Tensor) -> None:
    """Values hold a token's code; the output adds the direction that makes the model say that token.

    x_ND: normed states below the global layer. sink_D: that of the token a query sees that matches nothing; it says
    nothing.
    """
    cfg = top.self_attn.cfg
    width = cfg.num_key_value_heads * cfg.head_dim
    constant_D = torch.linalg.solve(x_ND.T @ x_ND + torch.eye(len(x_ND.T)), x_ND.sum(0))
    code_KD = _token_code(x_ND, ids_N, width, constant_D)
    code_KD = code_KD - torch.outer(code_KD @ sink_D, sink_D) / sink_D.pow(2).sum()
    code_NK = x_ND @ code_KD.T
    said_ND = unembedding_VD.float()[ids_N] - unembedding_VD.float()[ids_N].mean(0)
    fit = torch.linalg.solve(code_NK.T @ code_NK + 1e-3 * len(code_NK) * torch.eye(width) / width, code_NK.T @ said_ND)
    out_DK = fit.T * (size * _COPY / (code_NK @ fit).pow(2).mean().sqrt())
    group = cfg.num_attention_heads // cfg.num_key_value_heads
    top.self_attn.v_proj.weight.copy_(code_KD)
    per_head = out_DK.view(-1, cfg.num_key_value_heads, cfg.head_dim).repeat_interleave(group, 1) / group
    top.self_attn.o_proj.weight.copy_(per_head.flatten(1))
