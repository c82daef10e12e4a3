"""The status and the commands of a run, and what the supervisor makes of them; without Ray."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ray import cloudpickle

from trainer_cases import student_config, write_rows
from tutelage.config import to_yaml, validate
from tutelage.errors import (
    CheckpointError,
    ConfigurationError,
    Conflict,
    DataError,
    NotFound,
    Terminated,
    Unreachable,
)
from tutelage.findings import Finding
from tutelage.manifest import commit
from tutelage.trainer.checkpoint.run_lock import folder_lock
from tutelage.trainer.checkpoint.trainer_state import refuse_other_settings
from tutelage.trainer.cli import main as train
from tutelage.trainer.cli import students as main
from tutelage.trainer.cluster import run_control, supervisor, task_items, working_folder
from tutelage.trainer.cluster.run_control import (
    Command,
    RunControl,
    RunStatus,
    StudentStatus,
    read_run_status,
    send_command,
)
from tutelage.trainer.config.run import CohortConfig
from tutelage.trainer.config.student import StartConfig
from tutelage.trainer.metrics.progress import ActorStatus, Outcome, Progress


def status_of(ended: bool = False, age_seconds: float = 0.0, concurrency: int = 2, started_at_ns: int = 1) -> RunStatus:
    rows = tuple(StudentStatus(name, "running", 3, 6, "sampling", 1, {"train/loss": 0.5}) for name in ("ann", "bob"))
    return RunStatus("run", concurrency, started_at_ns, time.time() - age_seconds, ended, rows)


class SupervisorThread:
    """Takes commands as a supervisor does, and remembers."""

    def __init__(self, output: Path) -> None:
        self.control, self.taken = RunControl(output), []
        self._publish(2)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._turn)

    def _publish(self, concurrency: int) -> None:
        self.control.publish(status_of(concurrency=concurrency, started_at_ns=self.control.started_at_ns))

    def _turn(self) -> None:
        while not self._stop.wait(0.02):
            commands = self.control.take()
            self.taken += commands
            self._publish(7 if commands else 2)

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


def test_of_a_run_that_was_killed_nobody_is_running(tmp_path):
    RunControl(tmp_path).publish(status_of(age_seconds=60))
    assert {student.state for student in read_run_status(tmp_path).students} == {"interrupted"}
    RunControl(tmp_path).publish(status_of())
    assert {student.state for student in read_run_status(tmp_path).students} == {"running"}


def test_what_cannot_be_asked_is_refused(tmp_path, monkeypatch):
    with pytest.raises(NotFound, match="not the folder of a run"):
        main(["list", "--output", str(tmp_path / "elsewhere")])
    control = RunControl(tmp_path)
    control.publish(status_of())
    with pytest.raises(NotFound, match="it has ann, bob"):
        main(["pause", "../ann", "--output", str(tmp_path)])
    with pytest.raises(ConfigurationError, match="at least 1"):
        main(["scale", "0", "--output", str(tmp_path)])
    monkeypatch.setattr(run_control, "_ANSWER_SECONDS", 0.3)
    with pytest.raises(Unreachable, match="took no command"):
        main(["stop", "ann", "--output", str(tmp_path)])
    assert control.take() == []  # It was taken back.
    for gone in (status_of(ended=True), status_of(age_seconds=60)):
        control.publish(gone)
        with pytest.raises(Unreachable, match="not on"):
            main(["stop", "ann", "--output", str(tmp_path)])


def test_a_new_supervisor_does_not_obey_what_was_meant_for_its_predecessor(cohort, tmp_path):
    """In the supervisor's own order: it looks for commands before it publishes for the first time."""
    commands = tmp_path / "run/commands"
    commands.mkdir(parents=True, exist_ok=True)
    for name in ("1.json", "1700000000000000000-1700000000000000001.json"):
        (commands / name).write_text(json.dumps({"action": "stop", "student": "ann"}))
    tell(cohort)
    assert states(cohort) == ["running", "running", "queued"]
    assert not list(commands.iterdir())


def test_a_command_that_the_next_supervisor_finds_is_not_taken_for_obeyed(tmp_path, monkeypatch):
    """The run was started again between the question and the answer."""
    RunControl(tmp_path).publish(status_of(started_at_ns=1))

    def restart(_seconds: float) -> None:
        control = RunControl(tmp_path)
        assert control.take() == []
        control.publish(status_of(started_at_ns=control.started_at_ns))

    monkeypatch.setattr(run_control.time, "sleep", restart)
    with pytest.raises(Unreachable, match="started again meanwhile"):
        send_command(tmp_path, Command("pause", "ann"))


