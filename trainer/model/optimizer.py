"""What steps a student's weights: AdamW and the learning rate of each step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tutelage.trainer.config.student import OptimizerConfig


def adamw(masters: dict[str, Tensor], settings: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov, Hutter 2019, arXiv 1711.05101) over float32 weights by name; only matrices decay."""
    groups = [
        {"params": [tensor for tensor in masters.values() if tensor.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [tensor for tensor in masters.values() if tensor.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, fused=True)


def learning_rate_at(step: int, steps: int, settings: OptimizerConfig) -> float:
    """The rate of step `step` (0, 1, …) of `steps`: linear warm-up, then the schedule.

    The first step after a warm-up of w steps is at the peak; `linear` and `cosine` would reach 0 one
    step after the last.
    """
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / (settings.warmup_steps + 1)
    progress = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    match settings.schedule:
        case "constant":
            return settings.learning_rate
        case "linear":
            return settings.learning_rate * (1.0 - progress)
        case "cosine":
            return settings.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))
