"""Closed forms of divergences and of their gradients at the student's scaled logits u, where q = softmax(u).

Any divergence D has ∂D/∂u = c − q·Σc with c = ∂D/∂ln q. The three that most runs use are written out in closed form,
in few passes over [R, V]; all others, and supports with atoms of probability 0, get c from autograd on the
definitions in `divergences`. Tests hold the two against each other.

p teacher, q student; shapes: the legend in docs/architecture.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import softplus

Divergence = Callable[[Tensor, Tensor], Tensor]
"""(teacher_logp [R, A], student_logp [R, A]) to [R]."""
ValueAndGradient = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]
"""(teacher_logp [R, V], student_logp [R, V], with_gradient) to values and gradients; may overwrite its inputs."""


def by_autograd(divergence: Divergence) -> ValueAndGradient:
    """Value and gradient of any divergence."""

    def evaluate(teacher_logp_RV: Tensor, student_logp_RV: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        if not with_gradient:
            return divergence(teacher_logp_RV, student_logp_RV), None
        value_R, slope_RV = value_and_slope(divergence, teacher_logp_RV, student_logp_RV)
        # ∂ ln q_v / ∂u_w = δ_vw − q_w.
        return value_R, slope_RV.addcmul_(student_logp_RV.exp(), slope_RV.sum(-1, keepdim=True), value=-1.0)

    return evaluate


def value_and_slope(divergence: Divergence, teacher_logp_RA: Tensor, student_logp_RA: Tensor) -> tuple[Tensor, Tensor]:
    """D [R] and c = ∂D/∂ln q [R, A], each ln q taken as free."""
    with torch.enable_grad():
        student_logp_RA = student_logp_RA.detach().requires_grad_()
        value_R = divergence(teacher_logp_RA, student_logp_RA)
        (slope_RA,) = torch.autograd.grad(value_R.sum(), student_logp_RA)
    return value_R.detach(), slope_RA


def forward_kl(teacher_logp_RV: Tensor, student_logp_RV: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """KL(p‖q); gradient q − p."""
    # Every operation on [R, V] costs a pass through the cache, so each result takes the memory of an operand.
    teacher_RV = teacher_logp_RV.exp()
    value_R = row_dot(teacher_RV, teacher_logp_RV.sub_(student_logp_RV))
    return value_R, student_logp_RV.exp_().sub_(teacher_RV) if with_gradient else None


def reverse_kl(teacher_logp_RV: Tensor, student_logp_RV: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """KL(q‖p); gradient q·(ln q − ln p − KL)."""
    student_RV = student_logp_RV.exp()
    ratio_RV = student_logp_RV.sub_(teacher_logp_RV)
    value_R = row_dot(student_RV, ratio_RV)
    return value_R, ratio_RV.sub_(value_R[:, None]).mul_(student_RV) if with_gradient else None


def generalized_jsd(beta: float, normalize_beta: bool) -> ValueAndGradient:
    """β·KL(p‖m) + (1−β)·KL(q‖m), 0 < β < 1; gradient (1−β)·q·(ln q/m − KL(q‖m))."""
    factor = 1.0 / (beta * (1.0 - beta)) if normalize_beta else 1.0
    log_odds, log_rest = math.log(beta) - math.log1p(-beta), math.log1p(-beta)

    def evaluate(teacher_logp_RV: Tensor, student_logp_RV: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        teacher_RV = teacher_logp_RV.exp()
        log_ratio_RV = teacher_logp_RV.sub_(student_logp_RV)
        # ln m/q = ln((1−β) + β·p/q) = ln(1−β) + softplus(ln p/q + ln β/(1−β)). Above a threshold torch's softplus(x) is
        # x, which is off by e⁻ˣ: with its default of 20 by 2·10⁻⁹, with 40 by less than float64 resolves.
        mixture_RV = softplus(log_ratio_RV + log_odds, threshold=40.0).add_(log_rest)
        teacher_kl_R = row_dot(teacher_RV, log_ratio_RV.sub_(mixture_RV))
        student_RV = student_logp_RV.exp_()
        student_kl_R = row_dot(student_RV, mixture_RV).neg_()
        value_R = (beta * teacher_kl_R + (1.0 - beta) * student_kl_R) * factor
        if not with_gradient:
            return value_R, None
        gradient_RV = mixture_RV.add_(student_kl_R[:, None]).mul_(student_RV).mul_(-(1.0 - beta) * factor)
        return value_R, gradient_RV

    return evaluate


def row_dot(a_RV: Tensor, b_RV: Tensor) -> Tensor:
    """Σ_v a·b, [R]."""
    # As a batch of matrix products, [1, V] · [V, 1], it took 7.7 ms on a CPU for 16 rows, instead of 0.5
    # (docs/training.md).
    return (a_RV * b_RV).sum(-1)
