"""The status and the commands of a run, and what the supervisor makes of them; without Ray."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from trainer_cases import student_config, write_rows
from tutelage.errors import ConfigurationError, NotFound, Unreachable
from tutelage.trainer.cli import students as main
from tutelage.trainer.cluster import run_control, supervisor
from tutelage.trainer.cluster.run_control import (
    Command,
    RunControl,
    RunStatus,
    StudentStatus,
    read_run_status,
    send_command,
)
from tutelage.trainer.config.run import CohortConfig
from tutelage.trainer.metrics.progress import ActorStatus, Outcome, Progress


def status_of(ended: bool = False, age_seconds: float = 0.0, concurrency: int = 2) -> RunStatus:
    rows = tuple(StudentStatus(name, "running", 3, 6, "sampling", 1, {"train/loss": 0.5}) for name in ("ann", "bob"))
    return RunStatus("run", concurrency, time.time() - age_seconds, ended, rows)


class SupervisorThread:
    """Reads the box as a supervisor does, and remembers."""

    def __init__(self, output: Path) -> None:
        self.box, self.taken = RunControl(output), []
        self.box.publish(status_of())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._turn)

    def _turn(self) -> None:
        while not self._stop.wait(0.02):
            commands = self.box.take()
            self.taken += commands
            self.box.publish(status_of(concurrency=7 if commands else 2))

    def __enter__(self) -> SupervisorThread:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def test_a_command_reaches_the_supervisor_and_is_answered_by_the_status_after_it(tmp_path):
    with SupervisorThread(tmp_path) as listening:
        send_command(tmp_path, Command("pause", "ann"))
        assert main(["scale", "3", "--output", str(tmp_path), "--json"]) == 0
    assert listening.taken == [Command("pause", "ann"), Command("scale", concurrency=3)]


def test_the_list_is_a_table_or_json(tmp_path, capsys):
    RunControl(tmp_path).publish(status_of())
    assert main(["list", "--output", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "run run (on), 2 at once" in text
    assert all(cell in text for cell in ("ann", "3/6", "0.500", "sampling"))
    assert main(["list", "--output", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["students"][1]["student"] == "bob"


def test_what_cannot_be_asked_is_refused(tmp_path, monkeypatch):
    with pytest.raises(NotFound, match="not the folder of a run"):
        main(["list", "--output", str(tmp_path / "elsewhere")])
    box = RunControl(tmp_path)
    box.publish(status_of())
    with pytest.raises(NotFound, match="it has ann, bob"):
        main(["pause", "../ann", "--output", str(tmp_path)])
    with pytest.raises(ConfigurationError, match="at least 1"):
        main(["scale", "0", "--output", str(tmp_path)])
    monkeypatch.setattr(run_control, "_ANSWER_SECONDS", 0.3)
    with pytest.raises(Unreachable, match="took no command"):
        main(["stop", "ann", "--output", str(tmp_path)])
    assert box.take() == []  # It was taken back.
    for gone in (status_of(ended=True), status_of(age_seconds=60)):
        box.publish(gone)
        with pytest.raises(Unreachable, match="not on"):
            main(["stop", "ann", "--output", str(tmp_path)])


def test_a_new_supervisor_does_not_obey_what_was_meant_for_its_predecessor(tmp_path):
    (tmp_path / "commands").mkdir()
    (tmp_path / "commands" / "1.json").write_text(json.dumps({"action": "stop", "student": "ann"}))
    RunControl(tmp_path).publish(status_of())
    assert RunControl(tmp_path).take() == []


class Actor:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def __getattr__(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(remote=lambda: self.told.append(name))


@pytest.fixture
def cohort(tiny_model, tmp_path, monkeypatch):
    """Three students, two at once, with actors that only listen."""
    monkeypatch.setattr(supervisor, "_create_actor", lambda student, config: Actor())
    data = write_rows(tmp_path / "rows.jsonl", 4)
    students = [student_config(tiny_model, data, id=name) for name in ("ann", "bob", "cid")]
    return supervisor._Cohort(CohortConfig(output=tmp_path / "run", concurrency=2, students=tuple(students)))


def states(cohort: supervisor._Cohort) -> list[str]:
    return [student.state for student in cohort.students]


def tell(cohort: supervisor._Cohort, *commands: Command) -> None:
    for command in commands:
        cohort._obey(command)
    cohort._balance()


def test_as_many_run_as_may_and_those_beyond_yield_and_return(cohort):
    tell(cohort)
    assert states(cohort) == ["running", "running", "queued"]
    tell(cohort, Command("scale", concurrency=1))
    ann, bob, _ = cohort.students
    assert (ann.wanted, bob.wanted) == ("run", "yield")
    supervisor._end(bob, Outcome("bob", 2, False, None))
    tell(cohort)
    assert states(cohort) == ["running", "queued", "queued"]
    tell(cohort, Command("scale", concurrency=3))
    assert states(cohort) == ["running"] * 3
    assert [student.wanted for student in cohort.students] == ["run"] * 3


def test_a_stopped_student_stays_so_until_it_is_resumed(cohort):
    tell(cohort, Command("stop", "cid"))
    ann, _, cid = cohort.students
    assert states(cohort) == ["running", "running", "stopped"]
    tell(cohort, Command("stop", "ann"))
    supervisor._end(ann, Outcome("ann", 2, False, None))
    tell(cohort, Command("resume", "cid"))
    assert states(cohort) == ["stopped", "running", "running"]
    supervisor._end(cid, Outcome("cid", 6, True, None))
    tell(cohort, Command("resume", "cid"))
    assert cid.state == "finished"


def test_an_actor_is_told_again_until_it_does_what_is_wanted(cohort):
    tell(cohort, Command("pause", "ann"))
    ann = cohort.students[0]
    for paused in (False, False, True):  # A restarted actor knows nothing of the pause.
        ann.status = ActorStatus(Progress("ann", 1, 6, "sampling"), paused, 1, 0.0)
        supervisor._steer([ann])
    tell(cohort, Command("resume", "ann"))
    supervisor._steer([ann])
    tell(cohort, Command("stop", "ann"))
    supervisor._steer([ann])
    assert ann.actor.told == ["run", "pause", "pause", "resume", "stop"]


def test_the_status_says_where_everybody_is(cohort, tmp_path):
    tell(cohort)
    ann, bob, _ = cohort.students
    ann.status = ActorStatus(Progress("ann", 1, 6, "sampling", {"train/loss": 0.5}), True, 42, 0.0)
    bob.state, bob.error = "failed", Unreachable("no teacher answers")
    cohort.publish()
    rows = read_run_status(tmp_path / "run").students
    assert rows[0] == StudentStatus("ann", "paused", 1, 6, "sampling", 42, {"train/loss": 0.5})
    assert (rows[1].state, rows[1].phase) == ("failed", "no teacher answers")
    assert (rows[2].state, rows[2].step) == ("queued", 0)
