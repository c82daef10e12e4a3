"""Two served teachers that each know one half of a task, and a student of both that knows the whole."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import yaml

from teacher_process import end, start
from tiny import write_tiny_model
from trainer_cases import metric_rows
from trainer_cohorts import running
from trainer_halves import answers_right, write_halves
from tutelage.evaluator.statistics.paired import mcnemar_exact
from tutelage.trainer.config.student import StudentConfig
from tutelage.trainer.training.loop import train

HALVES = ("sums", "differences")
TEACHER_STEPS, STUDENT_STEPS = 400, 800


def settings(init: Path, data: Path, steps: int, **changes):
    return {
        "init": str(init),
        "data": {"path": str(data)},
        "batch": {"sequences": 16, "micro_batch_sequences": 16, "max_tokens": 96},
        "optimizer": {"learning_rate": 2e-3, "warmup_steps": 20},
        "held_out": {"sequences": 0},
        "steps": steps,
        "save_every_steps": steps,
        **changes,
    }


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_student_of_both_knows_what_each_knows(tmp_path):
    files = write_halves(tmp_path)
    right, servers = {}, []
    try:
        for seed, name in enumerate(HALVES, 1):
            write_tiny_model(tmp_path / "init" / name, seed=seed)
            config = settings(tmp_path / "init" / name, files[name], TEACHER_STEPS, objective={"name": "sft"}, id=name)
            trained = train(StudentConfig.model_validate(config), folder=tmp_path / "trained" / name, teacher=None)
            assert trained.checkpoint is not None
            right[name] = np.array(answers_right(trained.checkpoint, files["both"]))
            servers.append(start(tmp_path / "teacher" / name, trained.checkpoint, "--max-model-len", "512"))
        write_tiny_model(tmp_path / "init" / "both", seed=3)
        objective = {"name": "forward_kl", "signal": "topk", "k": 16}
        cohort = {
            "run": f"halves-{os.getpid()}",
            "output": str(tmp_path / "run"),
            "teachers": {name: {"address": server.address} for name, server in zip(HALVES, servers, strict=True)},
            "students": [
                {"id": "both", **settings(tmp_path / "init/both", files["both"], STUDENT_STEPS, objective=objective)}
            ],
        }
        (tmp_path / "cohort.yaml").write_text(yaml.safe_dump(cohort))
        with running(["train", "--config", str(tmp_path / "cohort.yaml")], tmp_path / "log") as command:
            assert command.wait(900) == 0, (tmp_path / "log").read_text()[-3000:]
    finally:
        for server in servers:
            end(server.process)
    folder = tmp_path / "run/students/both"
    right["both"] = np.array(answers_right(folder / f"checkpoints/step-{STUDENT_STEPS:08d}", files["both"]))
    last = metric_rows(folder)[-1]
    assert all(f"train/{name}/forward_kl" in last for name in HALVES)
    for name, answers in right.items():
        print(f"{name:<12} sums {answers[:240].mean():.1%}, differences {answers[240:].mean():.1%}")
    for name in HALVES:
        test = mcnemar_exact(right["both"], right[name])
        print(f"both against {name}: {test}")
        assert test.only_first > test.only_second
        assert test.p_value < 0.001
