"""Grouped-query attention: local (RoPE, chunked, optional QK-norm) or global (NoPE, temperature). Spec §2.

Shape suffixes: B batch, T tokens, D hidden, H query heads, G key/value heads, d head_dim.
"""

import torch
from torch import Tensor, nn

from herd import kernels
from herd.config import TextConfig
from herd.kernels import apply_rope, attend, rms_norm
from herd.model.cache import Cache, visible
from herd.model.rope import inverse_frequencies, rope_angles, temperature


class Attention(nn.Module):
    def __init__(self, cfg: TextConfig, layer: int) -> None:
        super().__init__()
        self.cfg, self.layer, self.local = cfg, layer, cfg.is_local(layer)
        kv_width = cfg.num_key_value_heads * cfg.head_dim
        q_width = cfg.num_attention_heads * cfg.head_dim
        self.q_proj = nn.Linear(cfg.hidden_size, q_width, bias=False)
        self.k_proj = nn.Linear(cfg.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(cfg.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(q_width, cfg.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, positions_BT: Tensor, cache: Cache | None) -> Tensor:
        return self.o_proj(self.attended(x_BTD, positions_BT, cache))

    def attended(self, x_BTD: Tensor, positions_BT: Tensor, cache: Cache | None) -> Tensor:
        """What the heads give together, [B, T, H d]."""
        q_BTHd = self.query(x_BTD, positions_BT)
        k_BTGd, v_BTGd = self.key_value(x_BTD, positions_BT)
        if cache is not None:
            out_BTHd = cache.attend(self.layer, q_BTHd, k_BTGd, v_BTGd, positions_BT)
        else:
            chunk = self.cfg.attention_chunk_size if self.local else None
            out_BTHd = causal_attention(q_BTHd, k_BTGd, v_BTGd, chunk)
        return out_BTHd.flatten(2)

    def query(self, x_BTD: Tensor, positions_BT: Tensor) -> Tensor:
        """Queries [B, T, H, d], ready to be compared with keys."""
        q_BTHd = self.q_proj(x_BTD).unflatten(-1, (-1, self.cfg.head_dim))
        if self.local:
            return self._rotate(q_BTHd, positions_BT)
        if self.cfg.attn_temperature_tuning:
            factor_BT = temperature(positions_BT, self.cfg)
            q_BTHd = (q_BTHd.float() * factor_BT[..., None, None]).to(q_BTHd.dtype)
        return q_BTHd

    def key_value(self, x_BTD: Tensor, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, each [B, T, G, d], as they are remembered."""
        k_BTGd = self.k_proj(x_BTD).unflatten(-1, (-1, self.cfg.head_dim))
        v_BTGd = self.v_proj(x_BTD).unflatten(-1, (-1, self.cfg.head_dim))
        return (self._rotate(k_BTGd, positions_BT) if self.local else k_BTGd), v_BTGd

    def _rotate(self, x_BTHd: Tensor, positions_BT: Tensor) -> Tensor:
        inv_freq = _inverse_frequencies(self.cfg, x_BTHd.device)
        x_BTHd = apply_rope(x_BTHd, rope_angles(positions_BT, inv_freq, self.cfg.attention_chunk_size))
        return rms_norm(x_BTHd, None, self.cfg.rms_norm_eps) if self.cfg.use_qk_norm else x_BTHd


def causal_attention(q_BTHd: Tensor, k_BTGd: Tensor, v_BTGd: Tensor, chunk: int | None) -> Tensor:
    """Attention of whole sequences that start at position 0; chunks become rows of the batch (spec §2.4)."""
    B, T = q_BTHd.shape[:2]
    if torch.is_grad_enabled() and T <= _SHORT and q_BTHd.device.type == "cpu":
        positions_BT = torch.arange(T).unsqueeze(0)
        return attend(q_BTHd, k_BTGd, v_BTGd, visible(positions_BT, positions_BT, chunk))[0].to(q_BTHd.dtype)
    parts = (q_BTHd, k_BTGd, v_BTGd)
    folded = chunk is not None and T > chunk
    if chunk is not None and folded:
        # Padding stands after every real token of the last chunk, so causality hides it.
        parts = tuple(nn.functional.pad(x, (0, 0, 0, 0, 0, -T % chunk)).unflatten(1, (-1, chunk)).flatten(0, 1)
                      for x in parts)  # fmt: skip
    out = kernels.causal_attention(*parts)
    return out.unflatten(0, (B, -1)).flatten(1, 2)[:, :T] if folded else out


# The backward pass of flash attention on CPU takes four times as long as the plain one for rows this short.
_SHORT = 128

_tables: dict[tuple[TextConfig, torch.device], Tensor] = {}


def _inverse_frequencies(cfg: TextConfig, device: torch.device) -> Tensor:
    # Not a buffer: checkpoints hold no such tensor, and models built on the meta device must still have real angles.
    key = (cfg, device)
    if key not in _tables:
        _tables[key] = inverse_frequencies(cfg).to(device)
    return _tables[key]
