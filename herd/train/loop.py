"""The one training loop: float32 masters of bfloat16 weights, AdamW, checkpoints that resume bit by bit."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from herd.train.recipe import Phase

Step = Callable[[int], dict[str, Tensor]]  # step number → terms of the loss and figures to note


class Loop:
    """Trains `parameters` (name → weight used in compute) through one phase of a recipe, in a folder of its own.

    every: steps between checkpoints. keep: called with the masters after every step, to hold them to a constraint.
    """

    def __init__(
        self,
        phase: Phase,
        parameters: dict[str, torch.nn.Parameter],
        folder: Path,
        *,
        every: int = 50,
        keep: Callable[[dict[str, Tensor]], None] | None = None,
    ) -> None:
        self.phase, self.parameters, self.folder = phase, parameters, folder
        self.every, self.keep = every, keep
        folder.mkdir(exist_ok=True)
        self.masters = {name: p.detach().float().clone() for name, p in parameters.items()}
        o = phase
        low_rank = [m for name, m in self.masters.items() if "lora_" in name]
        grown = [m for name, m in self.masters.items() if "lora_" not in name]
        groups = [{"params": grown, "peak": o.lr}, {"params": low_rank, "peak": o.lora_lr}]
        self.optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=o.lr, betas=(0.9, 0.98), weight_decay=o.weight_decay
        )
        self.step = 0

    def train(self, losses: Step, weights: dict[str, float], progress: Callable[[int, dict[str, float]], None]) -> None:
        """Run to the last step of the phase. `weights` says which terms are the loss; the others are only noted."""
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        while self.step < self.phase.steps:
            began = time.perf_counter()
            terms = losses(self.step)
            torch.stack([terms[name] * weight for name, weight in weights.items() if name in terms]).sum().backward()
            norm = self._update()
            self.step += 1
            figures = {name: float(term.detach()) for name, term in terms.items()}
            figures |= {"norm": norm, "seconds": time.perf_counter() - began}
            with (self.folder / "metrics.jsonl").open("a") as log:
                log.write(json.dumps({"step": self.step, **{k: round(v, 5) for k, v in figures.items()}}) + "\n")
            if self.step % self.every == 0 or self.step == self.phase.steps:
                self.save()
            progress(self.step, figures)
        for parameter in self.parameters.values():
            parameter.requires_grad_(False)

    def _update(self) -> float:
        o = self.phase
        for name, parameter in self.parameters.items():
            self.masters[name].grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        with_grad = [m for m in self.masters.values() if m.grad is not None]
        norm = float(torch.nn.utils.clip_grad_norm_(with_grad, o.clip))
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient is {norm} at step {self.step}; lower the learning rate")
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(self.step, o.steps, o.warmup, o.decay)
        self.optimizer.step()
        if self.keep is not None:
            self.keep(self.masters)
        self._publish()
        return norm

    @torch.no_grad()
    def _publish(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(self.masters[name])

    def save(self) -> None:
        """Write the checkpoint; the previous one stays valid until this one is whole."""
        temporary = self.folder / "checkpoint.tmp"
        torch.save({"step": self.step, "masters": self.masters, "optimizer": self.optimizer.state_dict()}, temporary)
        temporary.replace(self.folder / "checkpoint.pt")

    def resume(self) -> bool:
        """Go on from the run's checkpoint; False if there is none. Drops metrics of steps that were lost."""
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return False
        saved: dict[str, Any] = torch.load(path, weights_only=True)
        self.step = saved["step"]
        for name, master in self.masters.items():
            master.copy_(saved["masters"][name])
        self.optimizer.load_state_dict(saved["optimizer"])
        self._publish()
        log = self.folder / "metrics.jsonl"
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        whole = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= self.step]
        log.write_text("".join(whole))
        return True


def schedule(step: int, steps: int, warmup: int, decay: float) -> float:
    """Share of the peak rate: linear warm-up, constant, linear to zero over the last `decay` of the steps."""
    return min(1.0, (step + 1) / max(1, warmup), (steps - step) / max(1.0, decay * steps))
