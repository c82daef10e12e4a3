"""A node joins while students wait for room: they start there, and `students scale` starts more of them there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sites import DASHBOARD_PORT, RAY, Site, site
from tutelage.runtime.programs import tutelage
from tutelage.trainer.cli import students
from tutelage.trainer.cluster.run_control import read_run_status

STUDENTS = ("ann", "bob", "cid", "dan", "eva", "fay")
DASHBOARD = f"http://127.0.0.1:{DASHBOARD_PORT}"


def submitted(here: Site, steps: int) -> str:
    """A cohort of six of which four may run, submitted as one job; its id."""
    cohort = here.cohort(STUDENTS, (), steps, teacher=None, concurrency=4)
    flags = ["--submit", DASHBOARD, "--submit-token", str(here.folder / "ray.token")]
    submit = here.start("head", "submit", tutelage("train", "--config", str(cohort), *flags))
    assert submit.wait(120) == 0, here.logs()
    said = re.search(r"train-cut-off-[0-9-]+", (here.folder / "head-submit.log").read_text())
    assert said, here.logs()
    return said[0]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_students_that_wait_for_room_start_on_a_node_that_joins(tiny_model: Path, tmp_path: Path) -> None:
    with site(tmp_path, tiny_model, "head", "left", "right") as here:
        run = tmp_path / "run"
        here.start_ray("head")
        here.start_ray("left", cpus=2)
        job = submitted(here, 100_000)

        def trained(names: tuple[str, ...]) -> bool:
            return min(here.steps_done(names)) >= 5

        def waiting() -> list[str]:
            return [each.student for each in read_run_status(run).students if each.phase.startswith("not started yet")]

        here.wait_until("two students train", lambda: sum(step >= 5 for step in here.steps_done(STUDENTS)) == 2, 120)
        here.wait_until("two wait for room", lambda: len(waiting()) == 2, 60)
        late = tuple(waiting())
        assert "it asks for 1 CPU, free now are neither CPUs nor GPUs" in read_run_status(run).student(late[0]).phase
        early = tuple(name for name in STUDENTS[:4] if name not in late)
        assert here.hosts_of(early) == ["left", "left"]

        here.start_ray("right", cpus=4)
        here.wait_until("all four train", lambda: trained(STUDENTS[:4]), 120)
        assert here.hosts_of(late) == ["right", "right"]
        assert students(["scale", "6", "--output", str(run)]) == 0
        here.wait_until("all six train", lambda: trained(STUDENTS), 120)
        assert here.hosts_of(STUDENTS[4:]) == ["right", "right"]

        stop = here.start("head", "stop", [RAY, "job", "stop", "--no-wait", "--address", DASHBOARD, job])
        assert stop.wait(120) == 0, here.logs()
        here.wait_until("the end", lambda: read_run_status(run).ended, 60)
        assert {each.state for each in read_run_status(run).students} == {"interrupted"}