@pytest.mark.parametrize(
    "text",
    [
        '{"action": "stop", "student": "zed"}',
        '{"action": "dance", "student": "ann"}',
        '{"action": "scale", "concurrency": 0}',
        '{"student": "ann"}',
        '{"action": "stop", "stu',
        "[]",
        "\udcff",
    ],
)
def test_what_is_no_command_for_this_run_is_removed_with_a_warning_and_disturbs_nobody(text, cohort, caplog):
    path = leave(cohort, "0", text.encode("utf-8", "surrogateescape"))
    tell(cohort)
    assert states(cohort) == ["running", "running", "queued"]
    assert "is not obeyed" in caplog.text
    assert not path.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"run": "run"}'])
def test_a_status_that_cannot_be_read_is_refused_with_its_file(text, tmp_path):
    (tmp_path / "students.json").write_text(text)
    with pytest.raises(NotFound, match=r"students\.json is not the status of a run"):
        main(["list", "--output", str(tmp_path)])


class Ref:
    """What a remote call returns: it is ready when it has a value."""

    def __init__(self, value: Any = None) -> None:
        self.value = value


class Gone(Exception):
    """An actor's process is, or is being started again."""


class Actor:
    """A student's actor that does at once what it is told, and remembers; a new process of it knows nothing."""

    def __init__(self, name: str) -> None:
        self.name, self.told, self.ended, self.paused, self.step = name, [], Ref(), False, 1

    def ends(self, step: int, *, finished: bool) -> None:
        self.ended.value = Outcome(self.name, step, finished, None)

    def call(self, method: str) -> Ref | None:
        if method == "run":
            return self.ended
        if method == "status":
            return Ref(
                ActorStatus(Progress(self.name, self.step, 6, "sampling", {"train/loss": 0.5}), self.paused, 42, 0.0)
            )
        self.told.append(method)
        self.paused = method == "pause" or (self.paused and method != "resume")
        if method == "stop":
            self.ends(self.step, finished=False)
        return None

    def __getattr__(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(remote=lambda: self.call(name))


@pytest.fixture
def cohort(tiny_model, tmp_path, monkeypatch):
    """Three students, two at once, with actors in this process; Ray is a few functions over them."""

    class RayError(Exception):
        pass

    def get(ref: Ref) -> Any:
        if isinstance(ref.value, Exception):
            error = RayError("\x1b[36mray::run()\x1b[39m\nTraceback …")
            error.cause = None if isinstance(ref.value, Gone) else ref.value
            raise error
        return ref.value

    ray = SimpleNamespace(
        wait=lambda refs, num_returns=1, timeout=0: ([ref for ref in refs if ref.value is not None], []),
        get=get,
        kill=lambda actor: None,
        exceptions=SimpleNamespace(RayError=RayError, RayActorError=RayError),
        nodes=lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}],
        available_resources=lambda: {"CPU": 0.0},
        remote=lambda **_: lambda function: SimpleNamespace(remote=Ref),
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(supervisor, "_POLL_SECONDS", 0.0)
    monkeypatch.setattr(supervisor, "create_actor", lambda student, config, place: Actor(student.id))
    data = write_rows(tmp_path / "rows.jsonl", 4)
    students = [student_config(tiny_model, data, id=name) for name in ("ann", "bob", "cid")]
    return supervisor.Cohort(CohortConfig(output=tmp_path / "run", concurrency=2, students=tuple(students)))


def states(cohort: supervisor.Cohort) -> list[str]:
    return [student.state for student in cohort.students]


def shown(cohort: supervisor.Cohort) -> list[str]:
    return [student.as_status().state for student in cohort.students]


def leave(cohort: supervisor.Cohort, name: str, content: bytes) -> Path:
    path = cohort._config.output / "commands" / f"{cohort._control.started_at_ns}-{name}.json"
    path.write_bytes(content)
    return path


def tell(cohort: supervisor.Cohort, *commands: Command) -> None:
    """Leaves commands, and lets the supervisor take its turns until nobody is told anything new."""
    for number, command in enumerate(commands):
        leave(cohort, str(number), json.dumps(asdict(command)).encode())
    for _ in range(4):
        cohort.turn()


