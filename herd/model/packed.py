"""A decoder whose layers the native library runs: packed weights, float32 activations, bfloat16 keys and values.

Shape suffixes: B batch, T tokens, N tokens of all sequences, D hidden, H query heads, G key/value heads, d head_dim, f
d / 2.
"""

import ctypes
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from herd import kernels
from herd.config import TextConfig
from herd.kernels import layers, rms_norm
from herd.kernels.layers import Layer, Layers, Shape, Source, Span, Tokens
from herd.kernels.native import PackedWeight
from herd.model.attention import causal_attention
from herd.model.cache import Cache, KVRow, KVRows
from herd.model.rope import inverse_frequencies, rope_angles, temperature


class Packed:
    """Layers, last norm and head of a transformer."""

    def __init__(
        self,
        cfg: TextConfig,
        packed: Sequence[Layer],
        norm_D: Tensor,
        head: PackedWeight,
        source: Source | None = None,
    ) -> None:
        """source: of the experts, where they are not in memory."""
        self.cfg = cfg
        heads = (cfg.num_attention_heads, cfg.num_key_value_heads)
        self._layers = Layers(Shape(cfg.hidden_size, *heads, cfg.head_dim, cfg.rms_norm_eps), packed, source)
        self.layers, self.norm_D, self.head, self.source = packed, norm_D, head, source
        self._inverse_frequencies = inverse_frequencies(cfg)

    def weights(self, *, active: bool = False) -> Iterator[PackedWeight]:
        """All that are packed or, with `active`, as many as one token passes through."""
        for layer in self.layers:
            yield from (layer.qkv, layer.out)
            for mlp in (layer.shared, *(layer.experts[: layer.top_k] if active else layer.experts)):
                yield from (mlp.gate_up, mlp.down)
        yield self.head

    def states(self, x_BTD: Tensor, positions_BT: Tensor, cache: Cache | None) -> Tensor:
        """What the layers make of embeddings, float32 [B, T, D]; see `Transformer.states`."""
        tokens, last = self._tokens(x_BTD, positions_BT), len(self._layers.layers)
        at = 0
        while at < last:
            own = None if cache is None else cache.own(at)
            end = at + 1
            if own is None:
                self._ask(at, tokens, positions_BT, cache)
            else:
                assert cache is not None
                while end < last and cache.own(end) is own:
                    end += 1
                self._layers.run(at, end, tokens, _spans(own, positions_BT, range(at, end)))
            at = end
        return tokens.x_ND.view_as(x_BTD)

    def key_value(self, x_BTD: Tensor, positions_BT: Tensor, layer: int, cache: Cache | None) -> tuple[Tensor, Tensor]:
        """Keys and values, each [B, T, G, d], that a layer makes of chunks; see `Transformer.read`."""
        tokens = self._tokens(x_BTD, positions_BT)
        if cache is None:
            self._read(tokens, len(positions_BT), positions_BT.shape[1], layer)
        else:
            for at in range(layer):
                self._ask(at, tokens, positions_BT, cache)
        _, k_NGd, v_NGd = self._layers.project(layer, tokens)
        k_BTGd, v_BTGd = (part.unflatten(0, positions_BT.shape).to(x_BTD.dtype) for part in (k_NGd, v_NGd))
        return k_BTGd, v_BTGd

    def _read(self, tokens: Tokens, B: int, T: int, last: int) -> None:
        """The layers before `last` over rows that begin a chunk, each with one memory that all layers use in turn."""
        rooms = [layers.memory(T, self.cfg.num_key_value_heads, self.cfg.head_dim) for _ in range(B)]
        tables = [layers.addresses([room] * last) for room in rooms]
        spans = [Span(row * T, T, 0, 0, T, T, ctypes.addressof(table)) for row, table in enumerate(tables)]
        self._layers.run(0, last, tokens, spans)

    def logits(self, x: Tensor) -> Tensor:
        """See `Transformer.logits`."""
        return kernels.linear(rms_norm(x, self.norm_D, self.cfg.rms_norm_eps), self.head)

    def _tokens(self, x_BTD: Tensor, positions_BT: Tensor) -> Tokens:
        cfg, positions_N = self.cfg, positions_BT.flatten().clamp(min=0)
        angles_Nf = rope_angles(positions_N, self._inverse_frequencies, cfg.attention_chunk_size)
        turns_Nf2 = torch.stack([angles_Nf.cos(), angles_Nf.sin()], -1)
        factor_N = temperature(positions_N, cfg) if cfg.attn_temperature_tuning else None
        x_ND = x_BTD.flatten(0, 1)
        return Tokens(x_ND.float() if x_ND.dtype != torch.float32 else x_ND.clone(), turns_Nf2, factor_N)

    def _ask(self, at: int, tokens: Tokens, positions_BT: Tensor, cache: Cache | None) -> None:
        """One layer, whose attention is the cache's or, without one, that of whole sequences."""
        parts = self._layers.project(at, tokens)
        q, k, v = (part.unflatten(0, positions_BT.shape).to(torch.bfloat16) for part in parts)
        if cache is None:
            attended = causal_attention(q, k, v, self.cfg.attention_chunk_size if self.cfg.is_local(at) else None)
        else:
            attended = cache.attend(at, q, k, v, positions_BT)
        self._layers.finish(at, tokens, attended.flatten(0, 1))


def _spans(own: KVRows, positions_BT: Tensor, run: range) -> list[Span]:
    spans = own.spans(positions_BT)
    return [
        _span(row, at.start, at.stop - at.start, position, run)
        for row, (at, position) in zip(own.rows, spans, strict=True)
        if at.stop > at.start
    ]


def _span(row: KVRow, first: int, tokens: int, position: int, run: range) -> Span:
    local, every = row.past(position)
    chunk = row.cfg.attention_chunk_size
    assert chunk is None or position % chunk + tokens <= chunk, "the tokens are of one attention chunk"
    assert every + tokens <= row.tokens, f"{every + tokens} tokens in memory for {row.tokens}"
    return Span(first, tokens, local, every, row.local_capacity, row.tokens, row.addresses(run))
