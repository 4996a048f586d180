"""The image encoder of Llama 4, and what projects its features into the decoder. Parameter names are those of Hugging
Face's Llama4ForConditionalGeneration. Spec §4.

Shape suffixes: N tiles, C channels, Y and X pixels, P patches of a tile and the class token behind them, D hidden,
H heads, d head_dim, f d / 2, T tokens of a tile, O hidden of the decoder.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from herd.config import VisionConfig
from herd.kernels import apply_rope

_TILES = 4  # that are encoded at a time; bounds the memory of an image, which has up to 17


class SelfAttention(nn.Module):
    def __init__(self, cfg: VisionConfig) -> None:
        super().__init__()
        self.heads = cfg.num_attention_heads
        self.q_proj = nn.Linear(cfg.hidden_size, cfg.hidden_size)
        self.k_proj = nn.Linear(cfg.hidden_size, cfg.hidden_size)
        self.v_proj = nn.Linear(cfg.hidden_size, cfg.hidden_size)
        self.o_proj = nn.Linear(cfg.hidden_size, cfg.hidden_size)

    def forward(self, x_NPD: Tensor, angles_1Pf: Tensor) -> Tensor:
        q, k, v = (proj(x_NPD).unflatten(-1, (self.heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rope(q, angles_1Pf), apply_rope(k, angles_1Pf)
        out_NHPd = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.o_proj(out_NHPd.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, inputs: int, width: int, outputs: int, *, bias: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, width, bias=bias)
        self.fc2 = nn.Linear(width, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, cfg: VisionConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(cfg.hidden_size, cfg.norm_eps)
        self.self_attn = SelfAttention(cfg)
        self.post_attention_layernorm = nn.LayerNorm(cfg.hidden_size, cfg.norm_eps)
        self.mlp = MLP(cfg.hidden_size, cfg.intermediate_size, cfg.hidden_size, bias=True)

    def forward(self, x_NPD: Tensor, angles_1Pf: Tensor) -> Tensor:
        x_NPD = x_NPD + self.self_attn(self.input_layernorm(x_NPD), angles_1Pf)
        return x_NPD + self.mlp(self.post_attention_layernorm(x_NPD))


class Encoder(nn.Module):
    """Pixels to features that are not yet those of a decoder."""

    def __init__(self, cfg: VisionConfig) -> None:
        super().__init__()
        self.config, D = cfg, cfg.hidden_size
        patch = cfg.num_channels * cfg.patch_size**2
        self.patch_embedding = nn.ModuleDict({"linear": nn.Linear(patch, D, bias=False)})
        self.class_embedding = nn.Parameter(D**-0.5 * torch.randn(D))
        self.positional_embedding_vlm = nn.Parameter(D**-0.5 * torch.randn(cfg.grid**2 + 1, D))
        self.layernorm_pre = nn.LayerNorm(D, cfg.norm_eps)
        self.model = nn.ModuleDict({"layers": nn.ModuleList(Block(cfg) for _ in range(cfg.num_hidden_layers))})
        self.layernorm_post = nn.LayerNorm(D, cfg.norm_eps)
        adapter = MLP(D * cfg.shuffled, cfg.projector_input_dim, cfg.projector_output_dim, bias=False)
        self.vision_adapter = nn.ModuleDict({"mlp": adapter})

    def forward(self, tiles_NCYX: Tensor) -> Tensor:
        grid = (self.config.grid, self.config.patch_size)
        patches = tiles_NCYX.unflatten(3, grid).unflatten(2, grid).permute(0, 2, 4, 1, 3, 5)
        x_NPD = self.patch_embedding["linear"](patches.flatten(3).flatten(1, 2))
        x_NPD = torch.cat([x_NPD, self.class_embedding.expand(len(x_NPD), 1, -1)], 1) + self.positional_embedding_vlm
        x_NPD = self.layernorm_pre(x_NPD)
        angles_1Pf = grid_angles(self.config, x_NPD.device).unsqueeze(0)
        for block in cast(Sequence[Block], self.model["layers"]):
            x_NPD = block(x_NPD, angles_1Pf)
        x_NPD = self.layernorm_post(x_NPD)[:, :-1]
        # Twice: within the adapter's layers, and behind them.
        return F.gelu(self.vision_adapter["mlp"](pixel_shuffle(x_NPD, self.config)))


class Vision(nn.Module):
    """Encoder and projector for a decoder of `hidden_size`."""

    def __init__(self, cfg: VisionConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = cfg
        self.vision_model = Encoder(cfg)
        projector = nn.Linear(cfg.vision_output_dim, hidden_size, bias=False)
        self.multi_modal_projector = nn.ModuleDict({"linear_1": projector})

    def features(self, tiles_NCYX: Tensor) -> Tensor:
        """Rows [N * T, O] that take the places of the embeddings of N tiles' patches, tile by tile.

        tiles_NCYX: normalised pixels (`herd.media`), of any type and device.
        """
        like = self.vision_model.class_embedding
        parts = [self.vision_model(tiles.to(like)) for tiles in tiles_NCYX.split(_TILES)]
        return self.multi_modal_projector["linear_1"](torch.cat(parts)).flatten(0, 1)


def grid_angles(cfg: VisionConfig, device: torch.device | None = None) -> Tensor:
    """Rotary angles [P, f] in float32: half of the channel pairs turn with the column, half with the row, both
    counted from 1; the class token, which is last, does not turn (spec §4.3)."""
    pairs = cfg.hidden_size // cfg.num_attention_heads // 4
    frequencies = cfg.rope_theta ** (-torch.arange(pairs, dtype=torch.float64, device=device) / pairs)
    turns = torch.outer(torch.arange(1, cfg.grid + 1, dtype=torch.float64, device=device), frequencies)
    columns, rows = turns.repeat(cfg.grid, 1), turns.repeat_interleave(cfg.grid, 0)
    return F.pad(torch.cat([columns, rows], -1), (0, 0, 0, 1)).float()


def pixel_shuffle(x_NPD: Tensor, cfg: VisionConfig) -> Tensor:
    """Squares of neighbouring patches, row by row, become one token each: [N, T, D * shuffled] (spec §4.4)."""
    side = round(cfg.shuffled**0.5)
    squares = x_NPD.unflatten(1, (cfg.grid // side, side, cfg.grid // side, side)).transpose(2, 3)
    return squares.flatten(3).flatten(1, 2)
