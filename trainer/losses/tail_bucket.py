"""The supports over which teacher and student are compared: the whole vocabulary, or kept ids and a tail bucket.

The tail bucket is one atom with all the mass outside the kept ids. Merging atoms never raises a divergence (data
processing), so a divergence with a tail bucket is a lower bound of the full one, and it is 0 only if the kept
ids and the tail agree. Without the bucket it would be no divergence at all.

Shapes: the legend in docs/architecture.md; the tail is the last of A = K+1 atoms.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tutelage.trainer.losses.teacher_distribution import TeacherDistribution, counter_normal_at
from tutelage.trainer.teacher.rows import BucketedRows

# A log-sum-exp of magnitude 16 to 32 in float32 is known to about 16 machine epsilons, so a smaller tail mass than
# this many is rounding, and ln 0 would make a reverse KL infinite where the teacher is merely sure.
_TAIL_RESOLUTION_EPSILONS = 8.0


def bucketed_logps(
    teacher: BucketedRows, student_logits_NV: Tensor, distribution: TeacherDistribution
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of teacher and student, each [N, K+1], over the teacher rows' kept ids and the tail.

    Padded ids (-1) are atoms of probability 0 on both sides. Differentiable in the student's logits.
    """
    scaled_NV = student_logits_NV / distribution.temperature_of_student
    kept_NK, rest_N = split_kept(scaled_NV, teacher.kept_ids)
    atoms_NA = torch.cat([kept_NK, rest_N[:, None]], dim=-1)
    student_logp_NA = atoms_NA - atoms_NA.logsumexp(-1, keepdim=True)
    return teacher_bucketed_logp(teacher, scaled_NV.shape[1], distribution), student_logp_NA


def split_kept(logits_NV: Tensor, ids_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the kept ids [N, K] (-inf where padded) and log-sum-exp of all others [N] (-inf if there are none).

    The tail is summed up, not subtracted from 1, so it is exact however small it is.
    """
    safe_ids_NK = unpadded_ids(ids_NK)
    kept_NK = logits_NV.gather(-1, safe_ids_NK).masked_fill(ids_NK < 0, -math.inf)
    rest_NV = logits_NV.scatter(-1, safe_ids_NK, -math.inf)
    return kept_NK, rest_NV.logsumexp(-1)


def unpadded_ids(ids_NK: Tensor) -> Tensor:
    """The ids with each -1 replaced by its row's first id."""
    return torch.where(ids_NK < 0, ids_NK[:, :1], ids_NK)


def teacher_bucketed_logp(teacher: BucketedRows, vocabulary_size: int, distribution: TeacherDistribution) -> Tensor:
    """The teacher's log-probabilities [N, K+1] of its rows' kept ids and of the tail.

    With noise this is an approximation: kept ids get their own noise, but of the others only the mean effect on
    their mass, a factor exp(σ² / 2T²), is known.
    """
    padded_NK = teacher.kept_ids < 0
    scaled_NK = teacher.kept_logits / distribution.temperature
    kept_logp_NK = (scaled_NK - teacher.logsumexp_N[:, None]).masked_fill(padded_NK, -math.inf)
    # A row that keeps the whole vocabulary has no tail; rounding would give it one of the resolution's size.
    everything_N = (~padded_NK).sum(-1) == vocabulary_size
    tail_logp_N = tail_logp(kept_logp_NK).masked_fill(everything_N, -math.inf)
    logp_NA = torch.cat([kept_logp_NK, tail_logp_N[:, None]], dim=-1)
    if distribution.noise == 0.0:
        return logp_NA
    assert teacher.sequence_digest_N is not None
    assert teacher.position_N is not None
    normal_NK = counter_normal_at(
        distribution.noise_seed, teacher.sequence_digest_N, teacher.position_N, unpadded_ids(teacher.kept_ids)
    )
    sigma = distribution.noise / distribution.temperature
    # E[exp(σε/T)] = exp(σ²/2T²): what noise does to the mass of many ids that are not known one by one.
    noise_of_tail_N1 = torch.full_like(normal_NK[:, :1], sigma**2 / 2.0)
    return (logp_NA + torch.cat([normal_NK * sigma, noise_of_tail_N1], dim=-1)).log_softmax(-1)


def tail_logp(kept_logp_NK: Tensor) -> Tensor:
    """ln(1 − Σ exp(kept)), [N], in the dtype of its input, which must be float32 or float64.

    Not below what the dtype resolves in a normalised sum, and so finite even if rounding brings Σ above 1.
    """
    resolution = _TAIL_RESOLUTION_EPSILONS * torch.finfo(kept_logp_NK.dtype).eps
    return log1mexp(kept_logp_NK.logsumexp(-1).clamp(max=-resolution))


def log1mexp(x: Tensor) -> Tensor:
    """ln(1 − exp(x)) for x < 0, accurate at both ends.

    Mächler, "Accurately computing log(1 − exp(−|a|))", 2012, eq. 7.
    """
    # Each branch is clamped into its own range: `where` gives the other one's gradient 0, and 0 · inf is NaN.
    near_zero = x > -math.log(2.0)
    return torch.where(
        near_zero,
        (-torch.expm1(x.clamp(min=-1.0))).log(),
        torch.log1p(-x.clamp(max=-0.5).exp()),
    )
