"""What steps a student's weights: AdamW and the learning rate of each step."""

from __future__ import annotations

import torch
from torch import Tensor

from tutelage.trainer.config.student import OptimizerConfig

_RESOLUTION = 1000
"""Steps that a schedule by tokens is divided into."""


def adamw(masters: dict[str, Tensor], settings: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov, Hutter 2019, arXiv 1711.05101) over float32 weights by name; only matrices decay."""
    # Norms and biases are not decayed, as is usual since GPT-2; `fused` steps all tensors in one kernel.
    groups = [
        {"params": [tensor for tensor in masters.values() if tensor.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [tensor for tensor in masters.values() if tensor.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, fused=True)


def learning_rate_at(step: int, steps: int, settings: OptimizerConfig, share: float | None = None) -> float:
    """The rate of step `step` (0, 1, …) of `steps`: linear warm-up, then the schedule.

    Of a training that ends by tokens, `share` of them are spent, 0 … 1: what the schedule falls by after the warm-up.

    The first step after a warm-up of w steps is at the peak; `linear` and `cosine` would reach 0 one
    step after the last.
    """
    from transformers import get_scheduler

    if share is not None and step >= settings.warmup_steps:
        # A schedule of a thousand steps without a warm-up, at that share of it.
        settings, step, steps = settings.model_copy(update={"warmup_steps": 0}), round(share * _RESOLUTION), _RESOLUTION

    # transformers counts from a rate of 0, with which the first step would do nothing: ours is its schedule from its
    # second step on, with as many steps of warm-up and of training as are left over then.
    schedule = get_scheduler(
        settings.lr_scheduler_type,
        torch.optim.SGD([torch.zeros(1)], lr=settings.learning_rate),
        num_warmup_steps=settings.warmup_steps + 1,
        num_training_steps=steps + 1,
    )
    # Its factors are functions of the step alone, so a resumed training needs no state of a scheduler.
    return settings.learning_rate * float(schedule.lr_lambdas[0](step + 1))
