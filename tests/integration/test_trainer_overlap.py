"""The teacher scores while the student steps: what is learned changes only by what `max_staleness` allows."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from trainer_cases import metric_rows, student_config, write_rows
from trainer_doubles import InProcessTeacher
from tutelage.trainer.model.layer_pruning import prune_layers
from tutelage.trainer.model.student import Student
from tutelage.trainer.training.control import Control
from tutelage.trainer.training.loop import train

STEPS = 6
OWN = {"name": "gkd", "on_policy_fraction": 1.0}


class NotingTeacher(InProcessTeacher):
    """Tells when it has scored a batch."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.batches_scored = 0
        self.scored = threading.Condition()

    def score(self, requests, spec):
        signals = super().score(requests, spec)
        with self.scored:
            self.batches_scored += 1
            self.scored.notify_all()
        return signals


@pytest.fixture(scope="module")
def teacher(tiny_model: Path) -> NotingTeacher:
    return NotingTeacher(tiny_model)


@pytest.fixture(scope="module")
def folders(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A student and its data."""
    base = tmp_path_factory.mktemp("overlap")
    prune_layers(tiny_model, base / "init", layers=2)
    return base / "init", write_rows(base / "rows.jsonl")


def staleness(folder: Path) -> list[float]:
    return [row["train/staleness"] for row in metric_rows(folder) if "train/staleness" in row]


@pytest.mark.parametrize(
    ("changes", "ahead"),
    [
        ({"objective": {"name": "forward_kl"}}, 1),
        ({"objective": {"name": "forward_kl", "signal": "topk", "k": 8}}, 1),
        ({"objective": {"name": "reverse_kl", "signal": "candidates", "k": 8}}, 0),
        ({"objective": OWN}, 0),
        ({"objective": OWN, "sampling": {"max_staleness": 2}}, 2),
    ],
)
def test_so_many_batches_are_scored_before_a_step_is_taken(changes, ahead, teacher, folders, tmp_path, monkeypatch):
    """Each step waits until the teacher has scored as many batches as may be begun by then."""
    step, steps_begun = Student.step, []
    before = teacher.batches_scored + 1  # The held-out sequences.

    def step_after_scoring(self: Student, learning_rate: float) -> float:
        steps_begun.append(len(steps_begun))
        expected = before + min(steps_begun[-1] + 1 + ahead, STEPS)
        with teacher.scored:
            assert teacher.scored.wait_for(lambda: teacher.batches_scored >= expected, timeout=60)
            assert teacher.batches_scored == expected
        return step(self, learning_rate)

    monkeypatch.setattr(Student, "step", step_after_scoring)
    assert train(student_config(*folders, **changes), folder=tmp_path, teacher=teacher).finished
    assert len(steps_begun) == STEPS


@pytest.mark.parametrize("allowed", [0, 1, 3])
def test_sequences_are_as_old_as_allowed_and_no_older(allowed, teacher, folders, tmp_path):
    config = student_config(*folders, objective=OWN, sampling={"max_staleness": allowed}, dtype="float32")
    train(config, folder=tmp_path, teacher=teacher)
    assert staleness(tmp_path) == [min(step, allowed) for step in range(STEPS)]
    measured = [row["train/sampler_kl"] for row in metric_rows(tmp_path) if "train/sampler_kl" in row]
    # The first batch is the present weights' in any case; the second one's are one step older, if they may be.
    assert measured[0] < 1e-9
    assert all(value > 1e-4 if allowed else value < 1e-9 for value in measured[1:]), measured


def test_a_batch_that_older_weights_wrote_is_what_they_would_have_written(teacher, folders, tmp_path):
    """Without updates all weights are the same, and so is what they write, whenever they do."""
    frozen = {"learning_rate": 1e-30, "warmup_steps": 0}
    for allowed in (0, 2):
        config = student_config(
            *folders, objective=OWN, sampling={"max_staleness": allowed}, optimizer=frozen, dtype="float32"
        )
        train(config, folder=tmp_path / str(allowed), teacher=teacher)
    fresh, stale = (metric_rows(tmp_path / name) for name in ("0", "2"))
    assert [row.get("train/loss") for row in fresh] == [row.get("train/loss") for row in stale]
    assert staleness(tmp_path / "2")[-1] == 2


def test_resumed_with_batches_of_older_weights_it_equals_an_undisturbed_training_bit_for_bit(
    teacher, folders, tmp_path
):
    objective = {"name": "gkd", "on_policy_fraction": 0.5, "noise": 0.5}
    config = student_config(*folders, objective=objective, sampling={"max_staleness": 2})
    whole = train(config, folder=tmp_path / "whole", teacher=teacher)
    control = Control()

    def stop(progress) -> None:
        if progress.step >= 3:
            control.stop()

    stopped = train(config, folder=tmp_path / "parts", teacher=teacher, report=stop, control=control)
    assert stopped.step == 3
    kept = json.loads((stopped.checkpoint / "state.json").read_text())["rollouts"]
    assert [(batch["step"], batch["weights_version"]) for batch in kept] == [(3, 1), (4, 2)]
    resumed = train(config, folder=tmp_path / "parts", teacher=teacher)
    assert metric_rows(tmp_path / "parts") == metric_rows(tmp_path / "whole")
    left, right = (load_file(done.checkpoint / "trainer_state.st") for done in (whole, resumed))
    assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())


@pytest.mark.parametrize(
    ("objective", "remedy"),
    [
        ({"name": "policy_gradient_kl"}, "use reverse_kl"),
        ({"name": "reverse_kl", "signal": "candidates", "on_policy_fraction": 1.0}, "use signal: hidden"),
    ],
)
def test_what_needs_the_present_weights_is_refused_with_older_ones(objective, remedy, folders):
    with pytest.raises(ValidationError, match=remedy):
        student_config(*folders, objective=objective, sampling={"max_staleness": 1})
    assert student_config(*folders, objective=objective).sampling.max_staleness == 0
