"""What attention remembers. The model asks `attend`; who implements it decides where keys and values live.

Shape suffixes: B batch, T new tokens, N new tokens of all sequences, S remembered tokens, H query heads, G key/value
heads, d head_dim.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from herd.config import TextConfig
from herd.kernels import attend
from herd.kernels import layers as packing

_QUERIES = 256  # that are compared with all keys at a time; bounds the memory of a long prompt
# Sequences that go on by one token are put together where starting an operation for each costs more than copying their
# keys and values: up to so many tokens, by length, so that little is padding.
_SHORT, _BUCKET = 512, 64


class Cache(Protocol):
    """The seam between the model and memory (design.md)."""

    def attend(self, layer: int, q_BTHd: Tensor, k_BTGd: Tensor, v_BTGd: Tensor, positions_BT: Tensor) -> Tensor:
        """Remember k, v and return the attention output [B, T, H, d] of q over all that is remembered.

        k and q come rotated and scaled by temperature; 1/sqrt(d) is applied here. Position -1 marks padding.
        """
        ...

    def own(self, layer: int) -> "KVRows | None":
        """The rows, if in this layer they see nothing but themselves: a packed model then keeps keys and values in
        them itself (`KVRow.packed`). None: `attend` is to be asked."""
        ...


def visible(query_BT: Tensor, key_BS: Tensor, chunk: int | None) -> Tensor:
    """Which keys a query sees [B, T, S]: real, not later, and for local layers in the same chunk (spec §2.4)."""
    q, k = query_BT.unsqueeze(-1), key_BS.unsqueeze(-2)
    seen = (k >= 0) & (k <= q)
    return seen if chunk is None else seen & (q // chunk == k // chunk)


def capacity(cfg: TextConfig, layer: int, tokens: int) -> int:
    """For how many tokens a layer has room where a sequence has so many: local ones for a chunk; in whole panels."""
    chunk = cfg.attention_chunk_size
    return packing.whole_panels(min(chunk, tokens) if chunk is not None and cfg.is_local(layer) else tokens)


def bytes_needed(cfg: TextConfig, tokens: int, dtype: torch.dtype) -> int:
    """Bytes that the keys and values of one sequence take in memory at most, known before it runs."""
    kept = sum(capacity(cfg, layer, tokens) for layer in range(cfg.num_hidden_layers))
    return 2 * kept * cfg.num_key_value_heads * cfg.head_dim * dtype.itemsize


class _Layer:
    """Keys and values of one layer and sequence: those of its current chunk, or all of them."""

    def __init__(self, cfg: TextConfig, layer: int, tokens: int, like: Tensor) -> None:
        self.chunk = cfg.attention_chunk_size if cfg.is_local(layer) else None
        shape = (2, cfg.num_key_value_heads, capacity(cfg, layer, tokens), cfg.head_dim)
        self.kv_2GSd = like.new_empty(shape)
        self.room = tokens if self.chunk is None else min(self.chunk, tokens)
        self.held, self.end = 0, 0  # tokens, and the position after the last of them

    def remember(self, k_TGd: Tensor, v_TGd: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Add tokens of one chunk; keys and values [S, G, d] of all that the last of them sees."""
        assert position >= self.end, f"position {position} is before {self.end}, which comes next"
        if self.chunk is not None and self.held and position // self.chunk != (self.end - 1) // self.chunk:
            self.held = 0
        stop = self.held + len(k_TGd)
        assert stop <= self.room, f"{stop} tokens in memory for {self.room}"
        self.kv_2GSd[0, :, self.held : stop] = k_TGd.transpose(0, 1)
        self.kv_2GSd[1, :, self.held : stop] = v_TGd.transpose(0, 1)
        self.held, self.end = stop, position + len(k_TGd)
        return self.keys_values()

    def keys_values(self) -> tuple[Tensor, Tensor]:
        k_GSd, v_GSd = self.kv_2GSd[:, :, : self.held]
        return k_GSd.transpose(0, 1), v_GSd.transpose(0, 1)


