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
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from tutelage.errors import CheckpointError, Conflict, NotFound, TutelageError
from tutelage.trainer.cluster.run_control import Action, RunControl, RunStatus, StudentStatus, read_run_status
from tutelage.trainer.config.run import CohortConfig
from tutelage.trainer.config.student import StudentConfig
from tutelage.trainer.metrics.progress import ActorStatus, Outcome

# Ray reads these when it is imported.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")

_POLL_SECONDS = 0.5
# Two, so that `status` is answered while another call of the group is under way.
_CONTROL_THREADS = 2
_log = logging.getLogger(__name__)


Wanted = Literal["run", "pause", "stop"]
_WANTED: dict[Action, Wanted] = {"pause": "pause", "resume": "run", "stop": "stop"}


@dataclass
class StudentRun:
    """One student under supervision."""

    config: StudentConfig
    state: Literal["queued", "running", "finished", "stopped", "failed"] = "queued"
    wanted: Wanted = "run"
    """What people want of it."""
    yields: bool = False
    """Whether it has to save, end, and wait for its turn, because fewer may run. What is wanted of it stays."""
    status: ActorStatus | None = None
    """Its newest answer."""
    has_begun: bool = False
    """Whether it was seen with metrics: it has taken its checkpoint, or written a first row."""
    outcome: Outcome | None = None
    """Set when it finished or stopped."""
    error: TutelageError | None = None
    """Set when it failed."""
    before: StudentStatus | None = None
    """What an earlier supervisor of the same run said last of it."""
    actor: Any = field(default=None, repr=False)
    future: Any = field(default=None, repr=False)

    def obey(self, action: Action) -> None:
        """Takes what a person asks of it; one that has finished or failed is past asking."""
        if self.state in ("finished", "failed"):
            return
        self.wanted = _WANTED[action]
        if self.state == "queued" and self.wanted == "stop":
            self.state = "stopped"
        elif self.state == "stopped" and self.wanted == "run":
            self.state, self.outcome = "queued", None

    def end(self, outcome: Outcome) -> None:
        """Its training ended: finished, stopped, or back in the queue."""
        self.yields = False
        if outcome.finished or self.wanted == "stop":
            self.outcome, self.state = outcome, "finished" if outcome.finished else "stopped"
        else:
            self.state = "queued"

    def steer(self) -> None:
        """Tells its actor what is wanted, where it does something else."""
        if self.state != "running" or self.status is None:
            return
        if self.wanted == "stop" or self.yields:
            self.actor.stop.remote()
        elif self.wanted == "pause" and not self.status.paused:
            self.actor.pause.remote()
        elif self.wanted == "run" and self.status.paused:
            self.actor.resume.remote()

    @property
    def was_refused(self) -> bool:
        """Whether it failed before it trained: what an earlier supervisor said of it is still so."""
        return self.state == "failed" and not self.has_begun

    def as_status(self) -> StudentStatus:
        """What the run's status says of it."""
        if self.was_refused and self.before is not None and self.before.state == "finished":
            return self.before
        progress = self.status.progress if self.status else None
        here = self.status if self.state == "running" else None
        paused = here.paused if here else self.state == "queued" and self.wanted == "pause"
        phase = "starting" if self.state == "running" else ""
        return StudentStatus(
            self.config.id,
            "paused" if paused else self.state,
            self.outcome.step if self.outcome else progress.step if progress else 0,
            # One that trains for epochs works its number of steps out when it has read its data.
            progress.steps if progress else self.config.steps,
            str(self.error or (here.progress.phase if here else phase)),
            here.process_id if here else None,
            dict(progress.metrics) if progress else {},
        )


Watch = Callable[[RunStatus], None]
"""Called twice a second with where everybody is."""


