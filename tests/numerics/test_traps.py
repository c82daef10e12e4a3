"""One test for each way in which distillation losses are known to go wrong in the field."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

from numerics.cases import make_case, plain_logits
from tutelage.errors import ConfigurationError
from tutelage.trainer.losses import divergences, estimators
from tutelage.trainer.losses.losses import token_cross_entropy, token_divergence, token_policy_gradient
from tutelage.trainer.losses.reductions import reduce_token_mean
from tutelage.trainer.losses.registry import check_signal
from tutelage.trainer.losses.tail_bucket import bucketed_logps, teacher_bucketed_logp
from tutelage.trainer.losses.teacher_distribution import TeacherDistribution
from tutelage.trainer.teacher.rows import CandidateRows, HiddenRows, TopKRows, Unembedding

PLAIN = TeacherDistribution()


def test_temperature_on_truncated_data():
    """The tail at T comes from log-sum-exp at T; neither the tail at 1 nor the kept ids alone know it."""
    case = make_case(vocabulary=2000)
    teacher = case.topk(64, temperature=4.0)
    tail = teacher_bucketed_logp(teacher, 2000, TeacherDistribution(temperature=4.0))[:, -1].exp()
    exact = 1 - (case.teacher_logits / 4.0).softmax(-1).gather(-1, teacher.ids_NK).sum(-1)
    torch.testing.assert_close(tail, exact)
    tail_at_one = teacher_bucketed_logp(case.topk(64), 2000, PLAIN)[:, -1].exp()
    assert (tail > tail_at_one + 0.2).all()


def test_truncated_reverse_kl():
    """Σ over the kept ids alone can be negative and has its optimum at 1/e of the mass; it is refused.

    With the tail, on the student's ids, the optimum is the teacher itself.
    """
    with pytest.raises(ConfigurationError, match="1/e"):
        check_signal("reverse_kl", "topk", parameters={})
    case = make_case()
    equal = HiddenRows(case.hidden_ND, case.teacher.sequence_digest_N, case.teacher.position_N, case.head)
    same = type(case)(case.hidden_ND, case.head, equal)
    hidden = case.hidden_ND.clone().requires_grad_()
    value = token_divergence(hidden, case.head, same.candidates(4), objective="reverse_kl", distribution=PLAIN)
    torch.testing.assert_close(value, torch.zeros_like(value), rtol=0.0, atol=1e-12)
    (gradient,) = torch.autograd.grad(value.sum(), hidden)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0.0, atol=1e-12)
    other = token_divergence(hidden, case.head, case.candidates(1), objective="reverse_kl", distribution=PLAIN)
    assert (other > 0).all()


def test_truncated_forward_kl_is_neither_negative_nor_clamped():
    """Where Σ over the kept ids alone is negative, and a clamp would have no gradient, ours is positive and pulls."""
    case = make_case(rows=200)
    teacher = case.topk(1)
    p, q = (
        logits.softmax(-1).gather(-1, teacher.ids_NK)[:, 0] for logits in (case.teacher_logits, case.student_logits)
    )
    negative = p * (p / q).log() < 0
    assert negative.sum() > 5
    hidden = case.hidden_ND.requires_grad_()
    value = token_divergence(hidden, case.head, teacher, objective="forward_kl", distribution=PLAIN)
    (gradient,) = torch.autograd.grad(value.sum(), hidden)
    assert (value[negative] > 0).all()
    assert (gradient[negative].norm(dim=-1) > 1e-6).all()


def test_renormalised_topk_is_blind_at_one_kept_id():
    case = make_case()
    value = token_divergence(case.hidden_ND, case.head, case.topk(1), objective="forward_kl", distribution=PLAIN)
    assert (value > 1e-3).all()
    finer = token_divergence(case.hidden_ND, case.head, case.topk(8), objective="forward_kl", distribution=PLAIN)
    whole = token_divergence(case.hidden_ND, case.head, case.teacher, objective="forward_kl", distribution=PLAIN)
    assert (value <= finer + 1e-12).all()
    assert (finer <= whole + 1e-12).all()


def test_estimators_are_named_for_the_gradient_they_give():
    """k3 as a loss on the student's samples is forward KL, k2 reverse KL; k1 has no gradient at all."""
    case = make_case(rows=2)
    p, logits = case.teacher_logits.log_softmax(-1), case.student_logits.requires_grad_()

    def expected_gradient(loss):
        q = logits.log_softmax(-1)
        return torch.autograd.grad((q.detach().exp() * loss(q, p)).sum(), logits)[0]

    def gradient_of(divergence):
        return torch.autograd.grad(divergence(p, logits.log_softmax(-1)).sum(), logits)[0]

    torch.testing.assert_close(expected_gradient(estimators.k3_forward_kl), gradient_of(divergences.forward_kl))
    torch.testing.assert_close(expected_gradient(estimators.k2_reverse_kl), gradient_of(divergences.reverse_kl))
    k1 = expected_gradient(lambda q, p: q - p)
    torch.testing.assert_close(k1, torch.zeros_like(k1), rtol=0.0, atol=1e-14)
    assert not hasattr(estimators, "k1")