class KVRow:
    """Keys and values of one sequence of at most `tokens` tokens, in memory that is taken once and never grows."""

    def __init__(self, cfg: TextConfig, tokens: int, dtype: torch.dtype) -> None:
        self.cfg, self.tokens, self.dtype = cfg, tokens, dtype
        self.nbytes = bytes_needed(cfg, tokens, dtype)
        self._layers: dict[int, _Layer] = {}
        self._packed: dict[int, Tensor] = {}
        self._addresses: dict[range, ctypes.Array[ctypes.c_void_p]] = {}
        self._start: int | None = None

    def packed(self, layer: int) -> Tensor:
        """Memory that a packed model keeps this layer's keys and values in, in its own order (`kernels.layers`)."""
        if layer not in self._packed:
            cfg = self.cfg
            tokens = capacity(cfg, layer, self.tokens)
            self._packed[layer] = packing.memory(tokens, cfg.num_key_value_heads, cfg.head_dim)
        return self._packed[layer]

    @property
    def local_capacity(self) -> int:
        """For how many tokens there is room in local layers."""
        chunk = self.cfg.attention_chunk_size
        return self.tokens if chunk is None else min(chunk, self.tokens)

    def addresses(self, run: range) -> int:
        """Where the addresses of some layers' memory stand, for `kernels.layers.Span`."""
        if run not in self._addresses:
            self._addresses[run] = packing.addresses([self.packed(layer) for layer in run])
        return ctypes.addressof(self._addresses[run])

    def past(self, position: int) -> tuple[int, int]:
        """How many tokens local and global layers remember before the one at `position`, which comes next."""
        if self._start is None:
            self._start = position
        tokens, chunk = position - self._start, self.cfg.attention_chunk_size
        return (tokens if chunk is None else min(tokens, position % chunk)), tokens

    def remember(self, layer: int, k_TGd: Tensor, v_TGd: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Add tokens that follow each other from `position` on, for local layers within one chunk.

        Returns keys and values [S, G, d] of all that the last of them sees, itself included: views, good until the
        next call.
        """
        if layer not in self._layers:
            assert k_TGd.dtype == self.dtype, f"{k_TGd.dtype} in memory for {self.dtype}"
            self._layers[layer] = _Layer(self.cfg, layer, self.tokens, k_TGd)
        return self._layers[layer].remember(k_TGd, v_TGd, position)

    def remembered(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [S, G, d] that a layer holds, as views."""
        return self._layers[layer].keys_values()

    def attend(self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Remember tokens from `position` on; (out [T, H, d], lse [T, H]) of them in float32, see `kernels.attend`."""
        chunk = self.cfg.attention_chunk_size if self.cfg.is_local(layer) else None
        parts, start = [], 0
        while start < len(q_THd):
            left = len(q_THd) - start
            stop = start + (left if chunk is None else min(left, chunk - (position + start) % chunk))
            k_SGd, v_SGd = self.remember(layer, k_TGd[start:stop], v_TGd[start:stop], position + start)
            parts += _attend_to_the_past(q_THd[start:stop], k_SGd, v_SGd)
            start = stop
        if len(parts) == 1:
            return parts[0]
        outs, lses = zip(*parts, strict=True)
        return torch.cat(outs), torch.cat(lses)

    def take(self, layers: Sequence[int], first: int, stop: int) -> Tensor:
        """Copy of keys and values [L, 2, G, S, d] of tokens first..stop-1 in some layers, all local or all
        global. Local ones hold those of the chunk of the last token."""
        cfg = self.cfg
        if not layers:
            return torch.empty(0, 2, cfg.num_key_value_heads, stop - first, cfg.head_dim, dtype=self.dtype)
        at, tokens = self._place(layers[0], first), stop - first
        if layers[0] in self._layers:
            return torch.stack([self._layers[layer].kv_2GSd[:, :, at : at + tokens] for layer in layers])
        kept = [self.packed(layer) for layer in layers]
        return packing.read_memory(kept, cfg.num_key_value_heads, cfg.head_dim, at, at + tokens)

    def give(self, layers: Sequence[int], first: int, kv_L2GSd: Tensor, *, packed: bool) -> None:
        """Remember what `take` gave, from position `first` on. packed: in memory of a packed model (`packed`)."""
        if not layers:
            return
        at = self._place(layers[0], first)
        if packed:
            packing.write_memory([self.packed(layer) for layer in layers], kv_L2GSd, at)
            return
        for layer, kv_2GSd in zip(layers, kv_L2GSd, strict=True):
            if layer not in self._layers:
                self._layers[layer] = _Layer(self.cfg, layer, self.tokens, kv_2GSd)
            self._layers[layer].kv_2GSd[:, :, at : at + kv_2GSd.shape[2]] = kv_2GSd

    def go_on(self, position: int) -> None:
        """Now all is given that stands before `position`, which comes next."""
        self._start = 0
        for layer, its in self._layers.items():
            its.held, its.end = self._place(layer, position), position

    def _place(self, layer: int, position: int) -> int:
        """Where a layer keeps a position; rows begin at 0."""
        assert not self._start, f"a sequence that begins at {self._start}"
        chunk = self.cfg.attention_chunk_size
        return position % chunk if chunk is not None and self.cfg.is_local(layer) else position

    def close(self) -> None:
        """Give the memory back. What the sequence is asked about afterwards does not need it."""
        self._layers.clear()
        self._packed.clear()
        self._addresses.clear()


def _attend_to_the_past(q_THd: Tensor, k_SGd: Tensor, v_SGd: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(out, lse) of blocks of queries; the queries are those of the last T of S tokens."""
    parts, before = [], len(k_SGd) - len(q_THd)
    for start in range(0, len(q_THd), _QUERIES):
        stop = min(start + _QUERIES, len(q_THd))
        seen = before + stop
        mask_TS = None
        if stop - start > 1:
            mask_TS = torch.ones(stop - start, seen, dtype=torch.bool, device=q_THd.device).tril(before + start)
            mask_TS = mask_TS.unsqueeze(0)
        out_1THd, lse_1TH = attend(q_THd[None, start:stop], k_SGd[None, :seen], v_SGd[None, :seen], mask_TS)
        parts.append((out_1THd[0], lse_1TH[0]))
    return parts


@dataclass(frozen=True)
class _One:
    """The one new token of a sequence: where it stands in the flattened batch, and all that it sees."""

    at: slice
    k_SGd: Tensor
    v_SGd: Tensor


def _attend_one_each(q_BHd: Tensor, ones: list[_One]) -> tuple[Tensor, Tensor]:
    """(out [B, H, d], lse [B, H]) of the new token of each sequence."""
    if len(ones) == 1:
        out_BTHd, lse_BTH = attend(q_BHd.unsqueeze(1), ones[0].k_SGd[None], ones[0].v_SGd[None], None)
    else:
        k_BSGd = pad_sequence([one.k_SGd for one in ones], batch_first=True)
        v_BSGd = pad_sequence([one.v_SGd for one in ones], batch_first=True)
        seen_B1 = torch.tensor([[len(one.k_SGd)] for one in ones], device=q_BHd.device)
        mask_BS = torch.arange(k_BSGd.shape[1], device=q_BHd.device) < seen_B1
        out_BTHd, lse_BTH = attend(q_BHd.unsqueeze(1), k_BSGd, v_BSGd, mask_BS.unsqueeze(1))
    return out_BTHd[:, 0], lse_BTH[:, 0]


class KVRows:
    """The cache of forward passes over some sequences, each of which sees its own keys and values only.

    counts None: row b of the batch goes on with sequence b; position -1 marks padding, right of its tokens. Otherwise
    the batch is one row without padding: counts[i] tokens of sequence i, one sequence after the other.
    """

    def __init__(self, rows: Sequence[KVRow], counts: Sequence[int] | None = None) -> None:
        self.rows, self.counts = rows, counts
        self._positions: Tensor | None = None
        self._spans: list[tuple[slice, int]] = []

    def own(self, layer: int) -> "KVRows":
        """See `Cache`."""
        return self

    def attend(self, layer: int, q_BTHd: Tensor, k_BTGd: Tensor, v_BTGd: Tensor, positions_BT: Tensor) -> Tensor:
        """See `Cache`."""
        return self.attend_partial(layer, q_BTHd, k_BTGd, v_BTGd, positions_BT)[0].to(q_BTHd.dtype)

    def attend_partial(
        self, layer: int, q_BTHd: Tensor, k_BTGd: Tensor, v_BTGd: Tensor, positions_BT: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `attend`, but (out, lse) in float32, to be merged with what lives elsewhere."""
        q_NHd, k_NGd, v_NGd = q_BTHd.flatten(0, 1), k_BTGd.flatten(0, 1), v_BTGd.flatten(0, 1)
        out_NHd = torch.zeros(q_NHd.shape, device=q_NHd.device)
        lse_NH = torch.full(q_NHd.shape[:2], -torch.inf, device=q_NHd.device)
        buckets: dict[int, list[_One]] = {}
        for row, (span, position) in zip(self.rows, self.spans(positions_BT), strict=True):
            if span.stop == span.start + 1:
                k_SGd, v_SGd = row.remember(layer, k_NGd[span], v_NGd[span], position)
                buckets.setdefault(-(-len(k_SGd) // _BUCKET), []).append(_One(span, k_SGd, v_SGd))
            elif span.stop > span.start:
                out_NHd[span], lse_NH[span] = row.attend(layer, q_NHd[span], k_NGd[span], v_NGd[span], position)
        for bucket, ones in buckets.items():
            if len(ones) > 1 and bucket * _BUCKET <= _SHORT:
                at_B = torch.tensor([one.at.start for one in ones], device=q_NHd.device)
                out_NHd[at_B], lse_NH[at_B] = _attend_one_each(q_NHd[at_B], ones)
                continue
            for one in ones:
                out_NHd[one.at], lse_NH[one.at] = _attend_one_each(q_NHd[one.at], [one])
        return out_NHd.view_as(q_BTHd), lse_NH.view(q_BTHd.shape[:3])

    def spans(self, positions_BT: Tensor) -> list[tuple[slice, int]]:
        """Where the new tokens of each sequence stand in the flattened batch, and the position of the first."""
        if positions_BT is not self._positions:  # every layer asks with the same tensor
            self._positions, self._spans = positions_BT, self._find_spans(positions_BT)
        return self._spans

    def _find_spans(self, positions_BT: Tensor) -> list[tuple[slice, int]]:
        rows = positions_BT.tolist()
        flat = [position for row in rows for position in row]
        counts = [sum(p >= 0 for p in row) for row in rows] if self.counts is None else self.counts
        spans, at = [], 0
        for index, count in enumerate(counts):
            start = index * positions_BT.shape[1] if self.counts is None else at
            at = start + count
            assert count == 0 or flat[at - 1] == flat[start] + count - 1 >= count - 1, "tokens follow each other"
            spans.append((slice(start, at), flat[start] if count else 0))
        return spans


class Memory(Protocol):
    """Where an engine keeps its sequences."""

    @property
    def start_position(self) -> int:
        """Position of the first token of every sequence."""
        ...

    def open(self, tokens: int, prompt: int = 1) -> KVRow:
        """Memory for a sequence of at most so many tokens, of which the first `prompt` are given. It is taken as it
        is used, at most `nbytes`."""
        ...

    def rows(self, rows: Sequence[KVRow], counts: Sequence[int] | None = None) -> Cache:
        """What the model gets as its cache, see `KVRows`."""
        ...


class KVCache:
    """Sequences that see nothing but themselves."""

    start_position = 0

    def __init__(self, cfg: TextConfig, dtype: torch.dtype = torch.float32) -> None:
        self.cfg, self.dtype = cfg, dtype

    def open(self, tokens: int, prompt: int = 1) -> KVRow:
        """See `Memory`."""
        return KVRow(self.cfg, tokens, self.dtype)

    def rows(self, rows: Sequence[KVRow], counts: Sequence[int] | None = None) -> KVRows:
        """See `Memory`."""
        return KVRows(rows, counts)
