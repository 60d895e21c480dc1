"""Muon for the matrices inside layers, AdamW for everything else, and one schedule of learning rates for both.

Sources: Jordan et al., "Muon" (2024); Liu et al., "Muon is scalable for LLM training" (2025) for the scale with which
    both
can share a learning rate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic coefficients of the reference implementation
NUM_ITERATIONS = 5
RMS_SCALE = 0.2  # AdamW's usual update size, per unit of learning rate


@dataclass(frozen=True)
class Rates:
    """The learning rate: it warms up, holds, then falls in a straight line to zero over the last ``decay`` of the
    steps.
    """

    peak: float
    warmup_steps: int = 40
    decay: float = 0.8

    def at(self, step: int, num_steps: int) -> float:
        rising = min(1.0, (step + 1) / max(1, self.warmup_steps))
        falling = min(1.0, (num_steps - step) / max(1.0, self.decay * num_steps))
        return self.peak * rising * falling


class MuonAdamW:
    """Both optimizers over one module.

    Each worker orthogonalizes some of the matrices, and ``exchange`` joins the results.
    """

    def __init__(self, module: nn.Module, weight_decay: float, worker: int = 0, num_workers: int = 1) -> None:
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        is_matrix = {name for name, p in named if p.ndim == 2 and "embed_tokens" not in name}
        self.matrices = {name: p for name, p in named if name in is_matrix}
        self.worker, self.num_workers, self.weight_decay = worker, num_workers, weight_decay
        self.momentum = {name: torch.zeros_like(p) for name, p in self.matrices.items()}
        others = [p for name, p in named if name not in is_matrix]
        self.adamw = torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0)

    @torch.no_grad()
    def step(self, rate: float, exchange: Callable[[torch.Tensor], None]) -> None:
        for group in self.adamw.param_groups:
            group["lr"] = rate
        self.adamw.step()
        by_size: dict[torch.Size, list[str]] = {}
        for name, parameter in self.matrices.items():
            self.momentum[name].lerp_(self._gradient(name), 0.05)
            by_size.setdefault(parameter.shape, []).append(name)
        for names in by_size.values():
            self._step_alike(names, rate, exchange)

    def _step_alike(self, names: list[str], rate: float, exchange: Callable[[torch.Tensor], None]) -> None:
        """Update the matrices of one size together: as one batch, their products are fewer and larger."""
        updates = torch.stack([self._gradient(name).lerp(self.momentum[name], 0.95) for name in names])
        mine = torch.arange(self.worker, len(names), self.num_workers)
        share = torch.zeros_like(updates)
        if len(mine):
            share[mine] = orthogonalize(updates[mine])
        exchange(share)
        scale = RMS_SCALE * max(updates.shape[1:]) ** 0.5
        for name, update in zip(names, share, strict=True):
            self.matrices[name].mul_(1 - rate * self.weight_decay).add_(update, alpha=-rate * scale)

    def _gradient(self, name: str) -> torch.Tensor:
        gradient = self.matrices[name].grad
        assert gradient is not None
        return gradient

    def state_dict(self) -> dict[str, Any]:
        return {"momentum": self.momentum, "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state["momentum"].items():
            self.momentum[name].copy_(value)
        self.adamw.load_state_dict(state["adamw"])


def orthogonalize(x: torch.Tensor) -> torch.Tensor:
    """Roughly ``U V^T`` of each matrix in [matrices, rows, columns], by Newton-Schulz iteration."""
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:
        x = x.transpose(1, 2)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.transpose(1, 2) if is_tall else x