def test_as_many_run_as_may_and_those_beyond_yield_and_return(cohort):
    tell(cohort)
    assert states(cohort) == ["running", "running", "queued"]
    bob = cohort.students[1].actor
    tell(cohort, Command("scale", concurrency=1))
    assert bob.told == ["stop"]
    assert states(cohort) == ["running", "queued", "queued"]
    tell(cohort, Command("scale", concurrency=3))
    assert states(cohort) == ["running"] * 3
    assert [student.wanted for student in cohort.students] == ["run"] * 3
    assert cohort.students[1].actor is not bob


def starting(cohort: supervisor.Cohort, **starts: str) -> supervisor.Cohort:
    """The same cohort, with students that start from others."""
    students = [
        student.model_copy(update={"init": StartConfig(student=starts[student.id])})
        if student.id in starts
        else student
        for student in cohort._config.students
    ]
    return supervisor.Cohort(cohort._config.model_copy(update={"students": tuple(students)}))


def test_a_student_starts_from_another_one_when_that_has_finished(cohort):
    cohort = starting(cohort, ann="cid")
    tell(cohort)
    assert states(cohort) == ["queued", "running", "running"]
    assert cohort.students[0].as_status().phase == "starts when cid has finished"
    folder = cohort._config.folder("cid")
    (folder / "checkpoints/step-00000004").mkdir(parents=True)
    (folder / "outcome.json").write_text('{"step": 4}')
    cohort.students[2].actor.ends(4, finished=True)
    tell(cohort)
    assert states(cohort) == ["running", "running", "finished"]
    assert cohort.students[0].config.init == folder / "checkpoints/step-00000004"


def test_who_would_start_from_a_student_that_failed_or_was_stopped_ends_like_it(cohort):
    cohort = starting(cohort, bob="ann", cid="bob")
    tell(cohort, Command("stop", "ann"))
    assert states(cohort) == ["stopped"] * 3
    assert not cohort.is_on
    tell(cohort, Command("resume", "ann"))
    tell(cohort, Command("resume", "bob"))
    assert states(cohort) == ["running", "queued", "stopped"]
    cohort.students[0].actor.ended.value = DataError("no rows")
    tell(cohort)
    assert states(cohort) == ["failed", "failed", "stopped"]
    assert str(cohort.students[1].error) == "students.init: ann, from which it starts, failed"


def test_a_start_is_a_student_of_the_run_and_there_is_a_first_one(cohort):
    students = [student.model_dump(mode="json") for student in cohort._config.students]
    for starts, message in (({0: 1, 1: 0}, "ann starts from bob starts from ann"), ({0: 3}, "no student of this run")):
        names = ("ann", "bob", "cid", "dan")
        changed = [
            student | ({"init": {"student": names[starts[place]]}} if place in starts else {})
            for place, student in enumerate(students)
        ]
        with pytest.raises(ConfigurationError, match=message):
            validate(CohortConfig, {"students": changed})


def test_a_stopped_student_stays_so_until_it_is_resumed(cohort):
    tell(cohort, Command("stop", "cid"))
    assert states(cohort) == ["running", "running", "stopped"]
    tell(cohort, Command("stop", "ann"))
    tell(cohort, Command("resume", "cid"))
    assert states(cohort) == ["stopped", "running", "running"]
    cid = cohort.students[2]
    cid.actor.ends(6, finished=True)
    tell(cohort, Command("resume", "cid"))
    assert cid.state == "finished"


@pytest.mark.parametrize("order", [("stop", "scale"), ("scale", "stop")])
def test_a_student_that_was_told_to_stop_does_not_train_on_when_fewer_and_then_more_may_run(order, cohort):
    tell(cohort)
    commands = {"stop": Command("stop", "bob"), "scale": Command("scale", concurrency=1)}
    tell(cohort, *(commands[name] for name in order))
    assert states(cohort) == ["running", "stopped", "queued"]
    tell(cohort, Command("scale", concurrency=3))
    assert states(cohort) == ["running", "stopped", "running"]