def test_beta_jumps_at_its_ends_unless_normalised():
    case = make_case()

    def size(beta, normalize):
        parameters = {"beta": beta, "normalize_beta": normalize}
        value = token_divergence(
            case.hidden_ND, case.head, case.teacher, objective="gkd", parameters=parameters, distribution=PLAIN
        )
        return value.mean().item()

    for end, near in ((0.0, 1e-7), (1.0, 1 - 1e-7)):
        assert size(near, False) < 1e-3 * size(end, False)
        assert size(near, True) == pytest.approx(size(end, True), rel=0.01)
    # β weighs KL(p‖m) and p in m.
    p, q = case.teacher_logits.softmax(-1), case.student_logits.softmax(-1)
    m = 0.2 * p + 0.8 * q
    expected = 0.2 * (p * (p / m).log()).sum(-1) + 0.8 * (q * (q / m).log()).sum(-1)
    assert size(0.2, False) == pytest.approx(expected.mean().item())


def test_minus_infinity_padding_gives_no_nan():
    """Padded candidates, empty tails and truncated teachers: finite values, finite gradients."""
    case = make_case(dtype=torch.float32)
    teachers = {
        "padded": (case.candidates(6, padded=5), PLAIN, "tvd"),
        "padded reverse": (case.candidates(6, padded=5), PLAIN, "reverse_kl"),
        "no tail": (case.topk(23), PLAIN, "skew_kl"),
        "truncated": (case.teacher, TeacherDistribution(top_k=1), "gkd"),
    }
    for teacher, distribution, objective in teachers.values():
        hidden = case.hidden_ND.clone().requires_grad_()
        value = token_divergence(hidden, case.head, teacher, objective=objective, distribution=distribution)
        (gradient,) = torch.autograd.grad(value.sum(), hidden)
        assert value.isfinite().all()
        assert gradient.isfinite().all()


def test_vocabulary_padding_is_cut_before_normalising():
    case = make_case()
    padded = torch.cat([case.head.matrix_VD, torch.full((9, 5), 50.0, dtype=torch.float64)]).requires_grad_()
    with pytest.raises(ConfigurationError, match="cut both to the tokenizer's vocabulary"):
        token_divergence(case.hidden_ND, Unembedding(padded), case.teacher, objective="gkd", distribution=PLAIN)
    value = token_divergence(
        case.hidden_ND, Unembedding(padded[:23]), case.teacher, objective="gkd", distribution=PLAIN
    )
    expected = token_divergence(case.hidden_ND, case.head, case.teacher, objective="gkd", distribution=PLAIN)
    torch.testing.assert_close(value, expected)
    (gradient,) = torch.autograd.grad(value.sum(), padded)
    assert torch.equal(gradient[23:], torch.zeros(9, 5, dtype=torch.float64))


@pytest.mark.parametrize("excess", [-1e-7, 0.0, 1e-6, 1e-3])
def test_kept_mass_of_one_or_more_leaves_a_finite_tail(excess):
    """Rounding can bring Σp over the kept ids to 1 and above; the tail is then as small as the dtype resolves."""
    case = make_case(rows=1, dtype=torch.float32)
    ids = torch.tensor([[0, 1]])
    teacher = CandidateRows(ids, torch.tensor([[0.5, 0.5]]).log(), torch.tensor([-excess]))
    hidden = case.hidden_ND.requires_grad_()
    value = token_divergence(hidden, case.head, teacher, objective="reverse_kl", distribution=PLAIN)
    assert value.isfinite().all()
    assert torch.autograd.grad(value.sum(), hidden)[0].isfinite().all()
    tail = teacher_bucketed_logp(teacher, 23, PLAIN)[0, -1].exp()
    assert 0 < tail <= 2e-6


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(
    ("objective", "kind"),
    [
        ("forward_kl", "topk"),
        ("gkd", "topk"),
        ("reverse_kl", "candidates"),
        ("forward_kl", "hidden"),
        ("reverse_kl", "hidden"),
        ("gkd", "hidden"),
        ("skew_reverse_kl", "hidden"),
        ("paper_code/reverse_kl", "hidden"),
    ],
)
def test_hand_written_backward_is_the_gradient_of_its_forward(objective, kind, trained):
    """gradcheck, also where the kept ids have less than all the mass."""
    case = make_case(rows=3, vocabulary=7, width=2)
    distribution = TeacherDistribution(temperature=1.3, student_temperature=0.8, scale_by_temperature_squared=True)
    teacher = case.rows(kind, k=3, temperature=1.3)
    matrix = case.head.matrix_VD.requires_grad_(trained)
    bias = torch.linspace(-1, 1, 7, dtype=torch.float64).requires_grad_(trained)

    def loss(hidden, matrix, bias):
        head = Unembedding(matrix, bias, scale=0.9, softcap=5.0)
        return token_divergence(hidden, head, teacher, objective=objective, distribution=distribution, chunk_rows=2)

    assert torch.autograd.gradcheck(loss, (case.hidden_ND.requires_grad_(), matrix, bias))


