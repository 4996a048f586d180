"""A start for copying: values from which the token at a place can be told, and outputs that make the model say it.

Values are linear in the state, and the output adds a direction to the residual stream that the final norm and the
unembedding read as that token, so large that the layers above mostly let it through. Both maps are fitted together, as
a bottleneck between a token's state and that readout. Groups are left out at random, so that each one alone says as
much as it can.

Shape suffixes: N tokens, B tokens of a step, V vocabulary, W tokens to choose from, L the ones most like one, D hidden,
K values of all groups, G key/value heads, F first tokens.
"""

import torch
from torch import Tensor, nn

from herd.model.moe import MoE
from herd.model.transformer import Block
from herd.train.construct import Sample, after, constant, discriminant, firsts_after, normed, regress

_LOUDNESS = 8.0  # size of a copied token's direction, relative to a channel of the residual stream (LOG 2, 3)
_STEPS, _BATCH, _OTHERS, _RATE = 600, 1024, 2048, 3e-3
_LIKE = 8  # tokens most like each one, which it must be told from
_SAMPLE = 20_000  # tokens that the outputs are fitted to before the first step
_FLAG = 24.0  # size of what all copied tokens have in common, along a single direction, relative to a channel
_AMPLIFIED = 64.0  # size of a copied token's direction after the experts
_ENOUGH = 0.2  # share of the attention that has to be on tokens to be copied for that
_IDLE = 0.3  # share of states without any copy, of those that the experts are fitted to
_GATE = 10.0  # gate of an expert when all attention is on a token
_ROUTER = 0.1  # the router's random start is made smaller, so that all scores are about a half
_LEFT_OUT = 0.4  # share of groups


def start_copying(local: Block, top: Block, sample: Sample, readout_VD: Tensor) -> float:
    """Set values and outputs of the global layer; returns the share of tokens told apart at the end.

    readout_VD: the unembedding times the weight of the final norm. Looks that find nothing go to first tokens of
    rows, and those of questions and chunks say nothing.
    """
    attn = top.self_attn
    G, d = attn.cfg.num_key_value_heads, attn.cfg.head_dim
    above_ND = after(local, sample)
    x_ND = normed(above_ND)
    code_KD, mean_D = discriminant(x_ND, sample.ids_N, G * (d - 1))
    # Neighbouring directions tell about as much: deal them out to the groups.
    code_KD = code_KD.unflatten(0, (d - 1, G)).transpose(0, 1).flatten(0, 1)
    code_KD = code_KD - torch.outer(code_KD @ mean_D, constant(x_ND))
    say_VD = readout_VD.detach().float()
    say_VD = say_VD - say_VD.mean(0)
    code_KD, out_DK, share = _fit(code_KD, x_ND, sample.ids_N, say_VD, G)
    size = sample.states_ND.float().pow(2).mean(-1).sqrt().mean()
    out_DK = out_DK * size * _LOUDNESS / (x_ND @ code_KD.T @ out_DK.T).pow(2).mean().sqrt()
    code_KD, out_DK = _flagged(code_KD, out_DK, above_ND, size, G)
    code_KD = _silence(code_KD, x_ND, firsts_after(local, sample)[:2])
    group = attn.cfg.num_attention_heads // G
    assert isinstance(top.feed_forward, MoE)
    _amplify(top.feed_forward, above_ND, x_ND @ code_KD.T, out_DK)
    with torch.no_grad():
        attn.v_proj.weight.copy_(code_KD)
        per_head = out_DK.unflatten(1, (G, d)).repeat_interleave(group, 1) / group
        attn.o_proj.weight.copy_(per_head.flatten(1))
    return share


def _flagged(code_KD: Tensor, out_DK: Tensor, above_ND: Tensor, size: Tensor, G: int) -> tuple[Tensor, Tensor]:
    """Both maps with one more number in each group, the same for all tokens, written where the stream is quiet."""
    flag_D = torch.linalg.eigh(above_ND.T @ above_ND).eigenvectors[:, 0] * size * _FLAG / G
    always_D = constant(normed(above_ND))
    code = torch.cat([code_KD.unflatten(0, (G, -1)), always_D.expand(G, 1, -1)], 1)
    out = torch.cat([out_DK.unflatten(1, (G, -1)), flag_D[:, None, None].expand(-1, G, 1)], 2)
    return code.flatten(0, 1), out.flatten(1)