@pytest.mark.parametrize("order", [("pause", "scale"), ("scale", "pause")])
def test_a_student_that_was_told_to_pause_does_not_train_on_when_fewer_and_then_more_may_run(order, cohort):
    tell(cohort)
    commands = {"pause": Command("pause", "bob"), "scale": Command("scale", concurrency=1)}
    tell(cohort, *(commands[name] for name in order))
    tell(cohort, Command("scale", concurrency=3))
    assert states(cohort) == ["running", "queued", "running"]
    assert shown(cohort) == ["running", "paused", "running"]
    tell(cohort, Command("resume", "bob"))
    assert shown(cohort) == ["running", "running", "running"]
    assert "pause" not in cohort.students[1].actor.told


def test_nobody_yields_for_one_that_is_leaving_anyway(cohort):
    tell(cohort)
    tell(cohort, Command("stop", "ann"), Command("scale", concurrency=1))
    assert states(cohort) == ["stopped", "running", "queued"]
    assert cohort.students[1].actor.told == []


def test_a_student_that_waits_is_not_started_while_it_is_paused(cohort):
    tell(cohort, Command("pause", "cid"))
    cohort.students[0].actor.ends(6, finished=True)
    tell(cohort)
    assert shown(cohort) == ["finished", "running", "paused"]
    tell(cohort, Command("resume", "cid"))
    assert shown(cohort) == ["finished", "running", "running"]


def test_an_actor_is_told_again_until_it_does_what_is_wanted(cohort):
    tell(cohort)
    ann = cohort.students[0]
    tell(cohort, Command("pause", "ann"))
    assert ann.actor.told == ["pause"]
    ann.actor.paused = False  # A restarted actor knows nothing of the pause.
    tell(cohort)
    tell(cohort, Command("resume", "ann"))
    tell(cohort, Command("stop", "ann"))
    assert ann.actor.told == ["pause", "pause", "resume", "stop"]


def test_the_status_says_where_everybody_is(cohort, tmp_path):
    tell(cohort)
    tell(cohort, Command("pause", "ann"))
    _, bob, _ = cohort.students
    bob.state, bob.error = "failed", Unreachable("no teacher answers")
    cohort.publish()
    rows = read_run_status(tmp_path / "run").students
    assert rows[0] == StudentStatus("ann", "paused", 1, 6, "sampling", 42, {"train/loss": 0.5})
    assert (rows[1].state, rows[1].phase) == ("failed", "no teacher answers")
    assert (rows[2].state, rows[2].step) == ("queued", 0)


def with_students(cohort: supervisor.Cohort, **changes: Any) -> supervisor.Cohort:
    """The cohort, its students with other settings, and before its first turn."""
    students = tuple(student.model_copy(update=changes) for student in cohort._config.students)
    return supervisor.Cohort(cohort._config.model_copy(update={"students": students}))


def test_what_the_local_cluster_has_not_ends_a_student_at_once_and_says_what_is_there(cohort, monkeypatch):
    monkeypatch.setattr(Actor, "status", SimpleNamespace(remote=Ref), raising=False)  # never answered
    asking = with_students(cohort, gpus=1.0)
    tell(asking)
    assert states(asking) == ["failed"] * 3
    said = str(asking.students[0].error)
    assert "ann asks for 1 GPU and 1 CPU (gpus, threads, workers), which the cluster has not: 2 CPUs;" in said
    assert asking.students[0].error.exit_code == 2


def test_a_running_cluster_is_waited_for_as_long_as_told(cohort, monkeypatch):
    monkeypatch.setattr(Actor, "status", SimpleNamespace(remote=Ref), raising=False)
    monkeypatch.setattr(supervisor, "_SHORT_SECONDS", 0.0)
    asking = with_students(cohort, gpus=1.0)
    connected = cohort._config.ray.model_copy(update={"address": "auto", "wait_seconds": 60.0})
    asking._config = asking._config.model_copy(update={"ray": connected})
    tell(asking)
    assert states(asking) == ["running", "running", "queued"]
    assert asking.students[0].as_status().phase.startswith("waiting: ann asks for 1 GPU and 1 CPU")
    asking._config = asking._config.model_copy(update={"ray": connected.model_copy(update={"wait_seconds": 0.0})})
    asking.turn()
    assert states(asking)[:2] == ["failed", "failed"]


def test_a_student_whose_start_takes_long_says_what_is_free(cohort, monkeypatch):
    monkeypatch.setattr(Actor, "status", SimpleNamespace(remote=Ref), raising=False)
    monkeypatch.setattr(supervisor, "_LONG_SECONDS", 0.0)
    tell(cohort)
    assert cohort.students[0].as_status().phase == "not started yet: it asks for 1 CPU, free now are 0 CPUs"


