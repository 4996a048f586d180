"""The memory of questions asked about contexts: the cache seam over their Stores and the questions' own tokens.

Shape suffixes: B batch, T tokens, H query heads, G key/value heads of a layer, d head_dim, N query tokens, R query rows
of one key/value head, K runs of chunks of the context, n tokens of a chunk.
"""

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from herd.config import TextConfig
from herd.context.limits import start_position
from herd.context.scan import Run, parts, runs, scan
from herd.context.segment import KV
from herd.context.store import Store
from herd.kernels import Attention, Parts, dequantize_kv, merge_partials
from herd.model.cache import KVRow, KVRows


@dataclass(frozen=True)
class _Look:
    """One token's look at the context in one global layer, counted from 0: its scaled queries [G, R, d] and their
    log-denominators [G, R]."""

    layer: int
    q_GRd: Tensor
    lse_GR: Tensor


class ContextRow(KVRow):
    """One question and its answer: their own keys and values, and what they looked at in the context.

    What counts are the looks of the tokens from which a token is chosen: the last one of the prompt and those of the
    answer, in whatever pieces they came. They are kept after `close`.
    """

    def __init__(self, cfg: TextConfig, tokens: int, dtype: torch.dtype, runs: list[Run], asks: int) -> None:
        """asks: position of the last token of the prompt."""
        super().__init__(cfg, tokens, dtype)
        self._runs, self.asks, self._layers_that_look = runs, asks, len(cfg.global_layers)
        # Attention mass per run is kept; looks are few, so a closer one is computed when asked for.
        self._mass_K = self._last_K = torch.zeros(len(runs))
        self._missed = 0.0
        self._looks: list[_Look] = []

    def record(self, layer: int, q_GRd: Tensor, total_GR: Tensor, found: Attention, tokens: int, position: int) -> None:
        """Note what `tokens` tokens saw in a global layer, the first at `position`: q, log-denominators and results of
        a scan of them. Layers come in their order."""
        self._missed = max(self._missed, float(found.left_out_GR.max()))
        if position + tokens - 1 < self.asks:
            return
        last = slice(-q_GRd.shape[1] // tokens, None)
        mass_K = torch.exp(found.lse_KGR[:, :, last] - total_GR[:, last]).mean((1, 2)) / self._layers_that_look
        self._last_K = self._last_K + mass_K if layer else mass_K
        self._mass_K = self._mass_K + mass_K
        self._looks.append(_Look(layer, q_GRd[:, last].float(), total_GR[:, last]))

    @property
    def mass(self) -> float:
        """Attention that all of the context received, summed over the looks, averaged over layers and heads."""
        return float(self._mass_K.sum())

    @property
    def missed(self) -> float:
        """The most that any token's attention can be whose values were left out."""
        return self._missed

    def chunk_mass(self, at_least: float) -> dict[tuple[Store, int], float]:
        """Attention of each live chunk of the runs that received at least this much; the heaviest run always."""
        _check_files(self._runs)
        mass_K = self._mass_K
        chosen = (mass_K >= min(at_least, float(mass_K.max()))).nonzero().flatten().tolist() if len(mass_K) else []
        places = [(self._runs[k].store, chunk) for k in chosen for chunk in self._runs[k].chunks]
        return {place: float(self.token_mass(*place).sum()) for place in places}

    def looked_at(self, at_least: float) -> list[tuple[Store, int]]:
        """Live chunks that received at least this much of the last look, the heaviest first."""
        _check_files(self._runs)
        near = (self._last_K >= at_least).nonzero().flatten().tolist()
        places = [(self._runs[k].store, chunk) for k in near for chunk in self._runs[k].chunks]
        last = self._looks[-self._layers_that_look :]
        masses = {place: float(self._mean_n(*place, last).sum()) for place in places}
        return sorted((place for place in places if masses[place] >= at_least), key=lambda place: -masses[place])

    def token_mass(self, store: Store, chunk: int) -> Tensor:
        """Attention that each token of a live chunk received, [n]."""
        return self._mean_n(store, chunk, self._looks)

    def _mean_n(self, store: Store, chunk: int, looks: list[_Look]) -> Tensor:
        """Attention of some looks to each token of a live chunk, averaged over layers and heads."""
        kv, layers = store.kv(chunk), self._layers_that_look
        its = [(layer, [look for look in looks if look.layer == layer]) for layer in range(layers)]
        masses = [_mass_n(kv.layer(layer, layers), mine) for layer, mine in its if mine]
        return torch.stack(masses).sum(0) / (layers * self.cfg.num_attention_heads)


def _check_files(runs: list[Run]) -> None:
    """ContextError if a file was cut under its reader: touching what it lost would end the process."""
    for store in dict.fromkeys(run.store for run in runs):
        store.check_files()


def _mass_n(kv: KV, looks: list[_Look]) -> Tensor:
    """Attention of some looks of a layer to each token of its K/V, summed over heads."""
    k_Gnd = dequantize_kv(kv.k_GNd, kv.k_scale_GN, torch.float32)
    q_GRd, lse_GR = torch.cat([look.q_GRd for look in looks], 1), torch.cat([look.lse_GR for look in looks], 1)
    return torch.exp(q_GRd @ k_Gnd.transpose(1, 2) - lse_GR.unsqueeze(-1)).sum((0, 1))


class ContextCache:
    """Sequences that see contexts: global attention sees all of them and its own tokens, local its own chunk.

    Several contexts count as one that holds all their chunks; none of them may have been read in sequence. They are
    shared by all sequences of a batch: one pass over them serves all.
    """

    def __init__(
        self, stores: Sequence[Store], cfg: TextConfig, dtype: torch.dtype = torch.float32, room: int = 1
    ) -> None:
        """room: positions that the longest of the questions needs together with its answer."""
        assert len(stores) == 1 or not any(store.spec.sequential for store in stores), "see `limits.apart`"
        self.cfg, self.dtype = cfg, dtype
        self.start_position = start_position(stores, cfg.max_position_embeddings, room)
        self._runs = [run for store in stores for run in runs(store)]
        self._parts = parts(self._runs)
        self._glances = False

    def glances(self) -> "ContextCache":
        """The same contexts for sequences of which only the tokens that choose one look at them, all others at their
        own sequence: with one global layer these looks are the same, and with a long prompt far cheaper."""
        glancing = copy(self)
        glancing._glances = True
        return glancing

    def open(self, tokens: int, prompt: int = 1) -> ContextRow:
        """See `herd.model.Memory`."""
        return ContextRow(self.cfg, tokens, self.dtype, self._runs, self.start_position + prompt - 1)

    def rows(self, rows: Sequence[KVRow], counts: Sequence[int] | None = None) -> "ContextRows":
        """See `herd.model.Memory`. The rows are of this cache."""
        its = cast(Sequence[ContextRow], rows)
        return ContextRows(self.cfg, self._runs, self._parts, its, counts, glances=self._glances)


class ContextRows:
    """The cache of forward passes over some sequences that see the same contexts, see `KVRows`."""

    def __init__(
        self,
        cfg: TextConfig,
        runs: list[Run],
        parts: list[Parts],
        rows: Sequence[ContextRow],
        counts: Sequence[int] | None,
        *,
        glances: bool = False,
    ) -> None:
        self.cfg, self._runs, self._parts, self._glances = cfg, runs, parts, glances
        self._rows, self._own = rows, KVRows(rows, counts)
        self._place = {layer: place for place, layer in enumerate(cfg.global_layers)}

    def own(self, layer: int) -> KVRows | None:
        """See herd.model.cache.Cache."""
        return self._own if self.cfg.is_local(layer) or not self._runs else None

    def attend(self, layer: int, q_BTHd: Tensor, k_BTGd: Tensor, v_BTGd: Tensor, positions_BT: Tensor) -> Tensor:
        """See herd.model.cache.Cache."""
        if self.cfg.is_local(layer) or not self._runs:
            return self._own.attend(layer, q_BTHd, k_BTGd, v_BTGd, positions_BT)
        _check_files(self._runs)
        own_BTHd, own_BTH = self._own.attend_partial(layer, q_BTHd, k_BTGd, v_BTGd, positions_BT)
        looks = self._looks(positions_BT)
        at_N = torch.tensor([at for look in looks for at in look], dtype=torch.long, device=q_BTHd.device)
        if not len(at_N):
            return own_BTHd.to(q_BTHd.dtype)
        # Views: what is found is written into own_BTHd.
        all_NHd, all_NH = own_BTHd.flatten(0, 1), own_BTH.flatten(0, 1)
        q_NHd = q_BTHd.flatten(0, 1)[at_N] / math.sqrt(q_BTHd.shape[-1])
        q_GRd = _by_head(q_NHd, k_BTGd.shape[2]).cpu()
        place = self._place[layer]
        found = scan(q_GRd, self._parts[place], _by_head(all_NH[at_N], len(q_GRd)).cpu())
        out_NHd, lse_NH = (_by_token(x, len(q_NHd)).to(own_BTHd.device) for x in (found.out_GRd, found.lse_GR))
        all_NHd[at_N], total_NH = merge_partials([(all_NHd[at_N], all_NH[at_N]), (out_NHd, lse_NH)])
        self._record(place, q_GRd, _by_head(total_NH.cpu(), len(q_GRd)), found, positions_BT, list(map(len, looks)))
        return own_BTHd.to(q_BTHd.dtype)

    def _looks(self, positions_BT: Tensor) -> list[range]:
        """Of each sequence: where the new tokens that look at the contexts stand in the flattened batch."""
        looks = []
        for row, (span, position) in zip(self._rows, self._own.spans(positions_BT), strict=True):
            first = span.start + max(row.asks - position, 0) if self._glances else span.start
            looks.append(range(min(first, span.stop), span.stop))
        return looks

    def _record(
        self,
        layer: int,
        q_GRd: Tensor,
        total_GR: Tensor,
        found: Attention,
        positions_BT: Tensor,
        counts: Sequence[int],
    ) -> None:
        """counts: tokens of each sequence that looked, the last of its new ones."""
        group, at = q_GRd.shape[1] // sum(counts), 0  # tokens are counted sequence after sequence
        for row, count, (span, position) in zip(self._rows, counts, self._own.spans(positions_BT), strict=True):
            mine = slice(at * group, (at + count) * group)
            at += count
            if count:
                its = (found.out_GRd[:, mine], found.lse_GR[:, mine], found.lse_KGR[:, :, mine])
                part = Attention(*its, found.left_out_GR[:, mine])
                first = position + span.stop - span.start - count
                row.record(layer, q_GRd[:, mine], total_GR[:, mine], part, count, first)


def _by_head(x_NH: Tensor, G: int) -> Tensor:
    """[N, H, ...] → [G, R, ...] with R = N * (H / G): the rows that look at each key/value head."""
    return x_NH.unflatten(1, (G, -1)).transpose(0, 1).flatten(1, 2)


def _by_token(x_GR: Tensor, N: int) -> Tensor:
    """[G, R, ...] → [N, H, ...]; the inverse of `_by_head`."""
    return x_GR.unflatten(1, (N, -1)).transpose(0, 1).flatten(1, 2)