@torch.no_grad()
def _amplify(moe: MoE, above_ND: Tensor, code_NK: Tensor, out_DK: Tensor) -> None:
    """Let every routed expert say again what was copied, louder: if little was, its gate stays shut.

    Fitted to states with anything from nothing to all of a copied token in them.
    """
    generator = torch.Generator().manual_seed(0)
    share_N1, drawn_N1 = torch.rand(2, len(above_ND), 1, generator=generator)
    share_N1 = share_N1 * (drawn_N1 > _IDLE)
    copied_NK = share_N1 * code_NK[torch.randperm(len(above_ND), generator=generator)]
    mixed_ND = above_ND + copied_NK @ out_DK.T
    # What a state with a whole copy in it is divided by: its norm, and the router's score, a half at first.
    size = 2.0 * (above_ND + code_NK @ out_DK.T).pow(2).mean(-1).sqrt().mean()
    gate_1D = regress(mixed_ND, share_N1 - _ENOUGH) * size * _GATE / (1 - _ENOUGH)
    up_KD = regress(mixed_ND, copied_NK) * size
    down_DK = out_DK * _AMPLIFIED / _LOUDNESS / _GATE
    even = (down_DK.norm() / up_KD.norm()).sqrt()  # weights of like size train alike
    F = moe.experts.down_proj.shape[1]
    K = min(len(up_KD), F)  # narrow experts repeat as much as they can hold
    experts = moe.experts
    experts.gate_up_proj.zero_()
    experts.gate_up_proj[:, :, :K] = gate_1D.T
    experts.gate_up_proj[:, :, F : F + K] = (up_KD[:K] * even).T
    experts.down_proj.zero_()
    experts.down_proj[:, :K] = (down_DK[:, :K] / even).T
    moe.router.weight.mul_(_ROUTER)


def _silence(code_KD: Tensor, x_ND: Tensor, firsts_FD: Tensor) -> Tensor:
    """The code made zero for some states, and changed little for x."""
    gram_DD = x_ND.T @ x_ND / len(x_ND) + 1e-3 * torch.eye(x_ND.shape[1])
    found_DF = torch.linalg.solve(gram_DD, firsts_FD.T)  # gives little for other states
    return code_KD - code_KD @ firsts_FD.T @ torch.linalg.solve(firsts_FD @ found_DF, found_DF.T)


def _fit(code_KD: Tensor, x_ND: Tensor, ids_N: Tensor, say_VD: Tensor, G: int) -> tuple[Tensor, Tensor, float]:
    """Train both maps to choose each token among those of the step, the ones most like them, and any others."""
    generator = torch.Generator().manual_seed(0)
    said_ND = say_VD[ids_N[:_SAMPLE]]
    gram_DD = said_ND.T @ said_ND + torch.eye(said_ND.shape[1])
    out_DK = torch.linalg.solve(gram_DD, said_ND.T @ (x_ND[:_SAMPLE] @ code_KD.T))
    weights = [nn.Parameter(w / w.norm(dim=0).mean()) for w in (code_KD, out_DK)]
    optimizer = torch.optim.Adam(weights, lr=_RATE)
    count_V = torch.bincount(ids_N, minlength=len(say_VD))
    weight_N = (count_V.clamp(max=16) / count_V.clamp(min=1))[ids_N].double()
    like_VL, shares = _most_like(say_VD), []
    for step in range(_STEPS):
        at_B = torch.multinomial(weight_N, _BATCH, replacement=True, generator=generator)
        others = torch.randint(len(say_VD), (_OTHERS,), generator=generator)
        choice_W, target = torch.cat([ids_N[at_B], like_VL[ids_N[at_B]].flatten(), others]).unique(return_inverse=True)
        draw = torch.rand(_BATCH, G, 1, generator=generator)
        kept = draw >= draw.amax(1, keepdim=True).clamp(max=_LEFT_OUT)  # at least one of them
        said = ((x_ND[at_B] @ weights[0].T).unflatten(1, (G, -1)) * kept).flatten(1)
        said = nn.functional.rms_norm(said @ weights[1].T, (say_VD.shape[1],))
        logits_BW = (said.bfloat16() @ say_VD[choice_W].T.bfloat16()).float()
        loss = nn.functional.cross_entropy(logits_BW, target[:_BATCH])
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = _RATE * min(1.0, 2 * (1 - step / _STEPS))
        optimizer.step()
        shares.append((logits_BW.detach().argmax(1) == target[:_BATCH]).float().mean().item())
    return weights[0].detach(), weights[1].detach(), sum(shares[-20:]) / 20


def _most_like(say_VD: Tensor) -> Tensor:
    """Tokens [V, L] whose directions are nearest to each one's."""
    unit_VD = nn.functional.normalize(say_VD, dim=1).bfloat16()
    nearest = [(part @ unit_VD.T).topk(min(_LIKE + 1, len(say_VD)), 1).indices for part in unit_VD.split(4096)]
    return torch.cat(nearest)[:, 1:]