def test_an_actor_that_cannot_be_imported_ends_its_student_with_the_import_s_error(cohort, monkeypatch):
    monkeypatch.setattr(Actor, "status", SimpleNamespace(remote=lambda: Ref(Gone())), raising=False)
    monkeypatch.setattr(supervisor, "_IMPORT_SECONDS", 0.0)
    tell(cohort)
    assert states(cohort)[:2] == ["running", "running"]  # restarted for another reason, perhaps
    cohort._imports.value = "ImportError: libfoo.so.1\nis missing"
    tell(cohort)
    assert states(cohort)[:2] == ["failed", "failed"]
    assert "cannot start where Ray runs it: ImportError: libfoo.so.1 is missing; install" in str(
        cohort.students[0].error
    )


def test_the_look_at_imports_on_a_host_that_was_lost_is_made_again(cohort, monkeypatch):
    monkeypatch.setattr(Actor, "status", SimpleNamespace(remote=lambda: Ref(Gone())), raising=False)
    monkeypatch.setattr(supervisor, "_IMPORT_SECONDS", 0.0)
    tell(cohort)
    cohort._imports.value = Gone()
    tell(cohort)
    assert states(cohort)[:2] == ["running", "running"]
    cohort._imports.value = "ImportError: libfoo.so.1"
    tell(cohort)
    assert states(cohort)[:2] == ["failed", "failed"]


def test_imports_that_end_the_process_are_not_looked_at_for_ever(cohort, monkeypatch):
    monkeypatch.setattr(Actor, "status", SimpleNamespace(remote=lambda: Ref(Gone())), raising=False)
    monkeypatch.setattr(supervisor, "_IMPORT_SECONDS", 0.0)
    for _ in range(supervisor._IMPORT_LOOKS):
        assert states(cohort)[:2] in (["queued", "queued"], ["running", "running"])
        tell(cohort)
        cohort._imports.value = Gone()
        tell(cohort)
    assert states(cohort)[:2] == ["failed", "failed"]
    assert "cannot start where Ray runs it: RayError" in str(cohort.students[0].error)


@pytest.mark.parametrize(
    ("raised", "says", "code"),
    [
        (PermissionError(13, "Permission denied", "/x"), "/x: Permission denied", 4),
        (KeyError("choices"), "student ann ended unexpectedly: KeyError: 'choices'; its log is", 1),
        (Gone(), "student ann ended unexpectedly: ray::run(); its log is", 1),
    ],
)
def test_what_an_actor_raised_is_one_line(raised, says, code, cohort):
    tell(cohort)
    cohort.students[0].actor.ended.value = raised
    tell(cohort)
    error = cohort.students[0].error
    assert str(error).removeprefix("students: ").startswith(says)
    assert "\n" not in str(error)
    assert error.exit_code == code


def test_an_interrupt_lets_everybody_save_and_none_stays_running(cohort):
    tell(cohort)
    cohort.students[0].obey("stop")
    tell(cohort)
    told = [student.actor.told for student in cohort.students if student.actor]
    cohort.interrupt(lambda status: None, threading.Event())
    assert all("stop" in each for each in told)
    assert states(cohort) == ["stopped", "interrupted", "interrupted"]
    assert not cohort.is_on


def test_one_that_does_not_save_in_time_is_interrupted_all_the_same(cohort, monkeypatch):
    monkeypatch.setattr(supervisor, "_SAVE_SECONDS", 0.05)
    monkeypatch.setattr(Actor, "stop", SimpleNamespace(remote=lambda: None), raising=False)
    tell(cohort)
    began = time.monotonic()
    cohort.interrupt(lambda status: None, threading.Event())
    assert time.monotonic() - began < 5
    assert states(cohort)[:2] == ["running", "running"]
    cohort.mark_interrupted()
    assert states(cohort) == ["interrupted"] * 3


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)])
def test_a_supervised_run_that_is_ended_by_a_signal_is_marked_and_raises(number, raised, cohort, tmp_path):
    turns = []

    def watch(status: RunStatus) -> None:
        turns.append(status)
        if len(turns) == 4:
            os.kill(os.getpid(), number)

    with pytest.raises(raised):
        supervisor.supervise(cohort._config, watch)
    after = read_run_status(tmp_path / "run")
    assert after.ended
    assert {student.state for student in after.students} == {"interrupted"}


