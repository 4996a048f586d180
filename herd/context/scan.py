"""Exact attention of many queries over all segments of a context: one pass, block by block, softmax in float32.

Every query sees every live token: context chunks come before the question, and the global layer has no positions.

Shape suffixes: G key/value heads, R query rows per key/value head, d head_dim, n tokens of a block, P pieces (the
part of a chunk that lies in a block), C live chunks.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from herd.context.segment import KV
from herd.context.store import Mapped, Store

BLOCK_TOKENS = 8192
_TILE_BYTES = 2 << 20  # scores of one tile of rows: they must stay in the second-level cache


@dataclass(frozen=True)
class Block:
    """A run of tokens of one segment: P pieces, each the part of one chunk that lies in it."""

    kv: KV
    starts_P: np.ndarray
    chunk_P: Tensor  # index of the live chunk, or C where no source uses the tokens
    hidden_n: Tensor | None  # bias: -inf for tokens no source uses; None if there are none


@dataclass(frozen=True)
class Scan:
    """Attention over the context: out [G, R, d] and lse [G, R] in float32.

    sums holds (exp-sums [G, R, P], their maximum [G, R], chunk_P) of every block if they were asked for.
    """

    out_GRd: Tensor
    lse_GR: Tensor
    sums: list[tuple[Tensor, Tensor, Tensor]]

    def mass(self, total_lse_GR: Tensor, chunks: int) -> Tensor:
        """Attention probability per row and live chunk [G, R, C], given the log-denominator over all keys."""
        mass = torch.zeros(*self.lse_GR.shape, chunks + 1)
        for sum_GRP, top_GR, chunk_P in self.sums:
            mass.index_add_(2, chunk_P, sum_GRP * torch.exp(top_GR - total_lse_GR).unsqueeze(-1))
        return mass[..., :chunks]


def blocks(store: Store, size: int = BLOCK_TOKENS) -> list[Block]:
    """The blocks of a context that hold live tokens."""
    dead = len(store.chunks)
    found = []
    for mapped in store.segments:
        runs = _runs(store, mapped)
        for start in range(0, mapped.row.tokens, size):
            stop = min(start + size, mapped.row.tokens)
            inside = [(max(a, start) - start, min(b, stop) - start, c) for a, b, c in runs if a < stop and b > start]
            if all(chunk == dead for _, _, chunk in inside):
                continue
            hidden = None
            if any(chunk == dead for _, _, chunk in inside):
                hidden = torch.zeros(stop - start)
                for a, b, chunk in inside:
                    if chunk == dead:
                        hidden[a:b] = -torch.inf
            starts, _, chunks = zip(*inside, strict=True)
            found.append(Block(mapped.kv.part(start, stop), np.array(starts), torch.tensor(chunks), hidden))
    return found


def _runs(store: Store, mapped: Mapped) -> list[tuple[int, int, int]]:
    """(start, stop, chunk) covering a whole segment; chunk is the number of live chunks where none lies."""
    dead, runs, end = len(store.chunks), list[tuple[int, int, int]](), 0
    for index in mapped.live:
        chunk = store.chunks[index]
        if chunk.start > end:
            runs.append((end, chunk.start, dead))
        end = chunk.start + chunk.tokens
        runs.append((chunk.start, end, index))
    if end < mapped.row.tokens:
        runs.append((end, mapped.row.tokens, dead))
    return runs


def scan(q_GRd: Tensor, blocks: list[Block], *, record: bool) -> Scan:
    """Attend from q (float32, already scaled by 1/sqrt(d)) to every live token of the blocks."""
    G, R, d = q_GRd.shape
    top_GR1 = torch.full((G, R, 1), -torch.inf)
    weight_GR1, out_GRd = torch.zeros(G, R, 1), torch.zeros(G, R, d)
    sums = []
    for block in blocks:
        parts = [_attend(q_GRd[g], block, g, record) for g in range(G)]
        new_top, new_weight, new_out, pieces = (torch.stack(x) for x in zip(*parts, strict=True))
        both = torch.maximum(top_GR1, new_top)
        keep, add = torch.exp(top_GR1 - both), torch.exp(new_top - both)
        weight_GR1 = weight_GR1 * keep + new_weight * add
        out_GRd = out_GRd * keep + new_out * add
        top_GR1 = both
        if record:
            sums.append((pieces, new_top.squeeze(-1), block.chunk_P))
    return Scan(out_GRd / weight_GR1, (top_GR1 + weight_GR1.log()).squeeze(-1), sums)


def _attend(q_Rd: Tensor, block: Block, head: int, record: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Maximum [R, 1], exp-sum [R, 1], unnormalised output [R, d] and exp-sums per piece [R, P] of one head."""
    kv = block.kv
    k_nd, v_nd = kv.k_GNd[head].float(), kv.v_GNd[head].float()
    rows = max(1, _TILE_BYTES // (4 * len(kv)))
    parts = []
    for q in q_Rd.split(rows):
        p = q @ k_nd.T
        if kv.k_scale_GN is not None:
            p *= kv.k_scale_GN[head].float()
        if block.hidden_n is not None:
            p += block.hidden_n
        top = p.amax(-1, keepdim=True)
        p.sub_(top).exp_()
        pieces = torch.from_numpy(np.add.reduceat(p.numpy(), block.starts_P, axis=1)) if record else p[:, :0]
        total = p.sum(-1, keepdim=True)
        if kv.v_scale_GN is not None:
            p *= kv.v_scale_GN[head].float()
        parts.append((top, total, p @ v_nd, pieces))
    return tuple(torch.cat(x) for x in zip(*parts, strict=True))  # type: ignore[return-value]
