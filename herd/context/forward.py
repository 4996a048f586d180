"""Chunks → K/V: passes through the model up to its last global layer.

Shape suffixes: B chunks, T tokens of a chunk, H query heads, G key/value heads of a layer, R query heads of one
key/value head, d head_dim, S tokens that are looked at.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from herd.config import TextConfig
from herd.context.segment import KV, Spec, pack
from herd.kernels import causal_attention, dequantize_kv, merge_partials
from herd.model import Transformer


class ReadingCache:
    """The cache of one pass over chunks, each its own row, from its first token on.

    Local layers see a chunk's own tokens. So do global layers and, with `before`, also all tokens of these K/V, as they
    are kept; their own keys and values are as the model computed them. Those of each global layer are remembered.
    """

    def __init__(self, cfg: TextConfig, before: Sequence[KV] = ()) -> None:
        self.cfg, self.before = cfg, before
        self.keys: list[Tensor] = []  # [B, T, G, d] of each global layer so far
        self.values: list[Tensor] = []

    def own(self, layer: int) -> None:
        """See herd.model.cache.Cache: `attend` is to be asked."""

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
        return _attend_after(q_BTHd[0], k_BTGd[0], v_BTGd[0], parts).unsqueeze(0).to(q_BTHd)


def _attend_after(q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, parts: Sequence[KV]) -> Tensor:
    """Attention [T, H, d] of a chunk to itself, causally, and to all tokens of the parts: on the CPU, in float32.

    Not by `attend_parts`, which is made for few queries: with 8,192 of them, this took less than half the time.
    """
    q_RGTd = q_THd.cpu().float().unflatten(1, (k_TGd.shape[1], -1)).permute(2, 1, 0, 3)
    k_GTd, v_GTd = (x_TGd.cpu().float().transpose(0, 1) for x_TGd in (k_TGd, v_TGd))
    out, lse = _flash(q_RGTd, k_GTd, v_GTd, causal=True)
    for part in parts:
        k_GSd = dequantize_kv(part.k_GNd, part.k_scale_GN, torch.float32)
        v_GSd = dequantize_kv(part.v_GNd, part.v_scale_GN, torch.float32)
        out, lse = merge_partials([(out, lse), _flash(q_RGTd, k_GSd, v_GSd, causal=False)])
    return out.permute(2, 1, 0, 3).flatten(1, 2)


def _flash(q_RGTd: Tensor, k_GSd: Tensor, v_GSd: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """(out [R, G, T, d], lse [R, G, T]), see `kernels.attend`, by what is behind scaled_dot_product_attention: that
    returns no lse."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    k_RGSd, v_RGSd = (x_GSd.expand(len(q_RGTd), -1, -1, -1) for x_GSd in (k_GSd, v_GSd))
    out, lse = flash(q_RGTd, k_RGSd, v_RGSd, is_causal=causal)
    return out, lse


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
