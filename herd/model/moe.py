"""Feed-forward blocks: dense SwiGLU, and the top-k mixture of experts with a shared expert. Spec §1.3, §3.

Shape suffixes: N tokens, K experts per token, D hidden, E experts, F expert width.
"""

import torch
from torch import Tensor, nn

from herd.config import TextConfig
from herd.kernels import expert_mlp, swiglu


class DenseMLP(nn.Module):
    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Experts(nn.Module):
    """Weights of all routed experts, stored [in, out] as in the checkpoints (spec §3.2)."""

    def __init__(self, cfg: TextConfig) -> None:
        super().__init__()
        E, D, F = cfg.num_local_experts, cfg.hidden_size, cfg.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, D, 2 * F))
        self.down_proj = nn.Parameter(torch.empty(E, F, D))
        nn.init.normal_(self.gate_up_proj, std=cfg.initializer_range)
        nn.init.normal_(self.down_proj, std=cfg.initializer_range)

    def forward(self, x_ND: Tensor, expert_N: Tensor) -> Tensor:
        return expert_mlp(x_ND, expert_N, self.gate_up_proj, self.down_proj)


class MoE(nn.Module):
    def __init__(self, cfg: TextConfig) -> None:
        super().__init__()
        self.top_k = cfg.num_experts_per_tok
        self.router = nn.Linear(cfg.hidden_size, cfg.num_local_experts, bias=False)
        self.experts = Experts(cfg)
        self.shared_expert = DenseMLP(cfg.hidden_size, cfg.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        out_ND = self.experts(*self.route(x.flatten(0, -2)))
        out_ND = out_ND.unflatten(0, (-1, self.top_k)).sum(1)
        return self.shared_expert(x) + out_ND.view_as(x)

    def route(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs of experts, [N * K, D], and whose they are: those of a token stand together."""
        logits_NK, expert_NK = self.router(x_ND).topk(self.top_k, dim=-1)
        score_NK = torch.sigmoid(logits_NK.float()).to(x_ND.dtype)
        # The score multiplies the expert's input, not its output: through SwiGLU that is not the same (spec §3.1).
        return (score_NK.unsqueeze(-1) * x_ND.unsqueeze(1)).flatten(0, 1), expert_NK.flatten()
