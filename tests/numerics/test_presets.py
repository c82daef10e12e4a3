"""The released code's losses, written out as whole-batch formulas, equal our parts put together as its presets say.

Softmax at T on both sides, sums over the vocabulary, masks of all tokens that are no padding, then the means.
"""

from __future__ import annotations

import pytest
import torch

from numerics.cases import make_case
from tutelage.trainer.config.presets import PRESETS
from tutelage.trainer.losses.losses import token_divergence
from tutelage.trainer.losses.reductions import reduce_micro_batch_token_mean, reduce_sequence_mean
from tutelage.trainer.losses.teacher_distribution import TeacherDistribution

LENGTHS = [5, 9, 2]
MASK = torch.arange(9) < torch.tensor(LENGTHS)[:, None]


@pytest.fixture(params=[torch.float32, torch.float64])
def batch(request):
    """Rows of three sequences of different lengths, and their logits as padded [B, T, V] tensors."""
    case = make_case(rows=sum(LENGTHS), vocabulary=50, dtype=request.param)
    padded = []
    for logits in (case.student_logits, case.teacher_logits):
        whole = torch.full((3, 9, 50), 7.0, dtype=request.param)
        whole[MASK] = logits
        padded.append(whole)
    return case, *padded


def ours(case, preset, temperature):
    settings = PRESETS[preset]
    value = token_divergence(
        case.hidden_ND,
        case.head,
        case.teacher,
        objective=settings["objective.name"],
        distribution=TeacherDistribution(
            temperature=temperature,
            scale_by_temperature_squared=settings["objective.scale_by_temperature_squared"],
        ),
    )
    if settings["reduction"] == "sequence_mean":
        tokens = torch.repeat_interleave(torch.tensor(LENGTHS), torch.tensor(LENGTHS))
        return reduce_sequence_mean(value, tokens, total_sequences=3)
    return reduce_micro_batch_token_mean(value, micro_batches=1)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_seq_kd(batch, temperature):
    case, student, teacher = batch
    p = (teacher / temperature).softmax(-1) + 1e-9
    log_q = (student / temperature).log_softmax(-1)
    token = (p * (p.log() - log_q)).sum(-1) * MASK
    expected = (token.sum(-1) / MASK.sum(-1)).mean() * temperature**2
    torch.testing.assert_close(ours(case, "paper_code/seq_kd", temperature), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_rev_kd(batch, temperature):
    case, student, teacher = batch
    log_q = (student / temperature).log_softmax(-1)
    token = ((log_q.exp() + 1e-9) * (log_q - (teacher / temperature).log_softmax(-1))).sum(-1) * MASK
    expected = (token.sum(-1) / MASK.sum(-1)).mean() * temperature**2
    torch.testing.assert_close(ours(case, "paper_code/rev_kd", temperature), expected, rtol=1e-5, atol=1e-6)


def test_gkd(batch):
    case, student, teacher = batch
    p, q = teacher.softmax(-1), student.softmax(-1)
    m = 0.5 * q + 0.5 * p
    token = 0.5 * (p * (p.log() - m.log())).sum(-1) + 0.5 * (q * (q.log() - m.log())).sum(-1)
    torch.testing.assert_close(ours(case, "paper_code/gkd", 1.0), token[MASK].sum() / MASK.sum(), rtol=1e-5, atol=1e-6)


def test_code_and_text_differ_where_the_papers_facts_say_so():
    code, text = PRESETS["paper_code/seq_kd"], PRESETS["paper_text/seq_kd"]
    assert (code["objective.name"], text["objective.name"]) == ("paper_code/forward_kl", "seq_kd")
    case = make_case()
    by_name = {
        (name, beta): token_divergence(
            case.hidden_ND,
            case.head,
            case.teacher,
            objective=name,
            parameters={"beta": beta},
            distribution=TeacherDistribution(),
        )
        for name in ("gkd", "paper_code/gkd")
        for beta in (0.5, 0.2)
    }
    torch.testing.assert_close(by_name["gkd", 0.5], by_name["paper_code/gkd", 0.5])
    assert not torch.allclose(by_name["gkd", 0.2], by_name["paper_code/gkd", 0.2], rtol=0.01)
