"""Small teachers and students in float64 and float32, and the plain form of what `token_divergence` does in chunks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tutelage.trainer.losses.losses import divergence_named
from tutelage.trainer.losses.registry import OBJECTIVES, resolve_parameters
from tutelage.trainer.losses.tail_bucket import bucketed_logps
from tutelage.trainer.losses.teacher_distribution import TeacherDistribution, teacher_distribution_logits
from tutelage.trainer.teacher.rows import (
    CandidateRows,
    HiddenRows,
    TeacherRows,
    TopKRows,
    Unembedding,
    accurate_dtype,
)

DIVERGENCES = [name for name, row in OBJECTIVES.items() if row.needs_teacher and not row.sampled_token]


@dataclass(frozen=True)
class Case:
    """A student and a teacher on the same rows."""

    hidden_ND: Tensor
    head: Unembedding
    teacher: HiddenRows

    @property
    def student_logits(self) -> Tensor:
        return self.head.logits(self.hidden_ND)

    @property
    def teacher_logits(self) -> Tensor:
        return self.teacher.unembedding.logits(self.teacher.hidden_ND)

    def topk(self, k: int, temperature: float = 1.0) -> TopKRows:
        logits_NV = self.teacher_logits
        largest = logits_NV.topk(k, dim=-1)
        return TopKRows(
            largest.indices,
            largest.values,
            (logits_NV / temperature).logsumexp(-1),
            sequence_digest_N=self.teacher.sequence_digest_N,
            position_N=self.teacher.position_N,
        )

    def candidates(self, k: int, temperature: float = 1.0, padded: int = 0) -> CandidateRows:
        """The student's k likeliest ids, the last `padded` of every second row missing."""
        logits_NV = self.teacher_logits
        ids_NC = self.student_logits.topk(k, dim=-1).indices
        chosen_NC = logits_NV.gather(-1, ids_NC)
        if padded:
            ids_NC[::2, -padded:] = -1
            chosen_NC[::2, -padded:] = -torch.inf
        return CandidateRows(
            ids_NC,
            chosen_NC,
            (logits_NV / temperature).logsumexp(-1),
            sequence_digest_N=self.teacher.sequence_digest_N,
            position_N=self.teacher.position_N,
        )

    def rows(self, kind: str, k: int = 5, temperature: float = 1.0) -> TeacherRows:
        if kind == "hidden":
            return self.teacher
        return self.topk(k, temperature) if kind == "topk" else self.candidates(k, temperature, padded=2)


def make_case(
    rows: int = 7, vocabulary: int = 23, width: int = 5, *, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Case:
    """Logits with a standard deviation of about 2."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    head = Unembedding(normal(vocabulary, width))
    teacher = HiddenRows(
        normal(rows, width + 1),
        torch.randint(-(2**62), 2**62, (rows,), generator=generator),
        torch.arange(rows),
        Unembedding(normal(vocabulary, width + 1)),
    )
    return Case(normal(rows, width), head, teacher)


def plain_divergence(
    hidden_ND: Tensor,
    head: Unembedding,
    teacher: TeacherRows,
    *,
    objective: str,
    parameters: dict | None = None,
    distribution: TeacherDistribution,
) -> Tensor:
    """All logits at once, everything by autograd."""
    logits_NV = plain_logits(hidden_ND, head).to(accurate_dtype(hidden_ND.dtype))
    divergence = divergence_named(objective, resolve_parameters(objective, parameters or {}))
    if isinstance(teacher, HiddenRows):
        raw_NV = teacher.unembedding.logits(teacher.hidden_ND)
        distribution_NV = teacher_distribution_logits(
            raw_NV, teacher.sequence_digest_N, teacher.position_N, distribution
        )
        student_NV = (logits_NV / distribution.temperature_of_student).log_softmax(-1)
        value_N = divergence(distribution_NV.log_softmax(-1), student_NV)
    else:
        value_N = divergence(*bucketed_logps(teacher, logits_NV, distribution))
    return value_N * distribution.loss_factor


def plain_logits(hidden_ND: Tensor, head: Unembedding) -> Tensor:
    logits_NV = hidden_ND @ head.matrix_VD.T
    if head.bias_V is not None:
        logits_NV = logits_NV + head.bias_V
    logits_NV = logits_NV * head.scale
    return head.softcap * torch.tanh(logits_NV / head.softcap) if head.softcap > 0.0 else logits_NV
