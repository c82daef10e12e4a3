"""Runs the students of a cohort as Ray actors: starts as many as may run, watches them, collects how they end.

It is the driver of the Ray job: when it goes, its actors go.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tutelage.errors import Conflict, TutelageError

from trainer.config import CohortConfig, StudentConfig
from trainer.progress import Outcome, Status

# Ray reads these when it is imported.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")

_POLL_SECONDS = 0.5
_CONTROL_THREADS = 2


@dataclass
class Supervised:
    """One student under supervision."""

    config: StudentConfig
    state: str = "queued"
    """queued, running, finished, stopped or failed."""
    status: Status | None = None
    """Its newest answer."""
    outcome: Outcome | None = None
    """Set when it finished or stopped."""
    error: TutelageError | None = None
    """Set when it failed."""
    actor: Any = field(default=None, repr=False)
    future: Any = field(default=None, repr=False)


Watch = Callable[[list[Supervised]], None]
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


def supervise(config: CohortConfig, watch: Watch) -> list[Supervised]:
    """Trains every student of the cohort; needs a connected Ray.

    A student that fails does not disturb the others. An exception from `watch`, KeyboardInterrupt among
    them, kills the actors; what they have committed stays.

    Args:
        config: the cohort.
        watch: told where everybody is.

    """
    students = [Supervised(student) for student in config.students]
    try:
        while any(student.state in ("queued", "running") for student in students):
            _start_some(students, config)
            _collect_ended(students)
            _ask(students)
            watch(students)
    finally:
        _kill([student for student in students if student.state == "running"])
    return students


def _cpus(config: CohortConfig) -> int:
    """What the students that run at once ask for, at most."""
    threads = sorted((student.threads for student in config.students), reverse=True)
    return sum(threads[: config.concurrency])


def _start_some(students: list[Supervised], config: CohortConfig) -> None:
    running = sum(student.state == "running" for student in students)
    limit = config.concurrency or len(students)
    for student in [student for student in students if student.state == "queued"][: limit - running]:
        student.actor = _create_actor(student.config, config)
        student.future = student.actor.run.remote()
        student.state = "running"


def _create_actor(student: StudentConfig, config: CohortConfig) -> Any:
    import ray

    from trainer.actor import StudentActor

    remote = ray.remote(concurrency_groups={"control": _CONTROL_THREADS})(StudentActor)
    try:
        return remote.options(
            name=f"student-{student.id}",
            namespace=config.run,
            num_cpus=student.threads,
            num_gpus=student.gpus,
            max_restarts=config.ray.max_restarts,
        ).remote(config, student.id)
    except ValueError as error:
        raise Conflict(
            f"run {config.run!r} has a student {student.id!r} on this cluster already ({error}); stop that run, or "
            "give this one another name",
            "run",
        ) from error


def _collect_ended(students: list[Supervised]) -> None:
    import ray

    futures = {student.future: student for student in students if student.state == "running"}
    ended, _ = ray.wait(list(futures), num_returns=len(futures), timeout=_POLL_SECONDS)
    for future in ended:
        student = futures[future]
        try:
            student.outcome = ray.get(future)
            student.state = "finished" if student.outcome.finished else "stopped"
        except ray.exceptions.RayError as error:
            student.error = _error_of(error, student.config.id)
            student.state = "failed"
        _kill([student])


def _error_of(error: Exception, student_id: str) -> TutelageError:
    """What the actor raised, or that its process is gone for good."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, TutelageError):
        return cause
    return TutelageError(f"student {student_id} ended unexpectedly: {error}", "students")


def _ask(students: list[Supervised]) -> None:
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


def _kill(students: list[Supervised]) -> None:
    import ray

    for student in students:
        ray.kill(student.actor)
