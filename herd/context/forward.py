"""Chunks → K/V: passes through the model up to its last global layer.

Shape suffixes: B chunks, T tokens of a chunk, H query heads, G key/value heads of a layer, d head_dim, N tokens of a
block.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from herd.config import TextConfig
from herd.context.scan import by_head, by_token
from herd.context.segment import KV, Spec, pack
from herd.kernels import attend, attend_parts, causal_attention, merge_partials
from herd.model import Transformer

_QUERIES = 128  # of a chunk that are compared with all keys at a time; bounds memory


class ReadingCache:
    """The cache of one pass over chunks, each its own row, from its first token on.

    Local layers see a chunk's own tokens. So do global layers and, with `before`, also all tokens of these K/V, as they
    are kept; their own keys and values are as the model computed them. Those of each global layer are remembered.
    """

    def __init__(self, cfg: TextConfig, before: Sequence[KV] = ()) -> None:
        self.cfg, self.before = cfg, before
        self.keys: list[Tensor] = []  # [B, T, G, d] of each global layer so far
        self.values: list[Tensor] = []

    def attend(self, layer: int, q_BTHd: Tensor, k_BTGd: Tensor, v_BTGd: Tensor, positions_BT: Tensor) -> Tensor:
        """See herd.model.cache.Cache."""
        if self.cfg.is_local(layer):
            return causal_attention(q_BTHd, k_BTGd, v_BTGd)
        place, layers = len(self.keys), len(self.cfg.global_layers)
        self.keys.append(k_BTGd)
        self.values.append(v_BTGd)
        if not self.before:
            return causal_attention(q_BTHd, k_BTGd, v_BTGd)
        assert len(q_BTHd) == 1, "one chunk comes after the others"
        parts = [kv.layer(place, layers) for kv in self.before]
        blocks = [_attend_block(q_BTHd, k_BTGd, v_BTGd, parts, start) for start in range(0, q_BTHd.shape[1], _QUERIES)]
        return torch.cat(blocks).unsqueeze(0).to(q_BTHd.dtype)


def _attend_block(q_1THd: Tensor, k_1TGd: Tensor, v_1TGd: Tensor, parts: list[KV], start: int) -> Tensor:
    """Attention [N, H, d] of a block of a chunk's tokens to those up to them, and to all tokens of the parts."""
    q_1NHd = q_1THd[:, start : start + _QUERIES]
    N, G, stop = q_1NHd.shape[1], k_1TGd.shape[2], start + q_1NHd.shape[1]
    mask_1NS = torch.ones(1, N, stop, dtype=torch.bool, device=q_1NHd.device).tril(start)
    own_1NHd, own_1NH = attend(q_1NHd, k_1TGd[:, :stop], v_1TGd[:, :stop], mask_1NS)
    # Nothing may be left out here: what is read is what all that comes after is computed from.
    found = attend_parts(by_head(q_1NHd[0].float() / math.sqrt(q_1NHd.shape[-1]), G).cpu(), parts, 0.0)
    others = (by_token(x, N).to(own_1NHd.device) for x in (found.out_GRd, found.lse_GR))
    return merge_partials([(own_1NHd[0], own_1NH[0]), tuple(others)])[0]  # type: ignore[list-item]


@torch.inference_mode()
def read_alone(transformer: Transformer, chunks: Sequence[Sequence[int]], spec: Spec) -> list[KV]:
    """K/V of chunks of token ids, each read on its own, as the spec keeps them."""
    ids_BT = torch.zeros(len(chunks), max(map(len, chunks)), dtype=torch.long)
    for row, ids in enumerate(chunks):
        ids_BT[row, : len(ids)] = torch.tensor(ids)
    k_BTGd, v_BTGd = _read(transformer, ids_BT, spec)
    return [pack(k_BTGd[row, : len(ids)], v_BTGd[row, : len(ids)], spec) for row, ids in enumerate(chunks)]


@torch.inference_mode()
def read_after(transformer: Transformer, ids: Sequence[int], spec: Spec, place: int, before: Sequence[KV]) -> KV:
    """K/V of a chunk of token ids that comes after `place` chunks, whose K/V are `before`, as the spec keeps them."""
    k_1TGd, v_1TGd = _read(transformer, torch.tensor([list(ids)]), spec, place * spec.chunk, before)
    return pack(k_1TGd[0], v_1TGd[0], spec)


def _read(
    transformer: Transformer, ids_BT: Tensor, spec: Spec, first: int = 0, before: Sequence[KV] = ()
) -> tuple[Tensor, Tensor]:
    """Keys and values [B, T, layers * G, d] of all global layers, on the CPU."""
    ids_BT = ids_BT.to(next(transformer.parameters()).device)
    if spec.layers == 1:
        k_BTGd, v_BTGd = transformer.read(ids_BT)
        return k_BTGd.cpu(), v_BTGd.cpu()
    cache = ReadingCache(transformer.config, before)
    k_BTGd, v_BTGd = transformer.read(ids_BT, first, cache)
    return torch.cat([*cache.keys, k_BTGd], 2).cpu(), torch.cat([*cache.values, v_BTGd], 2).cpu()
