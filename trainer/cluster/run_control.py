"""Run control: how a person or a program watches and steers a run that is on, by files in the run's folder.

The supervisor writes its status, `students.json`, twice a second, and reads commands from `commands/`, a file each,
oldest first. Files, because whoever may steer a run can see its folder, be it a run on this machine or on a cluster;
nothing else has to be reached, and a busy Ray delays nothing.

A command is meant for one supervisor, whose start time its file's name begins with: what was meant for an earlier
one is never obeyed by the next.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from tutelage.errors import NotFound, Unreachable
from tutelage.files import write_atomically

Action = Literal["pause", "resume", "stop", "scale"]
# Thirty updates. The clock of whoever asks may be another machine's, and differ by seconds.
_SILENT_SECONDS = 15.0
_ANSWER_SECONDS = 15.0
_POLL_SECONDS = 0.1
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StudentStatus:
    """One student of a run."""

    student: str
    state: str
    """queued, running, paused, finished, stopped, failed, or interrupted (the run was, by Ctrl-C or SIGTERM)."""
    step: int
    """Steps done."""
    steps: int
    """Steps in all."""
    phase: str
    """What it is doing, or why it failed."""
    process_id: int | None
    """Of its actor, while it has one that answers."""
    metrics: dict[str, float]
    """The newest value of each metric."""
    notes: tuple[str, ...] = ()
    """What people have to know of it: rows that were left out, completions that were cut."""


@dataclass(frozen=True)
class RunStatus:
    """A run and its students, as `students.json` has it."""

    run: str
    concurrency: int
    """Students that may run at once."""
    started_at_ns: int
    """When its supervisor began, nanoseconds since 1970-01-01 UTC; commands are addressed with it."""
    updated_at_seconds: float
    """Seconds since 1970-01-01 UTC."""
    ended: bool
    """Whether the supervisor is done."""
    students: tuple[StudentStatus, ...]

    def student(self, student_id: str) -> StudentStatus:
        """That student's.

        Raises:
            NotFound: there is none of that name.

        """
        for student in self.students:
            if student.student == student_id:
                return student
        names = ", ".join(student.student for student in self.students)
        raise NotFound(f"run {self.run!r} has no student {student_id!r}; it has {names}", "student")


@dataclass(frozen=True)
class Command:
    """What a person asks of a run."""

    action: Action
    student: str = ""
    """Whom; empty for `scale`."""
    concurrency: int = 0
    """For `scale`: students that may run at once."""


class RunControl:
    """The supervisor's side.

    Args:
        output: the run's folder.

    """

    def __init__(self, output: Path) -> None:
        self._status, self._commands = output / "students.json", output / "commands"
        self._commands.mkdir(parents=True, exist_ok=True)
        self.started_at_ns = time.time_ns()
        self._taken: list[Path] = []

    def take(self) -> list[Command]:
        """Commands left since, oldest first; whoever left one waits until the next `publish`.

        What is no command, or was meant for an earlier supervisor, is left out with a warning, and removed as well.
        """
        # By name is by time: nanoseconds of this century have nineteen digits. Half a command has another suffix.
        self._taken, commands = sorted(self._commands.glob("*.json")), []
        for path in self._taken:
            try:
                if not path.name.startswith(f"{self.started_at_ns}-"):
                    raise ValueError("it was meant for an earlier supervisor of this run")
                commands.append(TypeAdapter(Command).validate_json(path.read_bytes()))
            except (OSError, ValueError) as error:
                reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
                _log.warning("the command %s is not obeyed: %s", path, reason)
        return commands

    def publish(self, status: RunStatus) -> None:
        """Writes the status, never half of it, and so answers the commands that were taken."""
        # Not forced to disk: nothing is resumed from it, and an fsync twice a second is time that a slow disk takes
        # from the checkpoints.
        write_atomically(self._status, json.dumps(asdict(status)))
        for path in self._taken:
            path.unlink(missing_ok=True)


def read_run_status(output: Path) -> RunStatus:
    """The status of the run in that folder, whether it is still on or not.

    If its supervisor was killed, everybody who trained, or waited to, is interrupted.

    Raises:
        NotFound: no run was ever there, or what lies there is not the status of one.

    """
    path = output / "students.json"
    if not path.exists():
        raise NotFound(f"{output} is not the folder of a run; give the `output` of its cohort", "--output")
    try:
        status = TypeAdapter(RunStatus).validate_json(path.read_bytes())
    except ValueError as error:
        raise NotFound(
            f"{path} is not the status of a run ({str(error).splitlines()[0]}); tutelage train writes it anew",
            "--output",
        ) from error
    if is_running(status):
        return status
    on = ("queued", "running", "paused")
    students = (replace(each, state="interrupted") if each.state in on else each for each in status.students)
    return replace(status, students=tuple(students))


def is_running(status: RunStatus) -> bool:
    """Whether its supervisor lives: it writes the status twice a second."""
    return not status.ended and time.time() - status.updated_at_seconds < _SILENT_SECONDS


def send_command(output: Path, command: Command) -> RunStatus:
    """Leaves a command, waits until the supervisor took it, and returns the status after that.

    Raises:
        NotFound: no run was ever there, or it has no such student.
        Unreachable: no supervisor runs there, it did not take the command in time, or another one began meanwhile.

    """
    status = read_run_status(output)
    if command.student:
        status.student(command.student)
    if not is_running(status):
        raise Unreachable(f"run {status.run!r} is not on; start it with tutelage train", "--output")
    path = output / "commands" / f"{status.started_at_ns}-{time.time_ns()}.json"
    write_atomically(path, json.dumps(asdict(command)))
    deadline = time.monotonic() + _ANSWER_SECONDS
    while path.exists():
        if time.monotonic() > deadline:
            path.unlink(missing_ok=True)
            raise Unreachable(f"the supervisor took no command for {_ANSWER_SECONDS:.0f} s; is its process alive?")
        time.sleep(_POLL_SECONDS)
    after = read_run_status(output)
    if after.started_at_ns != status.started_at_ns:
        raise Unreachable(f"run {status.run!r} was started again meanwhile and did not obey; ask again", "--output")
    return after
