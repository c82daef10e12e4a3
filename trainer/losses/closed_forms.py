"""Values and gradients at the student's scaled logits u, where q = softmax(u), of whole rows of the vocabulary.

Any divergence D has ∂D/∂u = c − q·Σc with c = ∂D/∂ln q. The three that most runs use are written out in closed form,
in few passes over [n, V]; all others, and supports with atoms of probability 0, get c from autograd on the
definitions in `divergences`. Tests hold the two against each other.

Legend: n rows of a block, V vocabulary, p teacher, q student.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import softplus

Divergence = Callable[[Tensor, Tensor], Tensor]
"""(teacher_logp [n, A], student_logp [n, A]) to [n]."""
ValueAndGradient = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]
"""(teacher_logp [n, V], student_logp [n, V], with_gradient) to values and gradients; may overwrite its inputs."""


def by_autograd(divergence: Divergence) -> ValueAndGradient:
    """Value and gradient of any divergence."""

    def evaluate(teacher_logp_nV: Tensor, student_logp_nV: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        if not with_gradient:
            return divergence(teacher_logp_nV, student_logp_nV), None
        value_n, slope_nV = value_and_slope(divergence, teacher_logp_nV, student_logp_nV)
        return value_n, slope_nV.addcmul_(student_logp_nV.exp(), slope_nV.sum(-1, keepdim=True), value=-1.0)

    return evaluate


def value_and_slope(divergence: Divergence, teacher_logp_nA: Tensor, student_logp_nA: Tensor) -> tuple[Tensor, Tensor]:
    """D [n] and c = ∂D/∂ln q [n, A], each ln q taken as free."""
    with torch.enable_grad():
        student_logp_nA = student_logp_nA.detach().requires_grad_()
        value_n = divergence(teacher_logp_nA, student_logp_nA)
        (slope_nA,) = torch.autograd.grad(value_n.sum(), student_logp_nA)
    return value_n.detach(), slope_nA


def forward_kl(teacher_logp_nV: Tensor, student_logp_nV: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """KL(p‖q); gradient q − p."""
    teacher_nV = teacher_logp_nV.exp()
    value_n = row_dot(teacher_nV, teacher_logp_nV.sub_(student_logp_nV))
    return value_n, student_logp_nV.exp_().sub_(teacher_nV) if with_gradient else None


def reverse_kl(teacher_logp_nV: Tensor, student_logp_nV: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """KL(q‖p); gradient q·(ln q − ln p − KL)."""
    student_nV = student_logp_nV.exp()
    ratio_nV = student_logp_nV.sub_(teacher_logp_nV)
    value_n = row_dot(student_nV, ratio_nV)
    return value_n, ratio_nV.sub_(value_n[:, None]).mul_(student_nV) if with_gradient else None


def generalized_jsd(beta: float, normalize_beta: bool) -> ValueAndGradient:
    """β·KL(p‖m) + (1−β)·KL(q‖m), 0 < β < 1; gradient (1−β)·q·(ln q/m − KL(q‖m))."""
    factor = 1.0 / (beta * (1.0 - beta)) if normalize_beta else 1.0
    log_odds, log_rest = math.log(beta) - math.log1p(-beta), math.log1p(-beta)

    def evaluate(teacher_logp_nV: Tensor, student_logp_nV: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        teacher_nV = teacher_logp_nV.exp()
        log_ratio_nV = teacher_logp_nV.sub_(student_logp_nV)
        # ln m/q = ln((1−β) + β·p/q); exact to float64's resolution above the threshold.
        mixture_nV = softplus(log_ratio_nV + log_odds, threshold=40.0).add_(log_rest)
        teacher_kl_n = row_dot(teacher_nV, log_ratio_nV.sub_(mixture_nV))
        student_nV = student_logp_nV.exp_()
        student_kl_n = row_dot(student_nV, mixture_nV).neg_()
        value_n = (beta * teacher_kl_n + (1.0 - beta) * student_kl_n) * factor
        if not with_gradient:
            return value_n, None
        gradient_nV = mixture_nV.add_(student_kl_n[:, None]).mul_(student_nV).mul_(-(1.0 - beta) * factor)
        return value_n, gradient_nV

    return evaluate


def row_dot(a_nV: Tensor, b_nV: Tensor) -> Tensor:
    """Σ_v a·b, [n]; a batch of matrix products takes fifteen times as long for it, on a CPU."""
    return (a_nV * b_nV).sum(-1)
