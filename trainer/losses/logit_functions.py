"""What losses are made of: functions of blocks of student logits (`chunked.RowFunction`), with their gradients.

Shapes: the legend in docs/architecture.md; R rows of a chunk or block, A = K+1 atoms with the tail last.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tutelage.trainer.losses.chunked import BlockFunction
from tutelage.trainer.losses.closed_forms import Divergence, ValueAndGradient, value_and_slope
from tutelage.trainer.losses.tail_bucket import teacher_bucketed_logp, unpadded_ids
from tutelage.trainer.losses.teacher_distribution import TeacherDistribution, teacher_distribution_logits
from tutelage.trainer.teacher.rows import BucketedRows, HiddenRows


@dataclass(frozen=True)
class TokenLogp:
    """The student's log-probability of one id per row."""

    ids_N: Tensor
    """int64 [N]."""
    temperature: float
    """The student's."""

    def of_chunk(self, rows: slice) -> BlockFunction:
        """See `chunked.RowFunction`."""
        ids_R = self.ids_N[rows, None]

        def evaluate(logits_RV: Tensor, block: slice, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
            logp_RV = _divide(logits_RV, self.temperature).log_softmax(-1)
            value_R = logp_RV.gather(-1, ids_R[block])[:, 0]
            if not with_gradient:
                return value_R, None
            # ∂ ln q(y) / ∂u = 1[y] − q.
            gradient_RV = logp_RV.exp_().neg_()
            gradient_RV.scatter_add_(-1, ids_R[block], torch.ones_like(value_R)[:, None])
            return value_R, _divide(gradient_RV, self.temperature)

        return evaluate


@dataclass(frozen=True)
class TeacherTokenLogp:
    """Log-probability of one id per row under the teacher distribution, from the teacher's raw logits; no gradient."""

    ids_N: Tensor
    """int64 [N]."""
    teacher: HiddenRows
    distribution: TeacherDistribution

    def of_chunk(self, rows: slice) -> BlockFunction:
        """See `chunked.RowFunction`."""
        ids_R = self.ids_N[rows, None]
        digest_R, position_R = self.teacher.sequence_digest_N[rows], self.teacher.position_N[rows]

        def evaluate(logits_RV: Tensor, block: slice, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
            distribution_RV = teacher_distribution_logits(
                logits_RV, digest_R[block], position_R[block], self.distribution
            )
            return distribution_RV.log_softmax(-1).gather(-1, ids_R[block])[:, 0], None

        return evaluate


@dataclass(frozen=True)
class FullVocabulary:
    """A divergence over the whole vocabulary, of a teacher known by its hidden states."""

    teacher: HiddenRows
    distribution: TeacherDistribution
    divergence: ValueAndGradient

    def of_chunk(self, rows: slice) -> BlockFunction:
        """See `chunked.RowFunction`."""
        # One large product a chunk is faster than one a block; what follows it is done block by block, in the cache.
        product_RV = self.teacher.unembedding.product(self.teacher.hidden_ND[rows])
        digest_R, position_R = self.teacher.sequence_digest_N[rows], self.teacher.position_N[rows]
        temperature = self.distribution.temperature_of_student

        def evaluate(logits_RV: Tensor, block: slice, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
            teacher_RV = self.teacher.unembedding.finish(product_RV[block])
            teacher_RV = teacher_distribution_logits(teacher_RV, digest_R[block], position_R[block], self.distribution)
            student_logp_RV = _divide(logits_RV, temperature).log_softmax(-1)
            value_R, gradient_RV = self.divergence(teacher_RV.log_softmax(-1), student_logp_RV, with_gradient)
            return value_R, None if gradient_RV is None else _divide(gradient_RV, temperature)

        return evaluate


@dataclass(frozen=True)
class KeptIdsAndTail:
    """A divergence over kept ids and a tail bucket, by autograd on [R, K+1], which is small."""

    teacher: BucketedRows
    distribution: TeacherDistribution
    divergence: Divergence
    vocabulary_size: int

    def of_chunk(self, rows: slice) -> BlockFunction:
        """See `chunked.RowFunction`."""
        teacher_logp_RA = teacher_bucketed_logp(self.teacher, self.vocabulary_size, self.distribution)[rows]
        ids_RK = self.teacher.kept_ids[rows]
        temperature = self.distribution.temperature_of_student

        def evaluate(logits_RV: Tensor, block: slice, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
            scaled_RV = _divide(logits_RV, temperature)
            padded_RK, safe_ids_RK = ids_RK[block] < 0, unpadded_ids(ids_RK[block])
            kept_RK = scaled_RV.gather(-1, safe_ids_RK).masked_fill(padded_RK, -math.inf)
            # The tail is summed up over its ids, not 1 − Σ kept, which would be rounding where the tail is small.
            rest_RV, rest_R = _softmax_in_place(scaled_RV.scatter_(-1, safe_ids_RK, -math.inf))
            atoms_RA = torch.cat([kept_RK, rest_R[:, None]], dim=-1)
            student_logp_RA = atoms_RA.log_softmax(-1)
            if not with_gradient:
                return self.divergence(teacher_logp_RA[block], student_logp_RA), None
            value_R, slope_RA = value_and_slope(self.divergence, teacher_logp_RA[block], student_logp_RA)
            gradient_RA = slope_RA.addcmul_(student_logp_RA.exp(), slope_RA.sum(-1, keepdim=True), value=-1.0)
            # Within the tail the gradient is shared in proportion to the probabilities.
            gradient_RV = rest_RV.mul_(gradient_RA[:, -1:])
            gradient_RV.scatter_add_(-1, safe_ids_RK, gradient_RA[:, :-1].masked_fill(padded_RK, 0.0))
            return value_R, _divide(gradient_RV, temperature)

        return evaluate


def _divide(x: Tensor, temperature: float) -> Tensor:
    return x if temperature == 1.0 else x.div_(temperature)


def _softmax_in_place(logits_RV: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax, in the place of the logits, and log-sum-exp; zeros and -inf for a row that is all -inf."""
    largest_R1 = logits_RV.amax(-1, keepdim=True)
    # A row whose every id is kept is -inf throughout, and -inf − (-inf) would be NaN.
    largest_R1 = largest_R1.masked_fill(largest_R1 == -math.inf, 0.0)
    weight_RV = logits_RV.sub_(largest_R1).exp_()
    total_R1 = weight_RV.sum(-1, keepdim=True)
    return weight_RV.div_(total_R1.masked_fill(total_R1 == 0.0, 1.0)), (total_R1.log() + largest_R1)[:, 0]
