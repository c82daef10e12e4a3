"""The student as it starts, as a teacher: a control, under which nothing is to be learned that it does not know."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy, deepcopy
from dataclasses import replace

import numpy as np
import torch

from tutelage.trainer.data.sequences import TokenSequence
from tutelage.trainer.model.student import Student
from tutelage.trainer.teacher.base import SignalArrays, SignalSpec, TeacherIdentity, UnembeddingArrays

_SEQUENCES = 8
"""That go through it at once."""


class EqualTeacher:
    """A `Teacher` with the signal `hidden`, in float32.

    Rounded to bfloat16, as served, its states would differ from the student's, and AdamW makes steps of their usual
    length of a difference however small.

    Args:
        student: before its first step; copied.

    """

    waited_seconds = 0.0

    def __init__(self, student: Student) -> None:
        self._twin = copy(student)
        self._twin.model = deepcopy(student.model).eval()
        hidden_size = self._twin.head().matrix_VD.shape[1]
        self.identity = TeacherIdentity("the student as it starts", "", student.vocabulary_size, hidden_size, 0.0)

    def score(self, sequences: Sequence[TokenSequence], spec: SignalSpec) -> list[SignalArrays]:
        """As `Teacher.score`."""
        answers: list[SignalArrays] = []
        for first in range(0, len(sequences), _SEQUENCES):
            part = [replace(each, mask=None) for each in sequences[first : first + _SEQUENCES]]
            # With the gradient's graph, as the student computes: without one, attention in bfloat16 rounds otherwise.
            hidden_ND = self._twin.hidden(part).detach().float().cpu()
            answers += [{"hidden_RD": rows_RD.numpy()} for rows_RD in hidden_ND.split([each.rows for each in part])]
        return answers

    @torch.no_grad()
    def unembedding(self) -> UnembeddingArrays:
        """As `Teacher.unembedding`."""
        head = self._twin.head()
        matrix_VD = head.matrix_VD.detach().cpu().contiguous()
        rows_VD = matrix_VD.view(torch.int16).numpy().view(np.uint16) if matrix_VD.dtype == torch.bfloat16 else None
        return UnembeddingArrays(
            matrix_VD.float().numpy() if rows_VD is None else rows_VD,
            None if head.bias_V is None else head.bias_V.detach().cpu().float().numpy(),
            head.scale,
            head.softcap,
        )
