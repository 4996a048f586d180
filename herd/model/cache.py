"""What attention remembers. The model asks `attend`; who implements it decides where keys and values live.

Shape suffixes: B batch, T new tokens, S remembered tokens, H query heads, G key/value heads, d head_dim.
"""

from typing import Protocol

import torch
from torch import Tensor

from herd.config import TextConfig
from herd.kernels import attend


class Cache(Protocol):
    """The seam between the model and memory (design.md)."""

    def attend(self, layer: int, q_BTHd: Tensor, k_BTGd: Tensor, v_BTGd: Tensor, positions_BT: Tensor) -> Tensor:
        """Remember k, v and return the attention output [B, T, H, d] of q over all that is remembered.

        k and q come rotated and scaled by temperature; 1/sqrt(d) is applied here. Position -1 marks padding.
        """
        ...


def visible(query_BT: Tensor, key_BS: Tensor, chunk: int | None) -> Tensor:
    """Which keys a query sees [B, T, S]: real, not later, and for local layers in the same chunk (spec §2.4)."""
    q, k = query_BT.unsqueeze(-1), key_BS.unsqueeze(-2)
    seen = (k >= 0) & (k <= q)
    return seen if chunk is None else seen & (q // chunk == k // chunk)


class KVCache:
    """Keys and values in memory: local layers keep the current chunk, global layers keep everything."""

    def __init__(self, cfg: TextConfig) -> None:
        self.cfg = cfg
        self._layers: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def attend(self, layer: int, q_BTHd: Tensor, k_BTGd: Tensor, v_BTGd: Tensor, positions_BT: Tensor) -> Tensor:
        return self.attend_partial(layer, q_BTHd, k_BTGd, v_BTGd, positions_BT)[0].to(q_BTHd.dtype)

    def attend_partial(
        self, layer: int, q_BTHd: Tensor, k_BTGd: Tensor, v_BTGd: Tensor, positions_BT: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `attend`, but (out, lse) in float32, to be merged with what lives elsewhere."""
        k_BSGd, v_BSGd, key_BS = k_BTGd, v_BTGd, positions_BT
        if layer in self._layers:
            k_old, v_old, key_old = self._layers[layer]
            k_BSGd, v_BSGd = torch.cat([k_old, k_BTGd], 1), torch.cat([v_old, v_BTGd], 1)
            key_BS = torch.cat([key_old, positions_BT], 1)
        chunk = self.cfg.attention_chunk_size if self.cfg.is_local(layer) else None
        self._layers[layer] = _current_chunk(k_BSGd, v_BSGd, key_BS, chunk)
        return attend(q_BTHd, k_BSGd, v_BSGd, visible(positions_BT, key_BS, chunk))


def _current_chunk(k: Tensor, v: Tensor, key_BS: Tensor, chunk: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Drop what no later token of any sequence can see: chunks before each sequence's newest one."""
    if chunk is None:
        return k, v, key_BS
    newest_B1 = key_BS.amax(1, keepdim=True)
    keep_S = ((key_BS >= 0) & (key_BS // chunk == newest_B1 // chunk)).any(0)
    return (k, v, key_BS) if bool(keep_S.all()) else (k[:, keep_S], v[:, keep_S], key_BS[:, keep_S])