def test_a_second_sigterm_ends_the_saving_between_two_turns(cohort, monkeypatch, tmp_path):
    """And not within one, where Ray would make a SystemError of what its handler raises."""
    monkeypatch.setattr(Actor, "stop", SimpleNamespace(remote=lambda: None), raising=False)
    turns = []

    def watch(status: RunStatus) -> None:
        turns.append("begun")
        if len(turns) in (4, 6):
            os.kill(os.getpid(), signal.SIGTERM)
            turns.append("done")

    began = time.monotonic()
    with pytest.raises(Terminated):
        supervisor.supervise(cohort._config, watch)
    assert time.monotonic() - began < 10
    assert turns.count("done") == 2
    assert {student.state for student in read_run_status(tmp_path / "run").students} == {"interrupted"}


def test_of_a_student_that_was_refused_an_earlier_end_stays_what_is_known(cohort):
    """The teacher is another, or the data: its process finds that out when the run is on already."""
    tell(cohort)
    for student in cohort.students[:2]:
        student.actor.ends(6, finished=True)
    cohort.students[2].obey("stop")
    tell(cohort)
    before = cohort.publish(ended=True).students
    again = supervisor.Cohort(cohort._config)
    again.turn()
    refusal = CheckpointError("this student's training began with other data")
    ann, bob, _ = again.students
    ann.has_begun, ann.actor.ended.value = False, refusal  # Before it took its checkpoint.
    bob.actor.ended.value = refusal  # The disk is full, or the like: it had begun to train.
    tell(again)
    assert ann.was_refused
    assert not bob.was_refused
    assert ann.error is refusal
    after = again.publish().students
    assert after[0] == before[0]
    assert (after[0].state, after[1].state) == ("finished", "failed")


@pytest.fixture
def finished(tiny_model, tmp_path) -> Path:
    """The folder of a run whose student has finished, and its cohort's file beside it."""
    config = student_config(tiny_model, write_rows(tmp_path / "rows.jsonl"), objective={"name": "sft"}, epochs=1)
    values = {"output": str(tmp_path / "run"), "teacher": None, "students": [config.model_dump(mode="json")]}
    (tmp_path / "cohort.yaml").write_text(yaml.safe_dump(values))
    folder = tmp_path / "run/students/ann"
    checkpoint = folder / "checkpoints/step-00000009"
    checkpoint.mkdir(parents=True)
    commit(checkpoint)
    (folder / "student.yaml").write_text(to_yaml(config.model_copy(update={"steps": 9})))
    (tmp_path / "run/cohort.yaml").write_text("run: run\n")
    RunControl(tmp_path / "run").publish(status_of(ended=True))
    return tmp_path


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_rerun_with_other_settings_is_refused_by_name_before_anything_is_written(finished):
    before = everything(finished)
    path = finished / "cohort.yaml"
    values = yaml.safe_load(path.read_text())
    values["students"][0] |= {"seed": 3, "save_every_steps": 1, "objective": {"name": "sft", "temperature": 2.0}}
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(CheckpointError, match=r"ann: .* \(objective\.temperature: 1\.0, now 2\.0; seed: 0, now 3\)"):
        train(["--config", str(path)])
    assert everything(finished) == {**before, str(path): path.read_bytes()}


def test_a_rerun_with_settings_that_change_no_number_is_not_refused(finished):
    config = CohortConfig.model_validate(yaml.safe_load((finished / "cohort.yaml").read_text()))
    (student,) = config.students
    refuse_other_settings(student.model_copy(update={"keep_checkpoints": 7}), config.folder("ann"))
    with pytest.raises(CheckpointError, match="epochs: 1, now 2"):
        refuse_other_settings(student.model_copy(update={"epochs": 2}), config.folder("ann"))


def test_who_wants_more_steps_is_told_how_to_train_on(finished):
    config = CohortConfig.model_validate(yaml.safe_load((finished / "cohort.yaml").read_text()))
    longer = config.for_every_student(steps=20).students[0]
    assert (longer.steps, longer.epochs) == (20, None)
    with pytest.raises(CheckpointError, match=r"steps: 9, now 20.* begin a new run with init: .*/step-00000009$"):
        refuse_other_settings(longer, config.folder("ann"))


