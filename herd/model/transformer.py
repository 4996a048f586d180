"""The Llama 4 text decoder. Parameter names are those of Hugging Face's Llama4ForCausalLM. Spec §1.

Shape suffixes: B batch, T tokens, D hidden, V vocabulary, G key/value heads, d head_dim.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from herd.config import TextConfig
from herd.errors import ConfigError
from herd.kernels import rms_norm
from herd.model.attention import Attention
from herd.model.cache import Cache
from herd.model.fusion import Patches, fuse
from herd.model.moe import DenseMLP, MoE
from herd.model.packed import Packed


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Block(nn.Module):
    def __init__(self, cfg: TextConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = Attention(cfg, layer)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.feed_forward = MoE(cfg) if cfg.is_moe(layer) else DenseMLP(cfg.hidden_size, cfg.intermediate_size_mlp)

    def forward(self, x_BTD: Tensor, positions_BT: Tensor, cache: Cache | None) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), positions_BT, cache)
        return x_BTD + self.feed_forward(self.post_attention_layernorm(x_BTD))


class Decoder(nn.Module):
    def __init__(self, cfg: TextConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        # nn.ModuleList forgets what it holds; the annotation does not.
        blocks = nn.ModuleList(Block(cfg, i) for i in range(cfg.num_hidden_layers))
        self.layers: Sequence[Block] = blocks  # type: ignore[assignment]
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)


class Transformer(nn.Module):
    def __init__(self, cfg: TextConfig) -> None:
        super().__init__()
        self.config = cfg
        self.model = Decoder(cfg)
        self.lm_head = nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)
        if cfg.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.packed: Packed | None = None  # runs in place of the layers and the head, which are then gone

    @property
    def memory_dtype(self) -> torch.dtype:
        """Of the keys and values that it attends with."""
        return torch.bfloat16 if self.packed is not None else self.model.embed_tokens.weight.dtype

    @property
    def blocks(self) -> list[Block]:
        """The layers, bottom to top."""
        return cast(list[Block], list(self.model.layers))

    def forward(
        self,
        ids_BT: Tensor,
        positions_BT: Tensor | None = None,
        cache: Cache | None = None,
        patches: Patches | None = None,
    ) -> Tensor:
        """Logits [B, T, V] in float32. Arguments as for `states`."""
        return self.logits(self.states(ids_BT, positions_BT, cache, patches))

    def states(
        self,
        ids_BT: Tensor,
        positions_BT: Tensor | None = None,
        cache: Cache | None = None,
        patches: Patches | None = None,
    ) -> Tensor:
        """What the layers make of the tokens, [B, T, D].

        Without a cache each row is a whole sequence from position 0. With one, the new tokens follow what it
        remembers; position -1 marks padding, which must stand right of the row's real tokens. patches: of images,
        which take the places of some tokens' embeddings.
        """
        if positions_BT is None:
            positions_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
        x_BTD = self.model.embed_tokens(ids_BT)
        if patches is not None:
            x_BTD = fuse(x_BTD, patches)
        if self.packed is not None:
            return self.packed.states(x_BTD, positions_BT, cache)
        for block in self.model.layers:
            x_BTD = block(x_BTD, positions_BT, cache)
        return x_BTD

    def logits(self, x: Tensor) -> Tensor:
        """Logits [..., V] in float32 of some of the `states` [..., D]."""
        if self.packed is not None:
            return self.packed.logits(x)
        return self.lm_head(self.model.norm(x)).float()

    def read(self, ids_BT: Tensor, first: int = 0, cache: Cache | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values [B, T, G, d] that the last global layer remembers of chunks, each its own row.

        Every row starts on a chunk boundary, at position `first`, so local layers see nothing else, and the layers
        above the last global one are never run. With one global layer, keys and values depend on the row alone
        (long-context reading is linear); with several, the cache attends for those below, and gets theirs. Padding
        may stand right of a row; its results are to be dropped. Raises ConfigError for models without a global layer,
        or with several and no cache.
        """
        layers = self.config.global_layers
        if not layers or (len(layers) > 1 and cache is None):
            raise ConfigError(f"reading chunks on their own needs one global layer, this model has {len(layers)}")
        chunk = self.config.attention_chunk_size
        assert chunk is None or ids_BT.shape[1] <= chunk, "a row is at most one chunk"
        positions_BT = torch.arange(first, first + ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
        x_BTD = self.model.embed_tokens(ids_BT)
        if self.packed is not None:
            return self.packed.key_value(x_BTD, positions_BT, layers[-1], cache)
        for block in self.model.layers[: layers[-1]]:
            x_BTD = block(x_BTD, positions_BT, cache)
        block = self.model.layers[layers[-1]]
        return block.self_attn.key_value(block.input_layernorm(x_BTD), positions_BT)
