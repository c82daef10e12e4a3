"""Runs the students of a cohort as Ray actors: starts as many as may run, steers them, collects how they end.

It is the driver of the Ray job: when it goes, its actors go. What people ask for (`tutelage students`) becomes what
is *wanted* of a student; the supervisor tells its actor again until it does so, since an actor whose process was
killed begins without knowing.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from tutelage.errors import Conflict, TutelageError
from tutelage.trainer.cluster.run_control import Command, RunControl, RunStatus, StudentStatus
from tutelage.trainer.config.run import CohortConfig
from tutelage.trainer.config.student import StudentConfig
from tutelage.trainer.metrics.progress import ActorStatus, Outcome

# Ray reads these when it is imported.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")

_POLL_SECONDS = 0.5
_CONTROL_THREADS = 2


Wanted = Literal["run", "pause", "stop", "yield"]
_WANTED: dict[str, Wanted] = {"pause": "pause", "resume": "run", "stop": "stop"}


@dataclass
class StudentRun:
    """One student under supervision."""

    config: StudentConfig
    state: str = "queued"
    """queued, running, finished, stopped or failed."""
    wanted: Wanted = "run"
    """What it is to do; one that yields saves, ends, and waits for its turn."""
    status: ActorStatus | None = None
    """Its newest answer."""
    outcome: Outcome | None = None
    """Set when it finished or stopped."""
    error: TutelageError | None = None
    """Set when it failed."""
    actor: Any = field(default=None, repr=False)
    future: Any = field(default=None, repr=False)


Watch = Callable[[list[StudentRun]], None]
"""Called twice a second with all students."""


@contextmanager
def local_or_connected_ray(config: CohortConfig) -> Iterator[None]:
    """A Ray to run on; a local one ends with the context, and binds to loopback only."""
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)  # before init, which warns about its own defaults
    common: dict[str, Any] = {"namespace": config.run, "log_to_driver": False, "logging_level": "error"}
    if config.ray.address is None:
        ray.init(
            num_cpus=config.ray.cpus or _cpus(config),
            include_dashboard=config.ray.dashboard,
            object_store_memory=config.ray.object_store_bytes,
            _node_ip_address="127.0.0.1",
            **common,
        )
    else:
        ray.init(address=config.ray.address, **common)
    try:
        yield
    finally:
        ray.shutdown()


def supervise(config: CohortConfig, watch: Watch) -> list[StudentRun]:
    """Trains every student of the cohort; needs a connected Ray.

    A student that fails does not disturb the others. An exception from `watch`, KeyboardInterrupt among
    them, kills the actors; what they have committed stays.

    Args:
        config: the cohort.
        watch: told where everybody is.

    """
    cohort = _Cohort(config)
    try:
        while any(student.state in ("queued", "running") for student in cohort.students):
            cohort.turn()
            watch(cohort.students)
    finally:
        _kill([student for student in cohort.students if student.state == "running"])
        cohort.publish(ended=True)
    return cohort.students


class _Cohort:
    """The students of a run, and how many of them may run at once."""

    def __init__(self, config: CohortConfig) -> None:
        self._config = config
        self.students = [StudentRun(student) for student in config.students]
        self._concurrency = config.concurrency or len(self.students)
        self._control = RunControl(config.output)

    def turn(self) -> None:
        """Obeys, starts, collects, asks; about half a second."""
        for command in self._control.take():
            self._obey(command)
        self._balance()
        self.publish()
        _collect_ended(self.students)
        _ask(self.students)
        _steer(self.students)

    def publish(self, *, ended: bool = False) -> None:
        """Shows people where everybody is."""
        rows = tuple(_row(student) for student in self.students)
        self._control.publish(RunStatus(self._config.run, self._concurrency, time.time(), ended, rows))

    def _obey(self, command: Command) -> None:
        if command.action == "scale":
            self._concurrency = command.concurrency
            return
        student = next(student for student in self.students if student.config.id == command.student)
        if student.state in ("finished", "failed"):
            return
        student.wanted = _WANTED[command.action]
        if student.state == "queued" and command.action == "stop":
            student.state = "stopped"
        elif student.state == "stopped" and command.action == "resume":
            student.state, student.outcome = "queued", None

    def _balance(self) -> None:
        """Starts students while there is room; of too many, the last ones save and wait for their turn."""
        running = [student for student in self.students if student.state == "running"]
        for student in running[self._concurrency :]:
            student.wanted = "yield"
        queued = [student for student in self.students if student.state == "queued"]
        for student in queued[: max(0, self._concurrency - len(running))]:
            student.actor = _create_actor(student.config, self._config)
            student.future = student.actor.run.remote()
            student.state = "running"


def _row(student: StudentRun) -> StudentStatus:
    """What the run's status says of a student."""
    progress = student.status.progress if student.status else None
    here = student.status if student.state == "running" else None
    steps_done = student.outcome.step if student.outcome else progress.step if progress else 0
    return StudentStatus(
        student.config.id,
        "paused" if here is not None and here.paused else student.state,
        steps_done,
        student.config.steps,
        str(student.error or (here.progress.phase if here else "")),
        here.process_id if here else None,
        dict(progress.metrics) if progress else {},
    )


