"""Which tokens of a sequence are learned from: any of them, whichever teacher answers, in loss, rows and targets."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trainer_doubles import InProcessTeacher
from tutelage.trainer.config.student import OptimizerConfig
from tutelage.trainer.data.sequences import TokenSequence, token_sequence
from tutelage.trainer.model.student import Student
from tutelage.trainer.teacher.base import SignalSpec
from tutelage.trainer.teacher.to_tensors import positions, row_counts, targets_of, teacher_rows, unembedding_of

IDS = np.arange(40, 52, dtype=np.int32)
TURNS = np.array([0, 0, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0], bool)


def sequence(mask, **settings) -> TokenSequence:
    return token_sequence(IDS[:6], IDS[6:], mask=mask, **{"loss_on_prompt": False, **settings})


def test_rows_are_those_before_the_tokens_that_are_learned_from():
    masked = sequence(TURNS)
    assert masked.positions.tolist() == [1, 2, 6, 7, 8]
    assert (masked.start, masked.end, masked.rows) == (1, 9, 5)
    assert masked.targets.tolist() == IDS[TURNS].tolist()


def test_a_mask_of_the_completion_is_no_mask():
    own = np.arange(12) >= 6
    assert sequence(own).mask is None
    assert sequence(own).positions.tolist() == sequence(None).positions.tolist() == list(range(5, 11))
    assert sequence(own, loss_on_last_token=True).end == 12
    assert sequence(TURNS, loss_on_prompt=True).positions.tolist() == list(range(11))


def test_the_last_position_has_a_row_without_a_target():
    masked = sequence(TURNS, loss_on_last_token=True)
    assert masked.positions.tolist() == [1, 2, 6, 7, 8, 11]
    assert masked.targets.tolist() == IDS[TURNS].tolist()


@pytest.fixture(scope="module")
def teacher(tiny_model):
    return InProcessTeacher(tiny_model)


@pytest.mark.parametrize(
    "spec", [SignalSpec("hidden"), SignalSpec("topk", 5, (1.0,)), SignalSpec("candidates", 0, (1.0,))]
)
def test_a_teachers_answer_is_cut_to_the_rows_that_are_learned_from(spec, teacher):
    from dataclasses import replace

    masked, whole = sequence(TURNS), token_sequence(IDS[:1], IDS[1:], loss_on_prompt=True)
    if spec.kind == "candidates":
        masked = replace(masked, candidate_ids_RC=(np.arange(24) % 19).reshape(8, 3).astype(np.int32))
        whole = replace(masked, mask=None)
    head, device = unembedding_of(teacher.unembedding(), torch.device("cpu")), torch.device("cpu")
    one = teacher_rows([masked, masked], teacher.score([masked, masked], spec), head, device)
    all_ = teacher_rows([whole], teacher.score([whole], spec), head, device)
    assert len(one) == 2 * masked.rows == int(row_counts([masked, masked]).sum())
    chosen = all_.at(torch.from_numpy(np.tile(masked.positions - whole.start, 2)))
    for name in {"hidden": ["hidden_ND"], "topk": ["ids_NK", "logits_NK"], "candidates": ["ids_NC", "logits_NC"]}[
        spec.kind
    ]:
        assert torch.equal(getattr(one, name), getattr(chosen, name))
    assert torch.equal(one.position_N, torch.from_numpy(np.tile(masked.positions, 2)))
    if spec.kind != "hidden":
        assert torch.equal(one.target_logits_N, chosen.target_logits_N)


def test_the_student_sees_the_same_rows(tiny_model):
    student = Student(tiny_model, dtype="float32", optimizer=OptimizerConfig(), vocabulary_size=512)
    masked, whole = sequence(TURNS), token_sequence(IDS[:1], IDS[1:], loss_on_prompt=True)
    both = student.hidden([masked, whole])
    assert torch.equal(both[: masked.rows], student.hidden([whole, whole])[: whole.rows][masked.positions])
    assert targets_of([masked, whole]).tolist() == [*IDS[TURNS], *IDS[1:]]
    assert positions([masked]).tolist() == masked.positions.tolist()
    assert student.likeliest_ids(masked, 3).shape == (8, 3)
