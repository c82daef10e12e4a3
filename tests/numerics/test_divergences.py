"""The definitions: against references from the papers, at special cases and extremes, their bounds and invariances."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from numerics import references
from numerics.cases import DIVERGENCES, make_case
from tutelage.trainer.losses import closed_forms, divergences
from tutelage.trainer.losses.losses import divergence_named, token_divergence
from tutelage.trainer.losses.registry import OBJECTIVES, resolve_parameters
from tutelage.trainer.losses.teacher_distribution import TeacherDistribution
from tutelage.trainer.teacher.rows import HiddenRows, Unembedding

VARIANTS = [
    *((name, {}) for name in DIVERGENCES),
    *(("gkd", {"beta": beta}) for beta in (0.0, 0.01, 0.3, 0.9, 1.0)),
    ("gkd", {"beta": 0.2, "normalize_beta": True}),
    *(("skew_kl", {"alpha": alpha}) for alpha in (0.0, 0.7)),
    *(("skew_reverse_kl", {"alpha": alpha}) for alpha in (0.0, 0.7)),
    *(("adaptive_kl", {"head_mass": mass}) for mass in (0.1, 0.95)),
    ("paper_code/gkd", {"beta": 0.3}),
]
# The released definitions are no divergences: their epsilon moves them off zero.
PROPER = [(name, parameters) for name, parameters in VARIANTS if not name.startswith("paper_code")]
REVERSE, FORWARD = ("gkd", {"beta": 1.0}), ("gkd", {"beta": 0.0})
FINITE_AT_ZERO = [variant for variant in PROPER if OBJECTIVES[variant[0]].zero_teacher and variant != REVERSE]
ON_CANDIDATES = [variant for variant in PROPER if "candidates" in OBJECTIVES[variant[0]].exact and variant != FORWARD]
LOGITS = arrays(np.float64, 9, elements=st.floats(-30, 30, width=32))


def definition(name, parameters):
    return divergence_named(name, resolve_parameters(name, parameters))


def logps(*rows):
    return [torch.tensor(row, dtype=torch.float64).log_softmax(-1)[None] for row in rows]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
@pytest.mark.parametrize(("name", "parameters"), VARIANTS)
def test_equals_the_papers_formula(name, parameters, temperature):
    case = make_case()
    value = token_divergence(
        case.hidden_ND,
        case.head,
        case.teacher,
        objective=name,
        parameters=parameters,
        distribution=TeacherDistribution(temperature=temperature),
        chunk_rows=3,
    )
    for row, (z, s) in enumerate(zip(case.teacher_logits.numpy(), case.student_logits.numpy(), strict=True)):
        p, q = references.softmax(z, temperature), references.softmax(s, temperature)
        assert value[row].item() == pytest.approx(references.BY_NAME[name](p, q, **parameters), rel=1e-10)


@pytest.mark.parametrize(("name", "parameters"), ON_CANDIDATES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_on_candidates_equals_the_papers_formula_over_kept_ids_and_tail(name, parameters, temperature):
    case = make_case()
    teacher = case.candidates(6, temperature, padded=2)
    value = token_divergence(
        case.hidden_ND,
        case.head,
        teacher,
        objective=name,
        parameters=parameters,
        distribution=TeacherDistribution(temperature=temperature),
    )
    rows = zip(case.teacher_logits.numpy(), case.student_logits.numpy(), teacher.ids_NC.tolist(), strict=True)
    for row, (z, s, ids) in enumerate(rows):
        p = references.bucketed(references.softmax(z, temperature), ids)
        q = references.bucketed(references.softmax(s, temperature), ids)
        assert value[row].item() == pytest.approx(references.BY_NAME[name](p, q, **parameters), rel=1e-9)


@pytest.mark.parametrize(("name", "parameters"), PROPER)
def test_identical_distributions_are_at_distance_zero(name, parameters):
    (logp,) = logps(np.linspace(-3, 5, 40))
    value = definition(name, parameters)(logp, logp)
    assert value.item() == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_identical_logits_are_at_exactly_zero_through_the_whole_loss(name):
    case = make_case(dtype=torch.float32)
    value = token_divergence(
        case.hidden_ND,
        case.head,
        HiddenRows(case.hidden_ND, case.teacher.sequence_digest_N, case.teacher.position_N, case.head),
        objective=name,
        distribution=TeacherDistribution(temperature=1.7),
    )
    assert torch.equal(value, torch.zeros(7))


def test_temperature_to_infinity_is_the_squared_error_of_centred_logits():
    """Hinton et al. 2015, section 2.1: T²·KL → ½ Σ ((z − mean z) − (s − mean s))² / V."""
    case = make_case()
    distribution = TeacherDistribution(temperature=1e4, scale_by_temperature_squared=True)
    value = token_divergence(case.hidden_ND, case.head, case.teacher, objective="forward_kl", distribution=distribution)
    gap = case.teacher_logits - case.student_logits
    squared = 0.5 * (gap - gap.mean(-1, keepdim=True)).square().mean(-1)
    torch.testing.assert_close(value, squared, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize(("low", "high"), [("forward_kl", "reverse_kl")])
def test_normalised_gkd_goes_to_forward_and_reverse_kl(low, high):
    teacher, student = logps(np.arange(9.0), np.arange(9.0)[::-1] / 3)
    for name, beta in ((low, 1e-6), (high, 1 - 1e-6)):
        value = divergences.generalized_jsd(teacher, student, beta=beta, normalize_beta=True)
        torch.testing.assert_close(value, definition(name, {})(teacher, student), rtol=1e-3, atol=0.0)


@pytest.mark.parametrize(("name", "parameters"), [v for v in VARIANTS if v[0] not in ("adaptive_kl", "tvd")])
def test_gradcheck_of_definitions(name, parameters):
    case = make_case(rows=3, vocabulary=7)
    teacher_logp = case.teacher_logits.log_softmax(-1)
    logits = case.student_logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: definition(name, parameters)(teacher_logp, s.log_softmax(-1)), (logits,))


def test_gradient_of_tvd_away_from_its_kinks():
    case = make_case(rows=3, vocabulary=7)
    teacher_logp = case.teacher_logits.log_softmax(-1)
    logits = case.student_logits.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: divergences.total_variation(teacher_logp, s.log_softmax(-1)), (logits,), eps=1e-7
    )


def test_gradient_of_adaptive_kl_takes_its_weight_as_constant():
    case = make_case(rows=4)
    teacher_logp = case.teacher_logits.log_softmax(-1)
    logits = case.student_logits.requires_grad_()
    student_logp = logits.log_softmax(-1)
    forward_N = divergences.forward_kl(teacher_logp, student_logp)
    reverse_N = divergences.reverse_kl(teacher_logp, student_logp)
    value = divergences.adaptive_kl(teacher_logp, student_logp, head_mass=0.5)
    weight = ((value - reverse_N) / (forward_N - reverse_N)).detach()
    (expected,) = torch.autograd.grad((weight * forward_N + (1 - weight) * reverse_N).sum(), logits, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), logits)[0], expected)


def test_closed_form_gradients():
    """∂KL(p‖q)/∂u = q − p, and the others against autograd on the definitions."""
    case = make_case()
    p, q = case.teacher_logits.log_softmax(-1), case.student_logits.log_softmax(-1)
    _, gradient = closed_forms.forward_kl(p.clone(), q.clone(), True)
    torch.testing.assert_close(gradient, q.exp() - p.exp())
    for closed, name, parameters in (
        (closed_forms.forward_kl, "forward_kl", {}),
        (closed_forms.reverse_kl, "reverse_kl", {}),
        (closed_forms.generalized_jsd(0.3, False), "gkd", {"beta": 0.3}),
        (closed_forms.generalized_jsd(0.9, True), "gkd", {"beta": 0.9, "normalize_beta": True}),
    ):
        for with_gradient in (True, False):
            expected = closed_forms.by_autograd(definition(name, parameters))(p.clone(), q.clone(), with_gradient)
            torch.testing.assert_close(closed(p.clone(), q.clone(), with_gradient), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(("name", "parameters"), FINITE_AT_ZERO)
def test_finite_where_the_teacher_or_both_have_probability_zero(name, parameters):
    teacher = torch.tensor([[2.0, 1.0, -math.inf, -math.inf]]).log_softmax(-1)
    student = torch.tensor([[0.5, 1.0, 2.0, -math.inf]]).requires_grad_()
    value = definition(name, parameters)(teacher, student.log_softmax(-1))
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    assert gradient[0, 3] == 0.0
    p, q = teacher[0].double().exp().numpy(), student.detach()[0].double().softmax(-1).numpy()
    assert value.item() == pytest.approx(references.BY_NAME[name](p, q, **parameters), rel=1e-5)


@pytest.mark.parametrize("name", ["reverse_kl", "skew_reverse_kl"])
def test_reverse_kl_where_both_have_probability_zero(name):
    teacher = torch.tensor([[2.0, 1.0, 0.0, -math.inf]]).log_softmax(-1)
    student = torch.tensor([[0.5, 1.0, 2.0, -math.inf]]).requires_grad_()
    value = definition(name, {})(teacher, student.log_softmax(-1))
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert value.isfinite().all()
    assert gradient.isfinite().all()


def test_reverse_kl_is_infinite_not_clamped_where_only_the_teacher_is_zero():
    teacher = torch.tensor([[0.0, -math.inf]]).log_softmax(-1)
    student = torch.tensor([[0.0, 0.0]]).log_softmax(-1)
    assert divergences.reverse_kl(teacher, student).item() == math.inf


@pytest.mark.parametrize("size", [1e4, 80.0])
@pytest.mark.parametrize(("name", "parameters"), VARIANTS)
def test_finite_at_extreme_logits(name, parameters, size):
    case = make_case(rows=2, vocabulary=3, width=2, dtype=torch.float32)
    extreme = torch.tensor([[size, 0.0], [-size, 0.0], [0.0, size]])
    head = Unembedding(extreme.bfloat16().requires_grad_())
    hidden = torch.tensor([[1.0, 0.0], [0.0, -1.0]], dtype=torch.bfloat16, requires_grad=True)
    digest, position = case.teacher.sequence_digest_N, case.teacher.position_N
    teacher = HiddenRows(-hidden.detach(), digest, position, Unembedding(head.matrix_VD.detach()))
    value = token_divergence(
        hidden, head, teacher, objective=name, parameters=parameters, distribution=TeacherDistribution()
    )
    found = torch.autograd.grad(value.sum(), [hidden, head.matrix_VD])
    assert value.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in found)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(LOGITS, LOGITS)
def test_bounds(teacher_logits, student_logits):
    teacher, student = logps(teacher_logits, student_logits)
    values = {str(variant): definition(*variant)(teacher, student).item() for variant in PROPER}
    assert min(values.values()) >= -1e-12
    assert values[str(("gkd", {"beta": 0.3}))] <= math.log(2) + 1e-12
    assert values[str(("jsd", {}))] <= math.log(2) + 1e-12
    assert values[str(("tvd", {}))] <= 1 + 1e-12
    for name in ("skew_kl", "skew_reverse_kl"):
        assert values[str((name, {"alpha": 0.7}))] <= -math.log(0.7) + 1e-12
    # Pinsker's inequality.
    assert values[str(("tvd", {}))] ** 2 <= values[str(("forward_kl", {}))] / 2 + 1e-12


@settings(max_examples=30, deadline=None, derandomize=True)
@given(LOGITS, LOGITS, st.floats(-50, 50), st.permutations(range(9)))
def test_shifting_logits_and_permuting_the_vocabulary_change_nothing(teacher_logits, student_logits, shift, order):
    order = list(order)
    for variant in VARIANTS:
        if variant[0] == "adaptive_kl":  # Equal probabilities at the edge of the head may change places.
            continue
        plain = definition(*variant)(*logps(teacher_logits, student_logits))
        moved = definition(*variant)(*logps(teacher_logits[order] - shift, student_logits[order] + shift))
        torch.testing.assert_close(moved, plain, rtol=1e-8, atol=1e-9)


def test_entropy():
    (uniform,) = logps(np.zeros(8))
    assert divergences.entropy(uniform).item() == pytest.approx(math.log(8))
    assert divergences.entropy(torch.tensor([[0.0, -math.inf]])).item() == 0.0
