"""Exact attention of many queries over all of a context: one pass, block by block, softmax in float32.

Every query sees every live token: context chunks come before the question, and the global layer has no positions.
Blocks are shared out to threads that run PyTorch single-threaded: many small parallel operators cost more in barriers
than they compute, and on a busy machine the barriers took 30 times as long as the work.

Shape suffixes: G key/value heads, R query rows of one key/value head, d head_dim, n tokens of a block, K blocks.
"""

import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from herd.context.segment import KV
from herd.context.store import Store
from herd.kernels import merge_partials

# The fused operator behind scaled_dot_product_attention: it also returns the log-denominator, which merging needs.
_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
DENSE_BYTES = 1 << 30  # of dequantised K/V that one cache keeps: 1.4M tokens of Cria, and half the time of a scan
BLOCK_TOKENS = 8192  # dequantised K and V of a block stay in the third-level cache; smaller ones cost more calls


@dataclass
class Block:
    """Neighbouring live chunks of one segment, as indices into Store.chunks, and their K/V as they are kept.

    `dense` holds them dequantised once a scan was told to keep them, if `fits` says that memory is left for it.
    """

    kv: KV
    chunks: list[int]
    fits: bool = False
    dense: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Scan:
    """Attention over the context, float32: out [G, R, d], lse [G, R], and the lse of each block [K, G, R]."""

    out_GRd: Tensor
    lse_GR: Tensor
    lse_KGR: Tensor


def blocks(store: Store) -> list[Block]:
    """All live chunks of a context, in runs of neighbours of at most BLOCK_TOKENS (one chunk at least)."""
    found = []
    for mapped in store.segments:
        run: list[int] = []
        for index in mapped.live:
            chunk = store.chunks[index]
            if run:
                first, last = store.chunks[run[0]], store.chunks[run[-1]]
                adjacent = chunk.start == last.start + last.tokens
                if not adjacent or chunk.start + chunk.tokens - first.start > BLOCK_TOKENS:
                    found.append(_block(store, mapped.kv, run))
                    run = []
            run.append(index)
        found.append(_block(store, mapped.kv, run))
    budget = DENSE_BYTES
    for block in found:
        budget -= 2 * block.kv.k_GNd.numel() * torch.bfloat16.itemsize
        block.fits = budget >= 0
    return found


def _block(store: Store, kv: KV, run: list[int]) -> Block:
    first, last = store.chunks[run[0]], store.chunks[run[-1]]
    return Block(kv.part(first.start, last.start + last.tokens), run)


def scan(q_GRd: Tensor, blocks: list[Block], *, keep: bool = False) -> Scan:
    """Attend from q, already scaled by 1/sqrt(d), to every token of the blocks.

    K and V are dequantised to the type of q (float32 or bfloat16); logits and softmax are float32 for both. `keep`
    leaves bfloat16 ones in memory, which halves the time of the scans that follow.
    """
    threads = min(torch.get_num_threads(), len(blocks))
    shares = [blocks[i::threads] for i in range(threads)]
    parts = list(_pool(torch.get_num_threads()).map(lambda share: _scan(q_GRd, share, keep), shares))
    out_GRd, lse_GR = merge_partials([(part.out_GRd, part.lse_GR) for part in parts])
    lse_KGR = torch.empty(len(blocks), *lse_GR.shape)
    for i, part in enumerate(parts):
        lse_KGR[i::threads] = part.lse_KGR
    return Scan(out_GRd, lse_GR, lse_KGR)


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    pool = ThreadPoolExecutor(threads, "scan", initializer=_run_single_threaded)
    started = threading.Barrier(threads)
    list(pool.map(lambda _: started.wait(), range(threads)))
    # What one thread sets is also what threads to come start with.
    torch.set_num_threads(threads)
    return pool


def _run_single_threaded() -> None:
    torch.get_num_threads()  # else the first operator would set this thread to the common number again
    torch.set_num_threads(1)


@torch.no_grad()
def _scan(q_GRd: Tensor, blocks: list[Block], keep: bool) -> Scan:
    G, R, d = q_GRd.shape
    out_GRd, lse_GR = torch.zeros(G, R, d), torch.full((G, R), -torch.inf)
    lses = []
    longest = max(len(block.kv) for block in blocks)
    k_buffer, v_buffer = (torch.empty(G * longest * d, dtype=q_GRd.dtype) for _ in range(2))
    for block in blocks:
        k_GNd, v_GNd = _dense(block, k_buffer, v_buffer, keep)
        found = _attend(q_GRd[None], k_GNd[None], v_GNd[None], scale=1.0)
        block_out, block_lse = found[0][0].float(), found[1][0].float()
        total = torch.logaddexp(lse_GR, block_lse)
        out_GRd.mul_((lse_GR - total).exp_().unsqueeze(-1))
        out_GRd.add_(block_out.mul_((block_lse - total).exp_().unsqueeze(-1)))
        lse_GR = total
        lses.append(block_lse)
    return Scan(out_GRd, lse_GR, torch.stack(lses))


def _dense(block: Block, k_buffer: Tensor, v_buffer: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """K and V in the buffers' type: kept ones, or computed into the buffers, or into memory that is then kept."""
    if block.dense is not None and block.dense[0].dtype == k_buffer.dtype:
        return block.dense
    kv = block.kv
    keep = keep and block.fits and k_buffer.dtype == torch.bfloat16
    if keep:
        k_buffer, v_buffer = (torch.empty(kv.k_GNd.numel(), dtype=k_buffer.dtype) for _ in range(2))
    dense = _dequantize(kv.k_GNd, kv.k_scale_GN, k_buffer), _dequantize(kv.v_GNd, kv.v_scale_GN, v_buffer)
    block.dense = dense if keep else None
    return dense


def _dequantize(x_GNd: Tensor, scale_GN: Tensor | None, buffer: Tensor) -> Tensor:
    """Into the buffer's type and, when there is something to convert, into its memory."""
    if scale_GN is None and x_GNd.dtype == buffer.dtype:
        return x_GNd
    out_GNd = buffer[: x_GNd.numel()].view(x_GNd.shape).copy_(x_GNd)
    return out_GNd if scale_GN is None else out_GNd.mul_(scale_GN.to(out_GNd.dtype).unsqueeze(-1))
