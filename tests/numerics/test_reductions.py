"""Reductions give the loss of the whole step whatever the micro-batches are; diagnostics say what they say."""

from __future__ import annotations

import math

import pytest
import torch

from numerics.cases import make_case
from tutelage.trainer.losses import divergences
from tutelage.trainer.losses.diagnostics import diagnostics
from tutelage.trainer.losses.reductions import reduce_micro_batch_token_mean, reduce_sequence_mean, reduce_token_mean
from tutelage.trainer.losses.teacher_distribution import TeacherDistribution

VALUES = torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0, 100.0])
LENGTHS = torch.tensor([3, 3, 3, 2, 2, 1])


@pytest.mark.parametrize("split", [[6], [3, 3], [3, 2, 1], [1, 5]])
def test_token_and_sequence_means_do_not_depend_on_the_micro_batches(split):
    parts = list(zip(VALUES.split(split), LENGTHS.split(split), strict=True))
    token = sum(reduce_token_mean(values, 6) for values, _ in parts)
    sequence = sum(reduce_sequence_mean(values, lengths, 3) for values, lengths in parts)
    assert token.item() == pytest.approx(136 / 6)
    assert sequence.item() == pytest.approx((2 + 15 + 100) / 3)


def test_micro_batch_token_mean_is_the_mean_of_means():
    found = sum(reduce_micro_batch_token_mean(values, 2) for values in (VALUES[:5], VALUES[5:]))
    assert found.item() == pytest.approx((36 / 5 + 100) / 2)


def test_an_empty_micro_batch_adds_nothing():
    assert reduce_token_mean(VALUES[:0], 6).item() == 0.0
    assert reduce_sequence_mean(VALUES[:0], LENGTHS[:0], 3).item() == 0.0


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_diagnostics_of_hidden(temperature):
    case = make_case(rows=20, vocabulary=200)
    found = diagnostics(
        case.hidden_ND, case.head, case.teacher, distribution=TeacherDistribution(temperature=temperature), chunk_rows=7
    )
    p = (case.teacher_logits / temperature).log_softmax(-1)
    q = (case.student_logits / temperature).log_softmax(-1)
    support = q.topk(64, dim=-1).indices
    expected = {
        "forward_kl": divergences.forward_kl(p, q),
        "reverse_kl": divergences.reverse_kl(p, q),
        "jsd": divergences.generalized_jsd(p, q, beta=0.5),
        "teacher_entropy": divergences.entropy(p),
        "student_entropy": divergences.entropy(q),
        "top1_agreement": (p.argmax(-1) == q.argmax(-1)).double(),
        "tail_mass": 1 - p.exp().gather(-1, support).sum(-1),
        "student_tail_mass": 1 - q.exp().gather(-1, support).sum(-1),
    }
    torch.testing.assert_close(found, {name: value.float() for name, value in expected.items()})


def test_diagnostics_of_a_truncated_teacher():
    case = make_case(rows=20, vocabulary=200)
    found = diagnostics(case.hidden_ND, case.head, case.teacher, distribution=TeacherDistribution(top_k=1))
    likeliest = case.teacher_logits.argmax(-1, keepdim=True)
    q = case.student_logits.log_softmax(-1)
    torch.testing.assert_close(found["forward_kl"], -q.gather(-1, likeliest)[:, 0].float())
    assert torch.equal(found["teacher_entropy"], torch.zeros(20))
    assert torch.equal(found["reverse_kl"], torch.full((20,), torch.inf))


@pytest.mark.parametrize("kind", ["topk", "candidates"])
def test_diagnostics_of_kept_ids(kind):
    case = make_case(rows=20, vocabulary=200)
    full = diagnostics(case.hidden_ND, case.head, case.teacher, distribution=TeacherDistribution())
    found = diagnostics(
        case.hidden_ND, case.head, case.rows(kind, k=20), distribution=TeacherDistribution(), chunk_rows=7
    )
    assert found.keys() == full.keys()
    for name in ("forward_kl", "reverse_kl", "jsd", "teacher_entropy"):
        assert (found[name] <= full[name] + 1e-6).all()
    torch.testing.assert_close(found["student_entropy"], full["student_entropy"])
    if kind == "topk":
        torch.testing.assert_close(found["top1_agreement"], full["top1_agreement"])
        exact = 1 - case.teacher_logits.softmax(-1).topk(20, dim=-1).values.sum(-1)
        torch.testing.assert_close(found["tail_mass"], exact.float())
    assert all(value.isfinite().all() and not math.isnan(value.sum()) for value in found.values())
