"""How `tutelage train` ends when something outside its training decides that: resources, imports, signals; with Ray."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
import yaml

from trainer_cases import write_rows
from trainer_cohorts import running, steps_done, wait_until

# Ray's workers, and nobody else, find no tutelage: as on a node where it is not installed, or not whole.
SITE = """
import sys
if b"default_worker.py" in open("/proc/self/cmdline", "rb").read():
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "tutelage.trainer.cluster.student_actor":
                raise ImportError("libfoo.so.1 is missing")
    sys.meta_path.insert(0, Broken())
"""


def cohort(folder: Path, model: Path, **student: object) -> Path:
    """One fine-tuning, of prompts some of which are too long."""
    rows = write_rows(folder / "rows.jsonl", 20).read_text()
    (folder / "rows.jsonl").write_text(rows + json.dumps({"prompt": "apples " * 90, "completion": "4"}) + "\n")
    defaults = {
        "init": str(model),
        "data": {"path": str(folder / "rows.jsonl")},
        "objective": {"name": "sft"},
        "batch": {"sequences": 2, "max_tokens": 64},
        "held_out": {"sequences": 0},
        "steps": 100_000,
        "save_every_steps": 50_000,
    }
    values = {"run": f"ends-{os.getpid()}", "output": str(folder / "run"), "teacher": None, "defaults": defaults}
    path = folder / "cohort.yaml"
    path.write_text(yaml.safe_dump(values | {"students": [{"id": "ann", **student}]}))
    return path


def state(folder: Path) -> tuple[str, bool]:
    status = json.loads((folder / "run/students.json").read_text())
    return status["students"][0]["state"], status["ended"]


def test_sigterm_saves_marks_the_run_and_says_how_to_go_on(tiny_model, tmp_path):
    log, file, student = tmp_path / "log", cohort(tmp_path, tiny_model), tmp_path / "run/students/ann"
    with running(["train", "--config", str(file)], log) as train:
        wait_until(lambda: steps_done(student) >= 2, 120, log, train)
        train.send_signal(signal.SIGTERM)
        assert train.wait(60) == 143, log.read_text()[-3000:]
    said = log.read_text()
    assert "Traceback" not in said
    assert said.splitlines()[-1] == (
        "tutelage train: terminated; students are saved after their last whole step; to go on: "
        f"tutelage train --config {file}"
    )
    assert state(tmp_path) == ("interrupted", True)
    (saved,) = (student / "checkpoints").glob("step-*/MANIFEST.json")
    assert int(saved.parent.name[5:]) == steps_done(student)
    # Rows that were left out: on the terminal, in the run's folder, in the student's log.
    cost = "1 of 21 rows are left out: their prompt alone fills 64 tokens (batch.max_tokens)"
    assert f"ann: {cost}" in said
    assert json.loads((student / "data.json").read_text())["dropped_prompts"] == 1
    assert cost in (student / "student.log").read_text()
    assert "Ray's dashboard is not served; --ray.dashboard true serves it" in said


@pytest.mark.long
def test_a_gpu_that_is_not_there_is_said_within_seconds(tiny_model, tmp_path):
    log = tmp_path / "log"
    with running(["train", "--config", str(cohort(tmp_path, tiny_model, gpus=1))], log) as train:
        wait_until(lambda: "run ends-" in log.read_text(), 60, log, train)
        assert train.wait(60) == 2, log.read_text()[-3000:]
    line = log.read_text().splitlines()[-1]
    assert re.search(
        r"ann asks for 1 GPU and 1 CPU \(gpus, threads, workers\), which the cluster has not: 1 CPU;", line
    )
    assert state(tmp_path) == ("failed", True)


@pytest.mark.long
def test_a_process_that_cannot_import_its_student_is_said_within_ten_seconds(tiny_model, tmp_path, monkeypatch):
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(SITE)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))  # which `running` hands on
    log = tmp_path / "log"
    with running(["train", "--config", str(cohort(tmp_path, tiny_model))], log) as train:
        wait_until(lambda: "ann, step 0" in log.read_text(), 60, log, train)
        began = time.monotonic()
        assert train.wait(60) == 2, log.read_text()[-3000:]
    assert time.monotonic() - began < 10
    assert "student ann cannot start where Ray runs it: ImportError: libfoo.so.1 is missing" in log.read_text()
