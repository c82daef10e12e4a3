"""Kill -9 of trainers in the middle of `tutelage train`: everybody finishes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from trainer_cases import metric_rows
from trainer_cohorts import assert_finished, process_of, running, steps_done, wait_until, write_cohort
from trainer_doubles import FaultyServicer, InProcessTeacher, serving
from tutelage.errors import Unreachable
from tutelage.trainer.cli import students as students_command


def kill_and_time(folder: Path, log: Path, train: subprocess.Popen[bytes]) -> float:
    """Seconds from the kill of a student's process until its successor is further than it was."""
    os.kill(process_of(folder), signal.SIGKILL)
    killed_at, done = time.monotonic(), steps_done(folder)
    wait_until(lambda: steps_done(folder) > done, 60, log, train)
    return time.monotonic() - killed_at


def test_killed_trainers_go_on_from_their_checkpoints(tiny_model, tmp_path):
    steps = 60
    log = tmp_path / "log"
    with serving(FaultyServicer(InProcessTeacher(tiny_model), tiny_model)) as address:
        cohort = write_cohort(tmp_path, tiny_model, address, steps)
        ann, bob = (tmp_path / "run/students" / name for name in ("ann", "bob"))
        with running(["train", "--config", str(cohort)], log) as train:
            wait_until(lambda: min(steps_done(ann), steps_done(bob)) >= 12, 120, log, train)
            neighbour = process_of(bob)
            seconds = kill_and_time(ann, log, train)
            assert process_of(bob) == neighbour
            assert train.wait(120) == 0, log.read_text()[-3000:]
    assert_finished(tmp_path, steps)
    print(f"back after {seconds:.1f} s")
    assert seconds < 30  # on two cores that others may use; what a quiet machine shows is in docs/ray.md


@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_student_that_comes_back_learns_what_its_neighbour_does(tiny_model, tmp_path):
    steps, log = 400, tmp_path / "log"
    ann, bob = (tmp_path / "run/students" / name for name in ("ann", "bob"))
    with serving(FaultyServicer(InProcessTeacher(tiny_model), tiny_model)) as address:
        cohort = write_cohort(tmp_path, tiny_model, address, steps)
        values = yaml.safe_load(cohort.read_text()) | {"students": [{"id": "ann"}, {"id": "bob"}]}
        values["defaults"] |= {"objective": {"name": "forward_kl"}}  # What students write depends on who they are.
        cohort.write_text(yaml.safe_dump(values))
        with running(["train", "--config", str(cohort)], log) as train:
            wait_until(lambda: min(steps_done(ann), steps_done(bob)) >= 1, 120, log, train)
            for _ in range(2):
                print(f"back after {kill_and_time(ann, log, train):.1f} s")
            assert train.wait(200) == 0, log.read_text()[-3000:]
    assert_finished(tmp_path, steps)
    assert [row | {"student": "bob"} for row in metric_rows(ann)] == metric_rows(bob)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_eight_students_of_which_one_is_killed_every_five_seconds_all_finish(tiny_model, tmp_path):
    steps, names, kills = 300, [f"student-{number}" for number in range(8)], 0
    log, randomness = tmp_path / "log", random.Random(0)
    folders = {name: tmp_path / "run/students" / name for name in names}
    with serving(FaultyServicer(InProcessTeacher(tiny_model), tiny_model)) as address:
        cohort = write_cohort(tmp_path, tiny_model, address, steps)
        values = yaml.safe_load(cohort.read_text()) | {"students": [{"id": name} for name in names]}
        cohort.write_text(yaml.safe_dump(values))
        with running(["train", "--config", str(cohort)], log) as train:
            wait_until(lambda: min(map(steps_done, folders.values())) >= 1, 200, log, train)
            end = time.monotonic() + 120
            while time.monotonic() < end:
                # What a lock says stays there when its holder has died: only processes of Ray are victims.
                living = [process_of(folder) for folder in folders.values() if steps_done(folder) < steps]
                victims = [pid for pid in living if psutil.pid_exists(pid) and psutil.Process(pid).name()[:4] == "ray:"]
                if victims:
                    os.kill(randomness.choice(victims), signal.SIGKILL)
                    kills += 1
                time.sleep(5)
            assert train.wait(250) == 0, log.read_text()[-3000:]
    assert_finished(tmp_path, steps, names)
    print(f"{kills} kills")
    assert kills >= 15


