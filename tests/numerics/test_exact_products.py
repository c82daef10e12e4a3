"""Factors in bfloat16 are multiplied into float32 sums: near a teacher, rounded logits would be the loss."""

from __future__ import annotations

import pytest
import torch

from tutelage.trainer.losses.losses import token_divergence
from tutelage.trainer.losses.teacher_distribution import TeacherDistribution
from tutelage.trainer.teacher.rows import HiddenRows, Unembedding

ROWS, VOCABULARY, WIDTH = 48, 3001, 64


def sure_teacher() -> HiddenRows:
    """Largest logits of about 40, as language models have them, of which bfloat16 knows the nearest quarter."""
    generator = torch.Generator().manual_seed(0)
    hidden_ND = (3.0 * torch.randn(ROWS, WIDTH, generator=generator)).bfloat16()
    matrix_VD = (0.3 * torch.randn(VOCABULARY, WIDTH, generator=generator)).bfloat16()
    bias_V = torch.full((VOCABULARY,), 16.0)
    return HiddenRows(hidden_ND, torch.arange(ROWS), torch.arange(ROWS), Unembedding(matrix_VD, bias_V))


def test_logits_of_bfloat16_factors_are_summed_in_float32():
    teacher = sure_teacher()
    head = teacher.unembedding
    exact_NV = teacher.hidden_ND.double() @ head.matrix_VD.double().T + 16.0
    assert exact_NV.max() > 40.0
    torch.testing.assert_close(head.logits(teacher.hidden_ND).double(), exact_NV, rtol=0, atol=1e-4)


@pytest.mark.parametrize("objective", ["forward_kl", "reverse_kl", "gkd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_student_near_its_teacher_gets_the_gradient_to_one_percent(objective, dtype):
    """The student's states are its teacher's and a little noise, a KL of about 0.012; its head is the same."""
    teacher = sure_teacher()
    head = Unembedding(teacher.unembedding.matrix_VD.to(dtype), teacher.unembedding.bias_V)
    noise_ND = 0.07 * torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))
    hidden_ND = (teacher.hidden_ND + noise_ND).to(dtype)

    def gradient(hidden_ND, head, teacher):
        hidden_ND = hidden_ND.clone().requires_grad_()
        value_N = token_divergence(hidden_ND, head, teacher, objective=objective, distribution=TeacherDistribution())
        (found_ND,) = torch.autograd.grad(value_N.mean(), hidden_ND)
        return value_N.mean().item(), found_ND.double()

    exact_head = Unembedding(head.matrix_VD.double(), head.bias_V.double())
    exact_teacher = HiddenRows(
        teacher.hidden_ND.double(), teacher.sequence_digest_N, teacher.position_N,
        Unembedding(teacher.unembedding.matrix_VD.double(), teacher.unembedding.bias_V.double()),
    )  # fmt: skip
    kl, exact_ND = gradient(hidden_ND.double(), exact_head, exact_teacher)
    _, found_ND = gradient(hidden_ND, head, teacher)
    if objective == "forward_kl":
        assert 0.006 < kl < 0.024
    assert (found_ND - exact_ND).norm() < 0.01 * exact_ND.norm()
