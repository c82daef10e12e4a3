"""What tells a person how near a student is to its teacher, one number per row, without gradients.

Shapes: the legend in docs/architecture.md; R rows of a block, A atoms (kept ids and the tail).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from tutelage.trainer.losses.chunked import BlockFunction, evaluate_rows
from tutelage.trainer.losses.closed_forms import row_dot
from tutelage.trainer.losses.divergences import entropy, forward_kl, generalized_jsd, reverse_kl
from tutelage.trainer.losses.logit_functions import TokenLogp
from tutelage.trainer.losses.losses import DEFAULT_CHUNK_ROWS, check_same_vocabulary
from tutelage.trainer.losses.tail_bucket import bucketed_logps
from tutelage.trainer.losses.teacher_distribution import TeacherDistribution, teacher_distribution_logits
from tutelage.trainer.teacher.rows import BucketedRows, HiddenRows, TeacherRows, Unembedding

SUPPORT_IDS = 64
"""Size of the student's support whose teacher mass is reported for `hidden` rows."""

_Measures = dict[str, Tensor]


def diagnostics(
    student_hidden_ND: Tensor,
    student_head: Unembedding,
    teacher: TeacherRows,
    *,
    distribution: TeacherDistribution,
    chunk_rows: int = DEFAULT_CHUNK_ROWS,
) -> dict[str, Tensor]:
    """Measures per row, each float32 [N], at the temperatures of `distribution`.

    `forward_kl`, `reverse_kl`, `jsd` (β = ½), in nats: with `topk` and `candidates` over kept ids and tail, so lower
    bounds. `teacher_entropy` likewise; `student_entropy` over the vocabulary. `top1_agreement`: 1 if both have the
    same likeliest id (with `candidates`: of the candidates). `tail_mass` and `student_tail_mass`: probability
    outside the support; for `hidden` rows the support is the student's likeliest `SUPPORT_IDS` ids, so that 1 −
    tail_mass is the share of the teacher's mass on the student's support, as it is for `candidates`.
    """
    measure: _OfFullVocabulary | _OfBuckets
    if isinstance(teacher, HiddenRows):
        check_same_vocabulary(student_head, teacher)
        measure = _OfFullVocabulary(teacher, distribution)
    else:
        measure = _OfBuckets(teacher, distribution)
    names: list[str] = []
    function = _Stacked(measure.of_chunk, names)
    with torch.no_grad():
        columns = evaluate_rows(student_hidden_ND, student_head, function, chunk_rows=chunk_rows)
    return {name: columns[:, column] for column, name in enumerate(names)}


def sampler_divergence(
    student_hidden_ND: Tensor,
    student_head: Unembedding,
    drawn_ids_N: Tensor,
    sampler_logp_N: Tensor,
    *,
    temperature: float,
    chunk_rows: int = DEFAULT_CHUNK_ROWS,
) -> Tensor:
    """How far the sampler was from the student: at each token that it drew an estimate of KL(sampler ‖ student), [N].

    r − 1 − ln r of r = p_student / p_sampler: never below 0, and in expectation the divergence (Schulman 2020,
    "Approximating KL divergence", k3). 0 but for rounding where the student's present weights drew the tokens.

    Args:
        student_hidden_ND: states of the rows.
        student_head: turns them into logits.
        drawn_ids_N: int64, the token that was drawn at each.
        sampler_logp_N: ln p with which it was drawn, nats.
        temperature: of the sampling.
        chunk_rows: rows whose logits are there at once.

    """
    with torch.no_grad():
        function = TokenLogp(drawn_ids_N, temperature)
        log_ratio_N = evaluate_rows(student_hidden_ND, student_head, function, chunk_rows=chunk_rows) - sampler_logp_N
        return log_ratio_N.expm1() - log_ratio_N


@dataclass(frozen=True)
class _Stacked:
    """Measures as the columns of one tensor."""

    measures_of_chunk: Callable[[slice], Callable[[Tensor, slice], _Measures]]
    names: list[str]

    def of_chunk(self, rows: slice) -> BlockFunction:
        measure = self.measures_of_chunk(rows)

        def evaluate(logits_RV: Tensor, block: slice, with_gradient: bool) -> tuple[Tensor, None]:
            measures = measure(logits_RV, block)
            self.names[:] = list(measures)
            return torch.stack([value_R.float() for value_R in measures.values()], dim=-1), None

        return evaluate


