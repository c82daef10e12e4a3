"""Kept ids and the tail bucket: the mass outside, its bounds, and what padding and k = V do to it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from numerics.cases import make_case
from tutelage.trainer.losses import divergences
from tutelage.trainer.losses.losses import token_divergence
from tutelage.trainer.losses.tail_bucket import bucketed_logps, log1mexp, split_kept, tail_logp, teacher_bucketed_logp
from tutelage.trainer.losses.teacher_distribution import TeacherDistribution
from tutelage.trainer.teacher.rows import CandidateRows, TopKRows

LOGITS = arrays(np.float64, (2, 12), elements=st.floats(-7, 7, width=32))


@pytest.mark.parametrize("x", [-1e-12, -1e-6, -0.1, -math.log(2), -1.0, -30.0, -700.0])
def test_log1mexp_is_accurate_at_both_ends(x):
    # ln(1 − exp(x)) from the series of 1 − exp(x) where Python's expm1 would be the same as what is tested.
    expected = math.log(-(x + x * x / 2 + x**3 / 6)) if x > -1e-3 else math.log1p(-math.exp(x))
    assert log1mexp(torch.tensor(x, dtype=torch.float64)).item() == pytest.approx(expected, rel=1e-9)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(LOGITS, LOGITS, st.integers(1, 12))
def test_a_tail_bucket_never_raises_a_divergence(teacher_logits, student_logits, k):
    """Data processing: merging atoms cannot raise an f-divergence."""
    z, s = torch.tensor(teacher_logits), torch.tensor(student_logits)
    largest = z.topk(k, dim=-1)
    teacher = TopKRows(largest.indices, largest.values, z.logsumexp(-1))
    atoms = bucketed_logps(teacher, s, TeacherDistribution())
    whole = z.log_softmax(-1), s.log_softmax(-1)
    for divergence in (
        divergences.forward_kl,
        divergences.reverse_kl,
        lambda p, q: divergences.generalized_jsd(p, q, beta=0.3),
        lambda p, q: divergences.skew_kl(p, q, alpha=0.1),
        lambda p, q: divergences.skew_reverse_kl(p, q, alpha=0.1),
        divergences.total_variation,
    ):
        assert (divergence(*atoms) <= divergence(*whole) + 1e-8).all()
        assert (divergence(*atoms) >= -1e-8).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("kind", ["topk", "candidates"])
def test_all_ids_kept_is_the_whole_vocabulary_with_finite_gradients(kind, temperature):
    case = make_case()
    teacher = getattr(case, kind)(23, temperature)
    distribution = TeacherDistribution(temperature=temperature)
    assert (teacher_bucketed_logp(teacher, 23, distribution)[:, -1] == -math.inf).all()
    hidden = case.hidden_ND.requires_grad_()
    for objective in ("gkd", "tvd", "forward_kl" if kind == "topk" else "reverse_kl"):
        kept, whole = (
            token_divergence(hidden, case.head, rows, objective=objective, distribution=distribution)
            for rows in (teacher, case.teacher)
        )
        torch.testing.assert_close(kept, whole, rtol=1e-10, atol=1e-12)
        found, expected = (torch.autograd.grad(value.sum(), hidden)[0] for value in (kept, whole))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_one_kept_id_is_the_binary_divergence():
    case = make_case()
    teacher = case.topk(1)
    value = token_divergence(
        case.hidden_ND, case.head, teacher, objective="forward_kl", distribution=TeacherDistribution()
    )
    p = case.teacher_logits.softmax(-1).gather(-1, teacher.ids_NK)[:, 0]
    q = case.student_logits.softmax(-1).gather(-1, teacher.ids_NK)[:, 0]
    torch.testing.assert_close(value, p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())


def test_padding_of_candidates_adds_nothing():
    case = make_case()
    short = case.candidates(5)
    pad = torch.full((7, 3), -1)
    for filler in (-math.inf, 99.0):
        long = CandidateRows(
            torch.cat([short.ids_NC, pad], -1),
            torch.cat([short.logits_NC, torch.full((7, 3), filler, dtype=torch.float64)], -1),
            short.logsumexp_N,
        )
        hidden = case.hidden_ND.clone().requires_grad_()
        values = [
            token_divergence(hidden, case.head, teacher, objective="reverse_kl", distribution=TeacherDistribution())
            for teacher in (short, long)
        ]
        torch.testing.assert_close(*values)
        torch.testing.assert_close(*(torch.autograd.grad(value.sum(), hidden) for value in values))


def test_the_students_tail_is_exact_however_small():
    """Of 1 − Σ in float32 nothing would be left of a tail of e⁻³⁰."""
    logits = torch.tensor([[30.0, 0.0, -1.0, -2.0]])
    kept, rest = split_kept(logits, torch.tensor([[0]]))
    expected = math.log(sum(math.exp(x) for x in (0.0, -1.0, -2.0)))
    assert rest.item() == pytest.approx(expected, rel=1e-6)
    assert kept.item() == 30.0


def test_the_teachers_tail_in_float32():
    for tail in (0.5, 1e-2, 1e-4):
        kept = torch.tensor([[math.log1p(-tail)]])
        assert tail_logp(kept).item() == pytest.approx(math.log(tail), abs=2e-3)
    for above_one in (0.0, 1e-6):
        assert tail_logp(torch.tensor([[above_one]])).item() == pytest.approx(math.log(2**-20), rel=1e-3)
