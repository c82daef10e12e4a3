"""Kill -9 of a writer, of its student, of their teacher while sequences are written: the run is the undisturbed one.

The form that runs always: tests/integration/test_trainer_writers.py, in which writers die.
"""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest
import yaml

from killable_teacher import killable_teacher
from trainer_cases import metric_rows
from trainer_cohorts import assert_finished, free_port, process_of, running, steps_done, wait_until, write_cohort

STEPS = 120


def writer_of(folder: Path, number: int) -> int:
    """The process of a writer, as its student said last."""
    said = re.findall(rf"student-ann-writer-{number} is process (\d+)", (folder / "student.log").read_text())
    return int(said[-1])


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_run_whose_writer_student_and_teacher_are_killed_is_the_undisturbed_one(tiny_model, tmp_path):
    address = f"127.0.0.1:{free_port()}"
    found = {}
    with killable_teacher(tiny_model, address) as teacher:
        for name in ("killed", "undisturbed"):
            (tmp_path / name).mkdir()
            cohort, log = write_cohort(tmp_path / name, tiny_model, address, STEPS), tmp_path / name / "log"
            values = yaml.safe_load(cohort.read_text()) | {"run": f"{name}-{os.getpid()}", "students": [{"id": "ann"}]}
            values["defaults"] |= {
                "objective": {"name": "gkd", "on_policy_fraction": 1.0},
                "sampling": {"max_new_tokens": 60, "max_staleness": 2, "writers": {"count": 2}},
            }
            cohort.write_text(yaml.safe_dump(values))
            folder = tmp_path / name / "run/students/ann"
            with running(["train", "--config", str(cohort)], log) as train:
                for number, whom in enumerate(("writer", "teacher", "student", "writer") if name == "killed" else ()):
                    goal = max(0, steps_done(folder)) + 8
                    wait_until(lambda: steps_done(folder) >= goal, 150, log, train)  # noqa: B023
                    time.sleep(0.037 * number)  # not always at the same place of a step
                    if whom == "teacher":
                        teacher.kill()
                        teacher.start()
                    else:
                        process = process_of(folder) if whom == "student" else writer_of(folder, number % 2)
                        os.kill(process, signal.SIGKILL)
                assert train.wait(250) == 0, log.read_text()[-3000:]
            assert_finished(tmp_path / name, STEPS, ["ann"])
            found[name] = metric_rows(folder)
            said = (folder / "student.log").read_text()
            assert ("what it had begun is written again" in said) == (name == "killed")
    assert found["killed"] == found["undisturbed"]
    assert [row["train/staleness"] for row in found["killed"][1:]] == [min(step, 2) for step in range(STEPS)]
