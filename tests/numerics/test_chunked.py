"""The chunked, recomputing form equals the plain one, in value, gradient and under every split, in bounded memory."""

from __future__ import annotations

import pytest
import torch
from numerics.cases import DIVERGENCES, make_case, plain_divergence, plain_logits

from trainer.objectives.loss import token_cross_entropy, token_divergence
from trainer.objectives.table import OBJECTIVES
from trainer.signals import Unembedding
from trainer.smoothing import Smoothing

SERVED = [(name, kind) for name in DIVERGENCES for kind in OBJECTIVES[name].exact]
SMOOTHINGS = [
    Smoothing(),
    Smoothing(temperature=2.0, scale_by_temperature_squared=True),
    Smoothing(temperature=2.0, student_temperature=0.7),
]


def leaves(case, trained=True):
    matrix = case.head.matrix_VD.clone().requires_grad_(trained)
    return case.hidden_ND.clone().requires_grad_(), Unembedding(matrix, case.head.bias_V)


def gradients(value_N, hidden, head, weights):
    inputs = [hidden, head.matrix_VD] if head.matrix_VD.requires_grad else [hidden]
    return torch.autograd.grad((value_N * weights).sum(), inputs)


@pytest.mark.parametrize("smoothing", SMOOTHINGS, ids=["T1", "T2 squared", "two temperatures"])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(("objective", "kind"), SERVED)
def test_chunked_equals_plain_in_value_and_gradient(objective, kind, trained, smoothing):
    case = make_case(rows=37)
    teacher = case.rows(kind, temperature=smoothing.temperature)
    weights = torch.linspace(-1.0, 2.0, 37, dtype=torch.float64)
    hidden, head = leaves(case, trained)
    value = token_divergence(hidden, head, teacher, objective=objective, smoothing=smoothing, chunk_rows=20)
    plain = plain_divergence(hidden, head, teacher, objective=objective, smoothing=smoothing)
    torch.testing.assert_close(value, plain, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        gradients(value, hidden, head, weights), gradients(plain, hidden, head, weights), rtol=1e-9, atol=1e-11
    )


@pytest.mark.parametrize(("objective", "kind"), SERVED)
def test_chunked_equals_plain_to_1e6_in_float32(objective, kind):
    case = make_case(rows=64, vocabulary=300, width=16, dtype=torch.float32)
    hidden, head = leaves(case)
    teacher = case.rows(kind)
    value = token_divergence(hidden, head, teacher, objective=objective, smoothing=Smoothing(), chunk_rows=20)
    plain = plain_divergence(hidden, head, teacher, objective=objective, smoothing=Smoothing())
    torch.testing.assert_close(value, plain, rtol=1e-6, atol=2e-6)
    weights = torch.full((64,), 1.0 / 64)
    torch.testing.assert_close(
        gradients(value, hidden, head, weights), gradients(plain, hidden, head, weights), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("trained", [True, False])
def test_cross_entropy_equals_torchs(trained):
    case = make_case(rows=37)
    hidden, head = leaves(case, trained)
    targets = torch.arange(37) % 23
    weights = torch.linspace(-1.0, 2.0, 37, dtype=torch.float64)
    value = token_cross_entropy(hidden, head, targets, chunk_rows=20)
    plain = torch.nn.functional.cross_entropy(plain_logits(hidden, head), targets, reduction="none")
    torch.testing.assert_close(value, plain)
    torch.testing.assert_close(gradients(value, hidden, head, weights), gradients(plain, hidden, head, weights))


@pytest.mark.parametrize("objective", ["reverse_kl", "skew_kl"])
def test_bias_scale_and_softcap_of_both_heads(objective):
    case = make_case(rows=37)
    bias = torch.linspace(-1.0, 1.0, 23, dtype=torch.float64).requires_grad_()
    matrix = case.head.matrix_VD.clone().requires_grad_()
    head = Unembedding(matrix, bias, scale=0.8, softcap=3.0)
    hidden = case.hidden_ND.clone().requires_grad_()
    capped = Unembedding(case.teacher.unembedding.matrix_VD, bias.detach().flip(0), scale=1.3, softcap=4.0)
    teacher = type(case.teacher)(
        case.teacher.hidden_ND, case.teacher.sequence_digest_N, case.teacher.position_N, capped
    )
    torch.testing.assert_close(
        capped.logits(teacher.hidden_ND), plain_logits(teacher.hidden_ND, capped), rtol=1e-12, atol=1e-12
    )
    arguments = {"objective": objective, "smoothing": Smoothing(temperature=1.5)}
    value = token_divergence(hidden, head, teacher, **arguments, chunk_rows=20)
    plain = plain_divergence(hidden, head, teacher, **arguments)
    torch.testing.assert_close(value, plain, rtol=1e-10, atol=1e-12)
    inputs = [hidden, matrix, bias]
    torch.testing.assert_close(
        torch.autograd.grad(value.square().sum(), inputs), torch.autograd.grad(plain.square().sum(), inputs)
    )


@pytest.mark.parametrize("upstream", ["one number", "one per row"])
def test_the_head_learns_the_same_whatever_the_weights_of_the_rows(upstream):
    case = make_case(rows=50)
    weights = torch.full((50,), 0.02) if upstream == "one number" else torch.linspace(0.1, 2.0, 50)
    hidden, head = leaves(case)
    value = token_divergence(hidden, head, case.teacher, objective="gkd", smoothing=Smoothing(), chunk_rows=20)
    plain = plain_divergence(hidden, head, case.teacher, objective="gkd", smoothing=Smoothing())
    torch.testing.assert_close(gradients(value, hidden, head, weights), gradients(plain, hidden, head, weights))
