"""The divergences of the released code of "On the generalization vs fidelity paradox in knowledge distillation".

Ramesh, Sengupta, Chakraborty, Findings of ACL 2025, arXiv 2505.15442. They differ from the definitions that the paper
prints by a small constant and by the weights of a mixture; `presets` has what else belongs to them.

p teacher, q student; shapes: the legend in docs/architecture.md.
"""

from __future__ import annotations

import math

from torch import Tensor

EPSILON = 1e-9
"""What the released code adds to probabilities."""


def released_forward_kl(teacher_logp_NA: Tensor, student_logp_NA: Tensor) -> Tensor:
    """Σ (p+ε)·(ln(p+ε) − ln q), [N]: the released "kld"."""
    # ε over the vocabulary adds 49,152 · 10⁻⁹ to the mass of p: the value is not 0 at p = q, and p is no distribution.
    teacher_NA = teacher_logp_NA.exp() + EPSILON
    return (teacher_NA * (teacher_NA.log() - student_logp_NA)).sum(-1)


def released_reverse_kl(teacher_logp_NA: Tensor, student_logp_NA: Tensor) -> Tensor:
    """Σ (q+ε)·(ln q − ln p), [N]: the released "reversekld"; slightly below 0 where p = q almost everywhere."""
    return ((student_logp_NA.exp() + EPSILON) * (student_logp_NA - teacher_logp_NA)).sum(-1)


def released_jsd(teacher_logp_NA: Tensor, student_logp_NA: Tensor, *, beta: float) -> Tensor:
    """β·KL(p‖m) + (1−β)·KL(q‖m) with m = β·q + (1−β)·p, [N], for 0 < β < 1: the released "gkd".

    The weights of the mixture are the other way round than in `divergences.generalized_jsd`; at β = ½ the two agree.
    """
    mixture_logp_NA = (student_logp_NA + math.log(beta)).logaddexp(teacher_logp_NA + math.log1p(-beta))
    teacher_kl_N = (teacher_logp_NA.exp() * (teacher_logp_NA - mixture_logp_NA)).sum(-1)
    student_kl_N = (student_logp_NA.exp() * (student_logp_NA - mixture_logp_NA)).sum(-1)
    return beta * teacher_kl_N + (1.0 - beta) * student_kl_N
