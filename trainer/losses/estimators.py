"""Losses from the sampled token alone, each named for the divergence whose gradient it has in expectation.

For tokens that the student sampled (with its present weights, at its distillation temperature), r = ln q − ln p
at the token. Schulman's k1 = r estimates KL(q‖p) without bias, but as a loss its expected gradient is 0: it is
not offered. p teacher, q student; shapes: the legend in docs/architecture.md.

Schulman, "Approximating KL divergence", 2020; Tang and Munos, "On a few pitfalls in KL divergence gradient
estimation for RL", 2025, arXiv 2506.09477.
"""

from __future__ import annotations

from torch import Tensor


def policy_gradient(student_logp_N: Tensor, teacher_logp_N: Tensor) -> Tensor:
    """−q/sg(q)·reward with the reward ln p − ln q held constant: the gradient of KL(q‖p), [N].

    The on-policy distillation of Lu et al., Thinking Machines Lab, 2025.
    """
    reward_N = teacher_logp_N - student_logp_N.detach()
    # exp(ln q − ln q) is 1 in value and q's log-derivative in gradient: REINFORCE without a separate code path.
    return -(student_logp_N - student_logp_N.detach()).exp() * reward_N


def k2_reverse_kl(student_logp_N: Tensor, teacher_logp_N: Tensor) -> Tensor:
    """½·r²: the gradient of KL(q‖p), [N], in [0, ∞]; its value estimates KL(q‖p) with a bias."""
    return 0.5 * (student_logp_N - teacher_logp_N).square()


def k3_forward_kl(student_logp_N: Tensor, teacher_logp_N: Tensor) -> Tensor:
    """exp(−r) − 1 + r: the gradient of KL(p‖q), [N], in [0, ∞]; its value estimates KL(q‖p) without bias."""
    ratio_N = teacher_logp_N - student_logp_N
    # expm1: near p = q both terms are about −r, and exp(−r) − 1 would leave rounding alone.
    return ratio_N.expm1() - ratio_N


def constant_advantage(student_logp_N: Tensor, teacher_logp_N: Tensor) -> Tensor:
    """q/sg(q) = 1, [N]: `policy_gradient` whose reward is −1 whatever the teacher says; its expected gradient is 0.

    A control: what it brings came from the sampling, the optimizer and the number of steps, and not from a teacher.
    """
    return (student_logp_N - student_logp_N.detach()).exp() + 0.0 * teacher_logp_N


def importance_weights(student_logp_N: Tensor, sampler_logp_N: Tensor) -> Tensor:
    """q/μ of the sampled tokens, [N], without a gradient: what makes an expectation over μ one over q.

    μ is what the sampler drew from: another temperature, older weights, another engine's rounding. It must be above 0
    wherever q is; that is why samples may not be cut off.
    """
    return (student_logp_N.detach() - sampler_logp_N).exp()