@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_student_with_two_workers_is_steered_and_killed_and_learns_what_its_neighbour_does(tiny_model, tmp_path):
    steps, log, output = 150, tmp_path / "log", tmp_path / "run"
    ann, bob = (output / "students" / name for name in ("ann", "bob"))
    with serving(FaultyServicer(InProcessTeacher(tiny_model), tiny_model)) as address:
        cohort = write_cohort(tmp_path, tiny_model, address, steps)
        values = yaml.safe_load(cohort.read_text()) | {"students": [{"id": "ann", "workers": 2}, {"id": "bob"}]}
        values["defaults"] |= {"dtype": "float32", "objective": {"name": "forward_kl"}}
        cohort.write_text(yaml.safe_dump(values))
        with running(["train", "--config", str(cohort)], log) as train:
            wait_until(lambda: steps_done(ann) >= 7, 150, log, train)
            students("pause", "ann", output=output)
            time.sleep(2.0)
            standing = steps_done(ann)
            time.sleep(2.0)
            assert steps_done(ann) == standing
            assert students("list", output=output)["ann"]["state"] == "paused"
            students("resume", "ann", output=output)
            wait_until(lambda: steps_done(ann) > standing, 60, log, train)
            seconds = kill_and_time(ann, log, train)
            assert train.wait(150) == 0, log.read_text()[-3000:]
    assert_finished(tmp_path, steps)
    print(f"back after {seconds:.1f} s")
    for left, right in zip(metric_rows(ann)[1:20], metric_rows(bob)[1:20], strict=True):
        assert left["train/loss"] == pytest.approx(right["train/loss"], rel=1e-3)
        assert left["train/tokens"] == right["train/tokens"]


def students(action: str, *options: str, output: Path) -> dict[str, dict[str, Any]]:
    """The status of each student, after `tutelage students …`."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert students_command([action, *options, "--output", str(output), "--json"]) == 0
    return {row["student"]: row for row in json.loads(printed.getvalue())["students"]}


def test_a_run_is_steered_while_it_is_on_and_an_interrupt_leaves_nothing(tiny_model, tmp_path):
    log, output = tmp_path / "log", tmp_path / "run"
    with serving(FaultyServicer(InProcessTeacher(tiny_model), tiny_model)) as address:
        cohort = write_cohort(tmp_path, tiny_model, address, 5000)
        values = yaml.safe_load(cohort.read_text()) | {"concurrency": 1}
        cohort.write_text(yaml.safe_dump(values))

        with running(["train", "--config", str(cohort)], log) as train:

            def wait_for(student: str, state: str) -> None:
                wait_until(lambda: students("list", output=output)[student]["state"] == state, 60, log, train)

            ann, bob = (output / "students" / name for name in ("ann", "bob"))
            wait_until(lambda: steps_done(ann) >= 2, 120, log, train)
            assert students("pause", "ann", output=output)["bob"]["state"] == "queued"
            wait_for("ann", "paused")
            standing = steps_done(ann)
            students("scale", "2", output=output)
            wait_until(lambda: steps_done(bob) >= 2, 60, log, train)
            assert steps_done(ann) == standing
            students("resume", "ann", output=output)
            wait_until(lambda: steps_done(ann) > standing, 60, log, train)
            students("scale", "1", output=output)
            wait_for("bob", "queued")  # It saved, and waits for its turn.
            assert list((bob / "checkpoints").glob("step-*/MANIFEST.json"))
            students("stop", "ann", output=output)
            wait_for("ann", "stopped")
            wait_for("bob", "running")

            # Interrupted, a run ends with 130 and leaves no process.
            family = psutil.Process(train.pid).children(recursive=True)
            assert family
            os.killpg(train.pid, signal.SIGINT)  # As a terminal does: the whole group gets it.
            assert train.wait(60) == 130, log.read_text()[-3000:]
            _, alive = psutil.wait_procs(family, timeout=20)
            assert not alive
    assert students("list", output=output)["bob"]["state"] == "interrupted"
    assert log.read_text().splitlines()[-1].endswith(f"to go on: tutelage train --config {cohort}")
    assert "Traceback" not in log.read_text()
    with pytest.raises(Unreachable, match="not on"):
        students("pause", "bob", output=output)