def test_a_student_without_a_checkpoint_may_begin_with_other_settings(finished):
    shutil.rmtree(finished / "run/students/ann/checkpoints")
    config = CohortConfig.model_validate(yaml.safe_load((finished / "cohort.yaml").read_text()))
    refuse_other_settings(config.students[0].model_copy(update={"seed": 3}), config.folder("ann"))


@pytest.mark.parametrize("trained", [False, True])
def test_a_cohort_none_of_which_trained_leaves_the_earlier_ones_file(trained, finished, monkeypatch):
    """Its settings are the same; what differs, the data perhaps, its processes find out."""
    refusal = CheckpointError("this student's training began with other data")

    def supervise(config: CohortConfig, _watch: Any) -> list[supervisor.StudentRun]:
        assert yaml.safe_load((config.output / "cohort.yaml").read_text())["run"] == "run"
        return [supervisor.StudentRun(config.students[0], state="failed", error=refusal, has_begun=trained)]

    monkeypatch.setattr(supervisor, "supervise", supervise)
    monkeypatch.setattr(supervisor, "local_or_connected_ray", lambda config: nullcontext(""))
    files = [finished / "run/cohort.yaml", finished / "run/preflight.json"]
    files[1].write_text("{}\n")
    before = [path.read_text() for path in files]
    found = {"ann": [Finding("test items", "ok", "none")]}
    monkeypatch.setattr(task_items, "findings_of_cohort", lambda config: found)
    with pytest.raises(CheckpointError, match="other data"):
        train(["--config", str(finished / "cohort.yaml")])
    assert [path.read_text() == old for path, old in zip(files, before, strict=True)] == [not trained] * 2


def test_two_runs_do_not_write_one_folder(finished):
    before = everything(finished)
    with (
        folder_lock(finished / "run/commands", advice="stop that run", field="output"),
        pytest.raises(Conflict, match=f"process {os.getpid()}"),
    ):
        train(["--config", str(finished / "cohort.yaml")])
    after = everything(finished)
    after.pop(str(finished / "run/commands/lock"))
    assert after == before


def test_an_output_that_cannot_be_written_is_refused_with_its_path(finished):
    (finished / "file").write_text("")
    with pytest.raises(ConfigurationError, match=f"output: .*: {finished}/file is a file"):
        train(["--config", str(finished / "cohort.yaml"), "--output", str(finished / "file/run")])


def test_a_disk_that_is_full_for_a_while_ends_nobody_and_a_command_waits_for_it(cohort, monkeypatch, caplog):
    tell(cohort)
    with monkeypatch.context() as full:

        def refuse(path: Path, _content: str) -> None:
            raise CheckpointError(f"cannot write {path}: no space left")

        full.setattr(run_control, "write_atomically", refuse)
        path = leave(cohort, "0", json.dumps(asdict(Command("pause", "ann"))).encode())
        for _ in range(3):
            cohort.turn()
        assert path.exists()
        assert caplog.text.count("the status is not up to date") == 1
    cohort.turn()
    assert not path.exists()
    assert shown(cohort) == ["paused", "running", "queued"]
    assert cohort.students[0].actor.told == ["pause"]


def test_processes_of_a_cluster_work_where_the_command_was_typed_and_elsewhere_if_that_is_not_there(
    tmp_path, monkeypatch
):
    typed, node = tmp_path / "typed", tmp_path / "node"
    typed.mkdir()
    node.mkdir()
    monkeypatch.chdir(typed)
    enter = working_folder.runtime_env()["worker_process_setup_hook"]
    monkeypatch.chdir(node)
    enter()
    assert Path.cwd() == typed
    monkeypatch.chdir(node)
    typed.rmdir()
    enter()
    assert Path.cwd() == node
    typed.write_text("A file, as if the folder belonged to somebody else: another error.")
    enter()
    assert Path.cwd() == node


def test_a_node_that_lacks_the_package_enters_its_folder_all_the_same(tmp_path):
    """What Ray carries must not be a name that the node cannot import; it would end each process there, in silence."""
    hook = tmp_path / "hook"
    hook.write_bytes(cloudpickle.dumps(working_folder.runtime_env()["worker_process_setup_hook"]))
    program = "import pathlib, sys; import ray.cloudpickle as p; sys.modules['tutelage'] = None"
    program += "; p.loads(pathlib.Path(sys.argv[1]).read_bytes())(); print(pathlib.Path.cwd())"
    command = [sys.executable, "-c", program, str(hook)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60)
    assert Path(done.stdout.strip()) == Path.cwd()
