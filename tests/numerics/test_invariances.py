"""What no objective may see: a constant on the logits, the numbering of the vocabulary, the company of a row."""

from __future__ import annotations

import pytest
import torch

from numerics.cases import DIVERGENCES, Case, make_case
from tutelage.trainer.losses.losses import token_divergence
from tutelage.trainer.losses.registry import OBJECTIVES
from tutelage.trainer.losses.teacher_distribution import TeacherDistribution
from tutelage.trainer.teacher.rows import HiddenRows, Unembedding

SERVED = [(name, kind) for name in DIVERGENCES for kind in OBJECTIVES[name].exact]
DISTRIBUTION = TeacherDistribution(temperature=2.0, student_temperature=1.5)


def value_and_gradient(case: Case, objective: str, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Per row, [N] and [N, D]."""
    temperature = DISTRIBUTION.temperature
    teacher = case.candidates(5, temperature) if kind == "candidates" else case.rows(kind, temperature=temperature)
    hidden = case.hidden_ND.clone().requires_grad_()
    value = token_divergence(hidden, case.head, teacher, objective=objective, distribution=DISTRIBUTION)
    return value.detach(), torch.autograd.grad(value.sum(), hidden)[0]


def with_heads(case: Case, student: Unembedding, teacher: Unembedding) -> Case:
    of_teacher = HiddenRows(case.teacher.hidden_ND, case.teacher.sequence_digest_N, case.teacher.position_N, teacher)
    return Case(case.hidden_ND, student, of_teacher)


@pytest.mark.parametrize(("objective", "kind"), SERVED)
def test_a_constant_on_the_logits(objective, kind):
    case = make_case()
    heads = [case.head.matrix_VD, case.teacher.unembedding.matrix_VD]
    shifted = with_heads(
        case, *(Unembedding(matrix, torch.full((23,), by)) for matrix, by in zip(heads, (3.0, -7.0), strict=True))
    )
    torch.testing.assert_close(
        value_and_gradient(shifted, objective, kind), value_and_gradient(case, objective, kind), rtol=1e-9, atol=1e-11
    )


@pytest.mark.parametrize(("objective", "kind"), SERVED)
def test_the_numbering_of_the_vocabulary(objective, kind):
    case = make_case()
    order = torch.randperm(23, generator=torch.Generator().manual_seed(0))
    heads = [case.head.matrix_VD, case.teacher.unembedding.matrix_VD]
    renumbered = with_heads(case, *(Unembedding(matrix[order]) for matrix in heads))
    torch.testing.assert_close(
        value_and_gradient(renumbered, objective, kind),
        value_and_gradient(case, objective, kind),
        rtol=1e-9,
        atol=1e-11,
    )


@pytest.mark.parametrize(("objective", "kind"), SERVED)
def test_the_company_and_the_order_of_rows(objective, kind):
    case = make_case()
    rows = torch.tensor([4, 0, 6])
    some = Case(case.hidden_ND[rows], case.head, case.teacher.at(rows))
    whole = value_and_gradient(case, objective, kind)
    torch.testing.assert_close(
        value_and_gradient(some, objective, kind), tuple(part[rows] for part in whole), rtol=1e-12, atol=1e-14
    )
