"""The memory of questions asked about a context: the cache seam over a Store and the questions' own tokens.

Shape suffixes: B batch, T tokens, H query heads, G key/value heads, d head_dim, N query tokens, R query rows of one
key/value head, C live chunks.
"""

import math

import torch
from torch import Tensor

from herd.config import TextConfig
from herd.context.scan import Scan, blocks, scan
from herd.context.store import Store
from herd.kernels import dequantize_kv, merge_partials
from herd.model import KVCache


class ContextCache:
    """Global attention sees the whole context and the sequence's own tokens; local attention its own chunk.

    The context is shared by all sequences of the batch: one pass over it serves them all. Positions of the questions
    start at `start_position`. `mass_BC` adds up, over the tokens from which a token is chosen (the last real one of
    each sequence and forward pass), the attention probability of each live chunk, averaged over the heads.
    """

    def __init__(self, store: Store, cfg: TextConfig, batch: int) -> None:
        self.store, self.cfg = store, cfg
        self.start_position = store.end_position
        self.mass_BC = torch.zeros(batch, len(store.chunks))
        self._own = KVCache(cfg)
        self._blocks = blocks(store)
        # Per recorded pass: the sequences, their queries and log-denominators; few, and enough to look closer later.
        self._recorded: list[tuple[Tensor, Tensor, Tensor]] = []

    def attend(self, layer: int, q_BTHd: Tensor, k_BTGd: Tensor, v_BTGd: Tensor, positions_BT: Tensor) -> Tensor:
        """See herd.model.cache.Cache."""
        if self.cfg.is_local(layer) or not self._blocks:
            return self._own.attend(layer, q_BTHd, k_BTGd, v_BTGd, positions_BT)
        out_BTHd, lse_BTH = self._own.attend_partial(layer, q_BTHd, k_BTGd, v_BTGd, positions_BT)
        real_BT = positions_BT >= 0
        last_BT = real_BT & (positions_BT == positions_BT.amax(1, keepdim=True))
        for rows_BT, record in ((real_BT & ~last_BT, False), (last_BT, True)):
            if not bool(rows_BT.any()):
                continue
            q_NHd = q_BTHd[rows_BT].float() / math.sqrt(q_BTHd.shape[-1])
            found = scan(_by_head(q_NHd, k_BTGd.shape[2]), self._blocks, record=record)
            context = _by_token(found.out_GRd, len(q_NHd)), _by_token(found.lse_GR, len(q_NHd))
            out_BTHd[rows_BT], total_NH = merge_partials([(out_BTHd[rows_BT], lse_BTH[rows_BT]), context])
            if record:
                self._record(found, q_NHd, total_NH, rows_BT.any(1))
        return out_BTHd.to(q_BTHd.dtype)

    def token_mass(self, row: int, chunk: int) -> Tensor:
        """What `mass_BC[row, chunk]` adds up, for each token of the chunk."""
        kv = self.store.kv(chunk)
        k_GTd = dequantize_kv(kv.k_GNd, kv.k_scale_GN, torch.float32) if kv.k_scale_GN is not None else kv.k_GNd
        total = torch.zeros(len(kv))
        for rows_B, q_NHd, lse_NH in self._recorded:
            if not bool(rows_B[row]):
                continue
            mine = int(rows_B[:row].sum())  # only sequences that were not padding have a row
            q_GRd, lse_GR = (_by_head(x[mine : mine + 1], len(k_GTd)) for x in (q_NHd, lse_NH))
            total += torch.exp(q_GRd @ k_GTd.transpose(1, 2) - lse_GR.unsqueeze(-1)).mean((0, 1))
        return total

    def _record(self, found: Scan, q_NHd: Tensor, total_NH: Tensor, rows_B: Tensor) -> None:
        G = found.lse_GR.shape[0]
        mass_GRC = found.mass(_by_head(total_NH, G), len(self.store.chunks))
        self.mass_BC[rows_B] += _by_token(mass_GRC, len(total_NH)).mean(1)
        self._recorded.append((rows_B, q_NHd, total_NH))


def _by_head(x_NH: Tensor, G: int) -> Tensor:
    """[N, H, ...] → [G, R, ...] with R = N * (H / G): the rows that look at each key/value head."""
    return x_NH.unflatten(1, (G, -1)).transpose(0, 1).flatten(1, 2)


def _by_token(x_GR: Tensor, N: int) -> Tensor:
    """[G, R, ...] → [N, H, ...]; the inverse of `_by_head`."""
    return x_GR.unflatten(1, (N, -1)).transpose(0, 1).flatten(1, 2)
