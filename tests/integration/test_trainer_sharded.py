"""A student that its workers share out, as a user starts it: Ray's `TorchTrainer`, a teacher behind gRPC."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from trainer_cases import metric_rows
from trainer_cohorts import assert_finished, running, write_cohort
from trainer_doubles import FaultyServicer, InProcessTeacher, serving

STEPS = 8


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_sharded_student_learns_from_what_it_writes_and_its_checkpoint_loads(tiny_model: Path, tmp_path: Path):
    log = tmp_path / "log"
    with serving(FaultyServicer(InProcessTeacher(tiny_model), tiny_model)) as address:
        cohort = write_cohort(tmp_path, tiny_model, address, STEPS)
        values = yaml.safe_load(cohort.read_text())
        values["defaults"] |= {"objective": {"name": "gkd"}, "held_out": {"sequences": 4, "every_steps": STEPS}}
        values["students"] = [{"id": "ann", "workers": 2, "sharding": "full"}]
        cohort.write_text(yaml.safe_dump(values))
        with running(["train", "--config", str(cohort)], log) as train:
            assert train.wait(240) == 0, log.read_text()[-3000:]
    assert_finished(tmp_path, STEPS, ["ann"])
    folder = tmp_path / "run/students/ann"
    rows = metric_rows(folder)
    assert rows[-1]["heldout/forward_kl"] < rows[0]["heldout/forward_kl"]
    assert sum(row["train/own_sequences"] for row in rows[1:]) > 0
    student = AutoModelForCausalLM.from_pretrained(folder / f"checkpoints/step-{STEPS:08d}", dtype="auto")
    loss = student(torch.tensor([[40, 41, 42, 43]]), labels=torch.tensor([[40, 41, 42, 43]])).loss.item()
    assert student.dtype == torch.bfloat16
    assert math.isfinite(loss)
