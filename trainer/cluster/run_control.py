"""Run control: how a person watches and steers a run that is on, by two things in the run's folder.

The supervisor writes its status, `students.json`, twice a second, and reads commands from `commands/`, a file each,
oldest first. Files, because whoever may steer a run can see its folder, be it a run on this machine or on a cluster;
nothing else has to be reached, and a busy Ray delays nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from tutelage.errors import NotFound, Unreachable
from tutelage.files import write_atomically

Action = Literal["pause", "resume", "stop", "scale"]
_SILENT_SECONDS = 15.0
_ANSWER_SECONDS = 15.0
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class StudentStatus:
    """One student of a run."""

    student: str
    state: str
    """queued, running, paused, finished, stopped or failed."""
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


@dataclass(frozen=True)
class RunStatus:
    """A run and its students, as `students.json` has it."""

    run: str
    concurrency: int
    """Students that may run at once."""
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
        for row in self.students:
            if row.student == student_id:
                return row
        names = ", ".join(row.student for row in self.students)
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
        # What an earlier supervisor did not read was meant for it.
        self._read = list(self._commands.glob("*.json"))

    def take(self) -> list[Command]:
        """Commands left since, oldest first; whoever left one waits until the next `publish`."""
        self._read = sorted(self._commands.glob("*.json"))
        return [Command(**json.loads(path.read_text(encoding="utf-8"))) for path in self._read]

    def publish(self, status: RunStatus) -> None:
        """Writes the status, never half of it, and so answers the commands that were taken."""
        write_atomically(self._status, json.dumps(asdict(status)))
        for path in self._read:
            path.unlink(missing_ok=True)


def read_run_status(output: Path) -> RunStatus:
    """The status of the run in that folder, whether it is still on or not.

    Raises:
        NotFound: no run was ever there.

    """
    path = output / "students.json"
    if not path.exists():
        raise NotFound(f"{output} is not the folder of a run; give the `output` of its cohort", "--output")
    values = json.loads(path.read_text(encoding="utf-8"))
    return RunStatus(**{**values, "students": tuple(StudentStatus(**row) for row in values["students"])})


def is_running(status: RunStatus) -> bool:
    """Whether its supervisor lives: it writes the status twice a second."""
    return not status.ended and time.time() - status.updated_at_seconds < _SILENT_SECONDS


def send_command(output: Path, command: Command) -> RunStatus:
    """Leaves a command, waits until the supervisor took it, and returns the status after that.

    Raises:
        NotFound: no run was ever there, or it has no such student.
        Unreachable: no supervisor runs there, or it did not take the command in time.

    """
    status = read_run_status(output)
    if command.student:
        status.student(command.student)
    if not is_running(status):
        raise Unreachable(f"run {status.run!r} is not on; start it with tutelage train", "--output")
    path = output / "commands" / f"{time.time_ns()}.json"
    write_atomically(path, json.dumps(asdict(command)))
    _wait_until_gone(path)
    return read_run_status(output)


def _wait_until_gone(path: Path) -> None:
    deadline = time.monotonic() + _ANSWER_SECONDS
    while path.exists():
        if time.monotonic() > deadline:
            path.unlink(missing_ok=True)
            raise Unreachable(f"the supervisor took no command for {_ANSWER_SECONDS:.0f} s; is its process alive?")
        time.sleep(_POLL_SECONDS)


def status_cells(row: StudentStatus) -> Sequence[str]:
    """Its cells in `tutelage students list`."""
    loss, kl = row.metrics.get("train/loss"), row.metrics.get("heldout/forward_kl")
    return (
        row.student,
        row.state,
        f"{row.step}/{row.steps}",
        "" if loss is None else f"{loss:.3f}",
        "" if kl is None else f"{kl:.3f}",
        row.phase,
    )
