"""Divergences between a teacher and a student over the same support, one value per row.

Inputs are normalised log-probabilities [N, A] over A atoms: the vocabulary, or kept ids and a tail bucket
(`tail_bucket`). All functions differentiate with autograd, treat the teacher as constant, are never clamped, and
take atoms of probability zero (-inf) by their limits: 0 · ln 0 = 0. A value is infinite only where the
definition is. They are written for reading; `losses` evaluates the same definitions on large vocabularies.

p teacher, q student; shapes: the legend in docs/architecture.md.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def forward_kl(teacher_logp_NA: Tensor, student_logp_NA: Tensor) -> Tensor:
    """KL(p‖q) = Σ p·(ln p − ln q), [N], in [0, ∞].

    Word-level distillation: Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", 2015,
    arXiv 1503.02531.
    """
    return _mean_log_ratio(teacher_logp_NA, student_logp_NA)


def reverse_kl(teacher_logp_NA: Tensor, student_logp_NA: Tensor) -> Tensor:
    """KL(q‖p) = Σ q·(ln q − ln p), [N], in [0, ∞].

    Gu, Dong, Wei, Huang, "MiniLLM: knowledge distillation of large language models", ICLR 2024, arXiv
    2306.08543; here per token, without the policy gradient over sequences.
    """
    return _mean_log_ratio(student_logp_NA, teacher_logp_NA)


def generalized_jsd(
    teacher_logp_NA: Tensor, student_logp_NA: Tensor, *, beta: float, normalize_beta: bool = False
) -> Tensor:
    """β·KL(p‖m) + (1−β)·KL(q‖m) with m = β·p + (1−β)·q, [N], in [0, ln 2].

    Agarwal et al., "On-policy distillation of language models", ICLR 2024, arXiv 2306.13649, eq. 1. Its
    value goes to 0 with β → 0 and β → 1, in proportion to KL(p‖q) and KL(q‖p); β = 0 and β = 1 mean those
    divergences themselves, a jump in scale by 1/β near 0. With `normalize_beta` it is divided by β(1−β), which
    makes it continuous in β; the bound is then ln 2 / (β(1−β)).
    """
    if beta == 0.0:
        return forward_kl(teacher_logp_NA, student_logp_NA)
    if beta == 1.0:
        return reverse_kl(teacher_logp_NA, student_logp_NA)
    mixture_logp_NA = log_mixture(teacher_logp_NA, student_logp_NA, beta)
    # TRL (`GKDTrainer.generalized_jsd_loss`) and the paper name the mixture's weight the same way; the released code of
    # the study turns it round (`released_code`).
    jsd_N = beta * _mean_log_ratio(teacher_logp_NA, mixture_logp_NA)
    jsd_N = jsd_N + (1.0 - beta) * _mean_log_ratio(student_logp_NA, mixture_logp_NA)
    return jsd_N / (beta * (1.0 - beta)) if normalize_beta else jsd_N


def skew_kl(teacher_logp_NA: Tensor, student_logp_NA: Tensor, *, alpha: float) -> Tensor:
    """KL(p ‖ α·p + (1−α)·q), [N], in [0, −ln α].

    Ko, Kim, Chen, Yun, "DistiLLM: towards streamlined distillation for large language models", ICML 2024,
    arXiv 2402.03898, section 3.1. α = 0 is the forward KL.
    """
    return _mean_log_ratio(teacher_logp_NA, log_mixture(teacher_logp_NA, student_logp_NA, alpha))


def skew_reverse_kl(teacher_logp_NA: Tensor, student_logp_NA: Tensor, *, alpha: float) -> Tensor:
    """KL(q ‖ (1−α)·p + α·q), [N], in [0, −ln α]; as `skew_kl`, α = 0 is the reverse KL."""
    return _mean_log_ratio(student_logp_NA, log_mixture(student_logp_NA, teacher_logp_NA, alpha))


def total_variation(teacher_logp_NA: Tensor, student_logp_NA: Tensor) -> Tensor:
    """½ Σ |p − q|, [N], in [0, 1].

    Wen, Li, Du, Mou, "f-divergence minimization for sequence-level knowledge distillation", ACL 2023, arXiv
    2307.15190.
    """
    # |p − q| has no derivative where p = q; torch takes 0 there, a subgradient.
    return 0.5 * (teacher_logp_NA.exp() - student_logp_NA.exp()).abs().sum(-1)


def adaptive_kl(teacher_logp_NA: Tensor, student_logp_NA: Tensor, *, head_mass: float) -> Tensor:
    """w·KL(p‖q) + (1−w)·KL(q‖p), [N], in [0, ∞].

    Head: the likeliest atoms of the teacher up to the mass `head_mass`, at least one. w is the share of Σ |p − q|
    that lies in the head, without a gradient; ½ where p = q.
    Wu, Tao, Wang, Yang, Zhao, Wong, "Rethinking Kullback-Leibler divergence in knowledge distillation for large
    language models", COLING 2025, arXiv 2404.02657.
    """
    weight_N = _head_share_of_gap(teacher_logp_NA, student_logp_NA.detach(), head_mass)
    forward_N = forward_kl(teacher_logp_NA, student_logp_NA)
    return weight_N * forward_N + (1.0 - weight_N) * reverse_kl(teacher_logp_NA, student_logp_NA)


def entropy(logp_NA: Tensor) -> Tensor:
    """−Σ p·ln p, [N] in nats."""
    return -(logp_NA.exp() * logp_NA.masked_fill(logp_NA == -math.inf, 0.0)).sum(-1)


def log_mixture(first_logp_NA: Tensor, second_logp_NA: Tensor, first_weight: float) -> Tensor:
    """ln(w·exp(first) + (1−w)·exp(second)), [N, A], for w in [0, 1)."""
    if first_weight == 0.0:
        return second_logp_NA
    # Where both are -inf, the backward pass of logaddexp divides 0 by 0: NaN, which no later mask takes away.
    empty_NA = (first_logp_NA == -math.inf) & (second_logp_NA == -math.inf)
    first_NA = first_logp_NA.masked_fill(empty_NA, 0.0) + math.log(first_weight)
    second_NA = second_logp_NA.masked_fill(empty_NA, 0.0) + math.log1p(-first_weight)
    return torch.logaddexp(first_NA, second_NA).masked_fill(empty_NA, -math.inf)


def _mean_log_ratio(weight_logp_NA: Tensor, other_logp_NA: Tensor) -> Tensor:
    """Σ w·(ln w − ln other); atoms of weight 0 add nothing, to the value or to the gradient."""
    weight_NA = weight_logp_NA.exp()
    # Masked before the product: 0 · inf would be NaN backward, even if it were masked later.
    ratio_NA = (weight_logp_NA - other_logp_NA).masked_fill(weight_NA == 0.0, 0.0)
    return (weight_NA * ratio_NA).sum(-1)


def _head_share_of_gap(teacher_logp_NA: Tensor, student_logp_NA: Tensor, head_mass: float) -> Tensor:
    sorted_logp_NA, order_NA = teacher_logp_NA.sort(dim=-1, descending=True, stable=True)
    teacher_NA = sorted_logp_NA.exp()
    gap_NA = (teacher_NA - student_logp_NA.exp().gather(-1, order_NA)).abs()
    in_head_NA = teacher_NA.cumsum(-1) <= head_mass
    # A sure teacher's likeliest id alone may be above `head_mass`, and the head would be empty.
    in_head_NA[:, 0] = True
    total_N = gap_NA.sum(-1)
    share_N = (gap_NA * in_head_NA).sum(-1) / total_N
    return torch.where(total_N > 0.0, share_N, 0.5)