@dataclass(frozen=True)
class _OfFullVocabulary:
    teacher: HiddenRows
    distribution: TeacherDistribution

    def of_chunk(self, rows: slice) -> Callable[[Tensor, slice], _Measures]:
        head = self.teacher.unembedding
        product_RV = head.product(self.teacher.hidden_ND[rows])
        digest_R, position_R = self.teacher.sequence_digest_N[rows], self.teacher.position_N[rows]

        def measure(logits_RV: Tensor, block: slice) -> _Measures:
            raw_RV = head.finish(product_RV[block])
            teacher_RV = teacher_distribution_logits(
                raw_RV, digest_R[block], position_R[block], self.distribution
            ).log_softmax(-1)
            student_RV = (logits_RV / self.distribution.temperature_of_student).log_softmax(-1)
            support = student_RV.topk(min(SUPPORT_IDS, student_RV.shape[1]), dim=-1)
            compare = _with_zeros if self.distribution.truncates else _without_zeros
            return {
                **compare(teacher_RV, student_RV),
                "top1_agreement": teacher_RV.argmax(-1) == support.indices[:, 0],
                "tail_mass": 1.0 - teacher_RV.gather(-1, support.indices).exp().sum(-1),
                "student_tail_mass": 1.0 - support.values.exp().sum(-1),
            }

        return measure


@dataclass(frozen=True)
class _OfBuckets:
    teacher: BucketedRows
    distribution: TeacherDistribution

    def of_chunk(self, rows: slice) -> Callable[[Tensor, slice], _Measures]:
        teacher = self.teacher.at(rows)

        def measure(logits_RV: Tensor, block: slice) -> _Measures:
            rows = teacher.at(block)
            student_RV = (logits_RV / self.distribution.temperature_of_student).log_softmax(-1)
            teacher_RA, student_RA = bucketed_logps(rows, logits_RV, self.distribution)
            best_R = rows.kept_logits.masked_fill(rows.kept_ids < 0, -math.inf).argmax(-1, keepdim=True)
            return {
                **_with_zeros(teacher_RA, student_RA),
                "student_entropy": entropy(student_RV),
                "top1_agreement": rows.kept_ids.gather(-1, best_R)[:, 0] == student_RV.argmax(-1),
                "tail_mass": teacher_RA[:, -1].exp(),
                "student_tail_mass": student_RA[:, -1].exp(),
            }

        return measure


def _with_zeros(teacher_logp_RA: Tensor, student_logp_RA: Tensor) -> _Measures:
    return {
        "forward_kl": forward_kl(teacher_logp_RA, student_logp_RA),
        "reverse_kl": reverse_kl(teacher_logp_RA, student_logp_RA),
        "jsd": generalized_jsd(teacher_logp_RA, student_logp_RA, beta=0.5),
        "teacher_entropy": entropy(teacher_logp_RA),
        "student_entropy": entropy(student_logp_RA),
    }


def _without_zeros(teacher_logp_RV: Tensor, student_logp_RV: Tensor) -> _Measures:
    """The same where no probability is 0, in a third of the time for want of masks."""
    teacher_RV, student_RV = teacher_logp_RV.exp(), student_logp_RV.exp()
    log_ratio_RV = teacher_logp_RV - student_logp_RV
    forward_R, reverse_R = row_dot(teacher_RV, log_ratio_RV), -row_dot(student_RV, log_ratio_RV)
    # ln m/q = softplus(ln p/q) − ln 2.
    mixture_RV = softplus(log_ratio_RV)
    mixtures_R = row_dot(teacher_RV, mixture_RV) + row_dot(student_RV, mixture_RV)
    return {
        "forward_kl": forward_R,
        "reverse_kl": reverse_R,
        "jsd": 0.5 * (forward_R - mixtures_R) + math.log(2.0),
        "teacher_entropy": -row_dot(teacher_RV, teacher_logp_RV),
        "student_entropy": -row_dot(student_RV, student_logp_RV),
    }