def test_hand_written_backward_of_sampled_tokens():
    case = make_case(rows=3, vocabulary=7, width=2)
    ids = torch.tensor([6, 0, 2])
    inputs = (case.hidden_ND.requires_grad_(), case.head.matrix_VD.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda hidden, matrix: token_cross_entropy(hidden, Unembedding(matrix), ids, chunk_rows=2), inputs
    )
    assert torch.autograd.gradcheck(
        lambda hidden, matrix: token_policy_gradient(
            hidden,
            Unembedding(matrix),
            case.teacher,
            ids,
            estimator="k3_forward_kl",
            distribution=TeacherDistribution(temperature=2.0),
            chunk_rows=2,
        )[0],
        inputs,
    )


def test_the_temperature_of_the_loss_is_the_distillations_and_no_token_id_is_special():
    """The user's temperature reaches the loss on both sides; padding is a choice of rows, never of a token id."""
    case = make_case()
    found = token_divergence(
        case.hidden_ND,
        case.head,
        case.teacher,
        objective="forward_kl",
        distribution=TeacherDistribution(temperature=3.0),
    )
    p, q = (case.teacher_logits / 3.0).log_softmax(-1), (case.student_logits / 3.0).log_softmax(-1)
    torch.testing.assert_close(found, divergences.forward_kl(p, q))
    for function in (token_divergence, token_cross_entropy, token_policy_gradient):
        assert not {"mask", "ignore_index", "pad_id", "sampling_temperature"} & set(
            inspect.signature(function).parameters
        )
    for token in range(23):
        value = token_cross_entropy(case.hidden_ND, case.head, torch.full((7,), token))
        torch.testing.assert_close(value, -plain_logits(case.hidden_ND, case.head).log_softmax(-1)[:, token])


@pytest.mark.parametrize("split", [[7], [1, 6], [3, 2, 2]])
def test_the_denominator_is_that_of_the_whole_step(split):
    case = make_case()

    def gradient(rows):
        matrix = case.head.matrix_VD.clone().requires_grad_()
        value = token_divergence(
            case.hidden_ND[rows], Unembedding(matrix), case.teacher.at(rows), objective="gkd", distribution=PLAIN
        )
        reduce_token_mean(value, total_tokens=7).backward()
        return matrix.grad

    accumulated = sum(gradient(rows) for rows in torch.arange(7).split(split))
    torch.testing.assert_close(accumulated, gradient(slice(None)))


def test_rows_that_are_left_out_cannot_matter_whatever_they_hold():
    """Prompt and tool tokens with placeholder signals: even NaN there changes nothing, since no row of it enters."""
    case = make_case()
    keep = torch.tensor([True, False, True, True, False, True, False])
    kept = case.topk(4)
    spoiled = {
        "hidden": HiddenRows(
            case.teacher.hidden_ND.masked_fill(~keep[:, None], math.nan),
            case.teacher.sequence_digest_N,
            case.teacher.position_N,
            case.teacher.unembedding,
        ),
        "topk": TopKRows(kept.ids_NK, torch.where(keep[:, None], kept.logits_NK, 0.0), kept.logsumexp_N * keep),
    }
    for kind, rows in spoiled.items():
        hidden = case.hidden_ND.masked_fill(~keep[:, None], math.nan).requires_grad_()
        arguments = {"objective": "forward_kl", "distribution": PLAIN}
        value = token_divergence(hidden[keep], case.head, rows.at(keep), **arguments)
        expected = token_divergence(case.hidden_ND, case.head, case.rows(kind, k=4), **arguments)[keep]
        torch.testing.assert_close(value, expected)
        (gradient,) = torch.autograd.grad(value.sum(), hidden)
        assert torch.equal(gradient[~keep], torch.zeros_like(gradient[~keep]))


def test_bucketed_supports_are_distributions():
    case = make_case(dtype=torch.float32)
    for teacher in (case.topk(5), case.candidates(5, padded=2)):
        for logp in bucketed_logps(teacher, case.student_logits, PLAIN):
            torch.testing.assert_close(logp.exp().sum(-1), torch.ones(7))
