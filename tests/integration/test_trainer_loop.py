"""Whole trainings in this process, with a tiny real model and a teacher without network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from trainer_cases import metric_rows, student_config, write_rows
from trainer_doubles import InProcessTeacher

from trainer.carve import carve
from trainer.control import Control
from trainer.loop import Progress, train


@pytest.fixture(scope="module")
def teacher(tiny_model: Path) -> InProcessTeacher:
    return InProcessTeacher(tiny_model)


@pytest.fixture(scope="module")
def student(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    carve(tiny_model, folder, layers=2)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


def stop_after(step: int, control: Control):
    """A reporter that asks for a stop once so many steps are done."""

    def report(progress: Progress) -> None:
        if progress.step >= step:
            control.stop()

    return report


def files_equal(left: Path, right: Path) -> None:
    for name in ("model.safetensors", "trainer_state.safetensors"):
        one, other = load_file(left / name), load_file(right / name)
        assert one.keys() == other.keys()
        for key, tensor in one.items():
            assert torch.equal(tensor, other[key]), f"{name}: {key}"


OBJECTIVES = [
    {"name": "sft"},
    {"name": "forward_kl", "signal": "topk", "k": 8, "temperature": 2.0},
    {"name": "reverse_kl", "temperature": 2.0, "noise": 0.5},
    {"name": "reverse_kl", "signal": "candidates", "k": 8},
    {"name": "gkd", "on_policy_fraction": 0.5},
    {"name": "policy_gradient_kl"},
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: "-".join(map(str, objective.values())))
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_resumed_training_equals_an_undisturbed_one_bit_for_bit(objective, dtype, teacher, student, data, tmp_path):
    config = student_config(student, data, objective=objective, dtype=dtype)
    whole = train(config, folder=tmp_path / "whole", teacher=teacher)
    control = Control()
    stopped = train(config, folder=tmp_path / "parts", teacher=teacher, report=stop_after(3, control), control=control)
    assert not stopped.finished
    assert stopped.step == 3
    resumed = train(config, folder=tmp_path / "parts", teacher=teacher)
    assert resumed.finished
    assert metric_rows(tmp_path / "parts") == metric_rows(tmp_path / "whole")
    files_equal(whole.checkpoint, resumed.checkpoint)