@contextmanager
def local_or_connected_ray(config: CohortConfig) -> Iterator[None]:
    """A Ray to run on; a local one ends with the context, and binds to loopback only."""
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)  # before init, which warns about its own defaults
    # What students log is on their actors' pages; the driver's output is the table, or the lines, of all of them.
    common: dict[str, Any] = {"namespace": config.run, "log_to_driver": False, "logging_level": "error"}
    if config.ray.address is None:
        # What all students ask for: how many run at once is the supervisor's affair, and may grow.
        cpus = sum(student.threads * student.workers for student in config.students)
        ray.init(
            num_cpus=config.ray.cpus or cpus,
            include_dashboard=config.ray.dashboard,
            object_store_memory=config.ray.object_store_bytes,
            _node_ip_address="127.0.0.1",  # Else Ray listens where other machines reach it.
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
    import ray

    cohort = Cohort(config)
    try:
        while cohort.is_on:
            watch(cohort.turn())
    finally:
        for student in cohort.students:
            if student.state == "running":
                ray.kill(student.actor)
        ended = cohort.publish(ended=True)
    watch(ended)
    return cohort.students


class Cohort:
    """The students of a run, and how many of them may run at once.

    Args:
        config: the run's.

    """

    def __init__(self, config: CohortConfig) -> None:
        self._config = config
        self.students = [StudentRun(student) for student in config.students]
        with suppress(NotFound):  # Most runs are the first in their folder.
            known = {student.student: student for student in read_run_status(config.output).students}
            for student in self.students:
                student.before = known.get(student.config.id)
        self._concurrency = config.concurrency or len(self.students)
        self._control = RunControl(config.output)
        self._unpublished = False

    @property
    def is_on(self) -> bool:
        """Whether there is a student left that trains or waits to."""
        return any(student.state in ("queued", "running") for student in self.students)

    def turn(self) -> RunStatus:
        """Obeys, starts, publishes, collects, asks, steers; about half a second.

        Published is right after commands were obeyed, so that whoever sent one sees what became of it.
        """
        for command in self._control.take():
            named = [student for student in self.students if student.config.id == command.student]
            if command.action == "scale" and command.concurrency > 0:
                self._concurrency = command.concurrency
            elif command.action != "scale" and named:
                named[0].obey(command.action)
            else:
                _log.warning("%s is not obeyed: there is no such student, or nobody would run", command)
        self._schedule()
        status = self.publish()
        self._collect_ended()
        self._ask()
        for student in self.students:
            student.steer()
        return status

    def publish(self, *, ended: bool = False) -> RunStatus:
        """Writes where everybody is."""
        students = tuple(student.as_status() for student in self.students)
        status = RunStatus(
            self._config.run, self._concurrency, self._control.started_at_ns, time.time(), ended, students
        )
        try:
            self._control.publish(status)
        except CheckpointError as error:
            # A disk that is full for a moment must not end the students, each of which meets it, or not, by itself.
            if not self._unpublished:
                _log.warning("the status is not up to date: %s", error)
            self._unpublished = True
        else:
            self._unpublished = False
        return status

    def _schedule(self) -> None:
        """Starts students while there is room; of too many, the last ones save and wait for their turn."""
        running = [student for student in self.students if student.state == "running"]
        staying = [student for student in running if student.wanted != "stop" and not student.yields]
        for student in staying[self._concurrency :]:
            student.yields = True
        # One that was told to pause, and then had to yield, waits until it is resumed.
        queued = [student for student in self.students if student.state == "queued" and student.wanted == "run"]
        for student in queued[: max(0, self._concurrency - len(running))]:
            student.actor = create_actor(student.config, self._config)
            # Completed by whichever process of the actor comes to the end; a restarted one is called again by Ray.
            student.future = student.actor.run.remote()
            student.state = "running"

    def _collect_ended(self) -> None:
        import ray

        futures = {student.future: student for student in self.students if student.state == "running"}
        if not futures:
            time.sleep(_POLL_SECONDS)
            return
        ended, _ = ray.wait(list(futures), num_returns=len(futures), timeout=_POLL_SECONDS)
        for future in ended:
            student = futures[future]
            try:
                student.end(ray.get(future))
            except ray.exceptions.RayError as error:
                # What the actor raised is the cause; without one its process is gone for good.
                cause, text = getattr(error, "cause", None), f"student {student.config.id} ended unexpectedly: {error}"
                student.error = cause if isinstance(cause, TutelageError) else TutelageError(text, "students")
                student.state = "failed"
            ray.kill(student.actor)  # Its process would stay, and its name and CPUs with it.

    def _ask(self) -> None:
        """Takes the newest status of those that answer at once; one that is being restarted does not."""
        import ray

        asked = {student.actor.status.remote(): student for student in self.students if student.state == "running"}
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_POLL_SECONDS) if asked else ([], [])
        for future in answered:
            try:
                status: ActorStatus = ray.get(future)
                asked[future].status = status
                asked[future].has_begun |= bool(status.progress.metrics)
            except ray.exceptions.RayActorError:
                asked[future].status = None


def create_actor(student: StudentConfig, config: CohortConfig) -> Any:
    """Starts a student's actor; it trains when its `run` is called.

    Raises:
        Conflict: the cluster has an actor of that name in this run already.

    """
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
    except ValueError as error:  # Ray has no class of its own for a name that is taken.
        raise Conflict(
            f"run {config.run!r} has a student {student.id!r} on this cluster already ({error}); stop that run, or "
            "give this one another name",
            "run",
        ) from error
