"""The memory of questions asked about contexts: the cache seam over their Stores and the questions' own tokens.

Shape suffixes: B batch, T tokens, H query heads, G key/value heads, d head_dim, N query tokens, R query rows of one
key/value head, K runs of chunks of the context, n tokens of a chunk.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from herd.config import TextConfig
from herd.context.scan import runs, scan
from herd.context.store import Store
from herd.kernels import Attention, dequantize_kv, merge_partials
from herd.model import KVCache


@dataclass(frozen=True)
class _Look:
    """One token's look at the context: its scaled queries [G, R, d] and their log-denominators [G, R]."""

    q_GRd: Tensor
    lse_GR: Tensor


class ContextCache:
    """Global attention sees all contexts and the sequence's own tokens; local attention its own chunk.

    Several contexts count as one that holds all their chunks. They are shared by all sequences of the batch: one pass
    over them serves all. Positions of the questions start at `start_position`. What the tokens from which a token is
    chosen (the last real one of each sequence and forward pass) looked at can be asked for afterwards: `chunk_mass`,
    `token_mass`.
    """

    def __init__(self, stores: Sequence[Store], cfg: TextConfig, batch: int) -> None:
        self.cfg, self._stores = cfg, stores
        self.start_position = sum(store.end_position for store in stores)
        self._own = KVCache(cfg)
        self._runs = [run for store in stores for run in runs(store)]
        # Attention mass per sequence and run is kept; queries are few, so a closer look is computed when asked for.
        self._mass_BK = torch.zeros(batch, len(self._runs))
        self._missed_B = torch.zeros(batch)
        self._looks: list[list[_Look]] = [[] for _ in range(batch)]

    def attend(self, layer: int, q_BTHd: Tensor, k_BTGd: Tensor, v_BTGd: Tensor, positions_BT: Tensor) -> Tensor:
        """See herd.model.cache.Cache."""
        if self.cfg.is_local(layer) or not self._runs:
            return self._own.attend(layer, q_BTHd, k_BTGd, v_BTGd, positions_BT)
        self._check_files()
        own_BTHd, own_BTH = self._own.attend_partial(layer, q_BTHd, k_BTGd, v_BTGd, positions_BT)
        real_BT = positions_BT >= 0
        q_NHd = q_BTHd[real_BT] / math.sqrt(q_BTHd.shape[-1])
        q_GRd = _by_head(q_NHd, k_BTGd.shape[2]).cpu()
        found = scan(q_GRd, self._runs, _by_head(own_BTH[real_BT], len(q_GRd)).cpu())
        out_NHd, lse_NH = (_by_token(x, len(q_NHd)).to(own_BTHd.device) for x in (found.out_GRd, found.lse_GR))
        out_NHd, total_NH = merge_partials([(own_BTHd[real_BT], own_BTH[real_BT]), (out_NHd, lse_NH)])
        own_BTHd[real_BT] = out_NHd
        self._record(q_GRd, _by_head(total_NH.cpu(), len(q_GRd)), found, positions_BT.cpu())
        return own_BTHd.to(q_BTHd.dtype)

    def _check_files(self) -> None:
        for store in self._stores:
            store.check_files()

    def _record(self, q_GRd: Tensor, total_GR: Tensor, found: Attention, positions_BT: Tensor) -> None:
        real_BT = positions_BT >= 0
        group = q_GRd.shape[1] // int(real_BT.sum())
        ends_B = real_BT.sum(1).cumsum(0)  # tokens are counted sequence after sequence
        for row in real_BT.any(1).nonzero().flatten().tolist():
            end = int(ends_B[row])
            mine = slice((end - 1) * group, end * group)
            all_of_it = slice((end - int(real_BT[row].sum())) * group, end * group)
            self._mass_BK[row] += torch.exp(found.lse_KGR[:, :, mine] - total_GR[:, mine]).mean((1, 2))
            self._missed_B[row] = self._missed_B[row].maximum(found.left_out_GR[:, all_of_it].max())
            self._looks[row].append(_Look(q_GRd[:, mine].float(), total_GR[:, mine]))

    @property
    def mass_B(self) -> Tensor:
        """Attention that all of the context received, summed over the looks of each sequence, averaged over heads."""
        return self._mass_BK.sum(1)

    @property
    def missed_B(self) -> Tensor:
        """The most of any query's attention whose values were left out, for each sequence."""
        return self._missed_B

    def chunk_mass(self, row: int, at_least: float) -> dict[tuple[Store, int], float]:
        """Attention of each live chunk of the runs that received at least this much; the heaviest block always."""
        self._check_files()
        mass_K = self._mass_BK[row]
        chosen = (mass_K >= min(at_least, float(mass_K.max()))).nonzero().flatten().tolist() if len(mass_K) else []
        places = [(self._runs[k].store, chunk) for k in chosen for chunk in self._runs[k].chunks]
        return {place: float(self.token_mass(row, *place).sum()) for place in places}

    def token_mass(self, row: int, store: Store, chunk: int) -> Tensor:
        """Attention that each token of a live chunk received."""
        kv = store.kv(chunk)
        k_Gnd = dequantize_kv(kv.k_GNd, kv.k_scale_GN, torch.float32)
        q_GRd = torch.cat([look.q_GRd for look in self._looks[row]], 1)
        lse_GR = torch.cat([look.lse_GR for look in self._looks[row]], 1)
        mass_GRn = torch.exp(q_GRd @ k_Gnd.transpose(1, 2) - lse_GR.unsqueeze(-1))
        return mass_GRn.sum((0, 1)) / self.cfg.num_attention_heads


def _by_head(x_NH: Tensor, G: int) -> Tensor:
    """[N, H, ...] → [G, R, ...] with R = N * (H / G): the rows that look at each key/value head."""
    return x_NH.unflatten(1, (G, -1)).transpose(0, 1).flatten(1, 2)


def _by_token(x_GR: Tensor, N: int) -> Tensor:
    """[G, R, ...] → [N, H, ...]; the inverse of `_by_head`."""
    return x_GR.unflatten(1, (N, -1)).transpose(0, 1).flatten(1, 2)
