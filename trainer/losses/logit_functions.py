"""The functions of rows of student logits that losses are made of, for `chunked`.

Legend: n rows of a chunk or block, V vocabulary, K kept ids of a row, A = K+1 atoms with the tail last.
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
        ids_n = self.ids_N[rows, None]

        def evaluate(logits_nV: Tensor, block: slice, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
            logp_nV = _divide(logits_nV, self.temperature).log_softmax(-1)
            value_n = logp_nV.gather(-1, ids_n[block])[:, 0]
            if not with_gradient:
                return value_n, None
            gradient_nV = logp_nV.exp_().neg_()
            gradient_nV.scatter_add_(-1, ids_n[block], torch.ones_like(value_n)[:, None])
            return value_n, _divide(gradient_nV, self.temperature)

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
        ids_n = self.ids_N[rows, None]
        digest_n, position_n = self.teacher.sequence_digest_N[rows], self.teacher.position_N[rows]

        def evaluate(logits_nV: Tensor, block: slice, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
            distribution_nV = teacher_distribution_logits(
                logits_nV, digest_n[block], position_n[block], self.distribution
            )
            return distribution_nV.log_softmax(-1).gather(-1, ids_n[block])[:, 0], None

        return evaluate


@dataclass(frozen=True)
class FullVocabulary:
    """A divergence over the whole vocabulary, of a teacher known by its hidden states."""

    teacher: HiddenRows
    distribution: TeacherDistribution
    divergence: ValueAndGradient

    def of_chunk(self, rows: slice) -> BlockFunction:
        """See `chunked.RowFunction`."""
        product_nV = self.teacher.unembedding.product(self.teacher.hidden_ND[rows])
        digest_n, position_n = self.teacher.sequence_digest_N[rows], self.teacher.position_N[rows]
        temperature = self.distribution.temperature_of_student

        def evaluate(logits_nV: Tensor, block: slice, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
            teacher_nV = self.teacher.unembedding.finish(product_nV[block])
            teacher_nV = teacher_distribution_logits(teacher_nV, digest_n[block], position_n[block], self.distribution)
            student_logp_nV = _divide(logits_nV, temperature).log_softmax(-1)
            value_n, gradient_nV = self.divergence(teacher_nV.log_softmax(-1), student_logp_nV, with_gradient)
            return value_n, None if gradient_nV is None else _divide(gradient_nV, temperature)

        return evaluate


@dataclass(frozen=True)
class KeptIdsAndTail:
    """A divergence over kept ids and a tail bucket, by autograd on [n, K+1], which is small."""

    teacher: BucketedRows
    distribution: TeacherDistribution
    divergence: Divergence
    vocabulary_size: int

    def of_chunk(self, rows: slice) -> BlockFunction:
        """See `chunked.RowFunction`."""
        teacher_logp_nA = teacher_bucketed_logp(self.teacher, self.vocabulary_size, self.distribution)[rows]
        ids_nK = self.teacher.kept_ids[rows]
        temperature = self.distribution.temperature_of_student

        def evaluate(logits_nV: Tensor, block: slice, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
            scaled_nV = _divide(logits_nV, temperature)
            padded_nK, safe_ids_nK = ids_nK[block] < 0, unpadded_ids(ids_nK[block])
            kept_nK = scaled_nV.gather(-1, safe_ids_nK).masked_fill(padded_nK, -math.inf)
            rest_nV, rest_n = _softmax_in_place(scaled_nV.scatter_(-1, safe_ids_nK, -math.inf))
            atoms_nA = torch.cat([kept_nK, rest_n[:, None]], dim=-1)
            student_logp_nA = atoms_nA.log_softmax(-1)
            if not with_gradient:
                return self.divergence(teacher_logp_nA[block], student_logp_nA), None
            value_n, slope_nA = value_and_slope(self.divergence, teacher_logp_nA[block], student_logp_nA)
            gradient_nA = slope_nA.addcmul_(student_logp_nA.exp(), slope_nA.sum(-1, keepdim=True), value=-1.0)
            # Within the tail the gradient is shared in proportion to the probabilities.
            gradient_nV = rest_nV.mul_(gradient_nA[:, -1:])
            gradient_nV.scatter_add_(-1, safe_ids_nK, gradient_nA[:, :-1].masked_fill(padded_nK, 0.0))
            return value_n, _divide(gradient_nV, temperature)

        return evaluate


def _divide(x: Tensor, temperature: float) -> Tensor:
    return x if temperature == 1.0 else x.div_(temperature)


def _softmax_in_place(logits_nV: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax, in the place of the logits, and log-sum-exp; zeros and -inf for a row that is all -inf."""
    largest_n1 = logits_nV.amax(-1, keepdim=True)
    largest_n1 = largest_n1.masked_fill(largest_n1 == -math.inf, 0.0)
    weight_nV = logits_nV.sub_(largest_n1).exp_()
    total_n1 = weight_nV.sum(-1, keepdim=True)
    return weight_nV.div_(total_n1.masked_fill(total_n1 == 0.0, 1.0)), (total_n1.log() + largest_n1)[:, 0]