def _cpus(config: CohortConfig) -> int:
    """What all students ask for: how many run at once is the supervisor's affair, and may grow."""
    return sum(student.threads * student.workers for student in config.students)


def _create_actor(student: StudentConfig, config: CohortConfig) -> Any:
    import ray

    from tutelage.trainer.cluster.student_actor import StudentActor

    trains = student.workers == 1  # Else its workers do, and the resources are theirs.
    remote = ray.remote(concurrency_groups={"control": _CONTROL_THREADS})(StudentActor)
    try:
        return remote.options(
            name=f"student-{student.id}",
            namespace=config.run,
            num_cpus=student.threads if trains else 0,
            num_gpus=student.gpus if trains else 0,
            max_restarts=config.ray.max_restarts,
        ).remote(config, student.id)
    except ValueError as error:
        raise Conflict(
            f"run {config.run!r} has a student {student.id!r} on this cluster already ({error}); stop that run, or "
            "give this one another name",
            "run",
        ) from error


def _collect_ended(students: list[StudentRun]) -> None:
    import ray

    futures = {student.future: student for student in students if student.state == "running"}
    ended, _ = ray.wait(list(futures), num_returns=len(futures), timeout=_POLL_SECONDS)
    for future in ended:
        student = futures[future]
        try:
            _end(student, ray.get(future))
        except ray.exceptions.RayError as error:
            student.error = _error_of(error, student.config.id)
            student.state = "failed"
        _kill([student])


def _end(student: StudentRun, outcome: Outcome) -> None:
    """Finished, stopped, or back in the queue."""
    if not outcome.finished and student.wanted in ("yield", "run"):
        student.state, student.wanted = "queued", "run"
        return
    student.outcome = outcome
    student.state = "finished" if outcome.finished else "stopped"


def _error_of(error: Exception, student_id: str) -> TutelageError:
    """What the actor raised, or that its process is gone for good."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, TutelageError):
        return cause
    return TutelageError(f"student {student_id} ended unexpectedly: {error}", "students")


def _ask(students: list[StudentRun]) -> None:
    """Takes the newest status of those that answer at once; one that is being restarted does not."""
    import ray

    asked = {student.actor.status.remote(): student for student in students if student.state == "running"}
    if not asked:
        return
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_POLL_SECONDS)
    for future in answered:
        try:
            asked[future].status = ray.get(future)
        except ray.exceptions.RayActorError:
            asked[future].status = None


def _steer(students: list[StudentRun]) -> None:
    """Tells actors what is wanted of them, where they do something else."""
    for student in students:
        if student.state != "running" or student.status is None:
            continue
        if student.wanted in ("stop", "yield"):
            student.actor.stop.remote()
        elif student.wanted == "pause" and not student.status.paused:
            student.actor.pause.remote()
        elif student.wanted == "run" and student.status.paused:
            student.actor.resume.remote()


def _kill(students: list[StudentRun]) -> None:
    import ray

    for student in students:
        ray.kill(student.actor)
