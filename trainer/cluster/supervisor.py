"""Runs the students of a cohort as Ray actors: starts as many as may run, steers them, collects how they end.

It is the driver of the Ray job: when it goes, its actors go. What people ask for (`tutelage students`) becomes what
is *wanted* of a student; the supervisor tells its actor again until it does so, since an actor whose process was
killed begins without knowing. An end of the run from outside, Ctrl-C or SIGTERM, lets the students save first.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tutelage.errors import (
    CheckpointError,
    ConfigurationError,
    Conflict,
    NotFound,
    Terminated,
    TutelageError,
    as_known,
    one_line,
)
from tutelage.trainer.cluster.resources import (
    asked_in_words,
    fits,
    in_words,
    object_store_bytes,
    processes_of,
    shortage,
)
from tutelage.trainer.cluster.run_control import Action, RunControl, RunStatus, StudentStatus, read_run_status
from tutelage.trainer.cluster.student_log import LOG_FILE
from tutelage.trainer.cluster.working_folder import runtime_env
from tutelage.trainer.config.run import CohortConfig
from tutelage.trainer.config.student import StartConfig, StudentConfig
from tutelage.trainer.metrics.progress import ActorStatus, Outcome

# Ray reads these when it is imported.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")

_POLL_SECONDS = 0.5
_SHORT_SECONDS, _LONG_SECONDS = 5.0, 10.0
# An actor answers after 1 to 3 s; one whose module cannot be imported is started again and again, without a word.
_IMPORT_SECONDS = 4.0
_IMPORT_LOOKS = 3
# Schedulers send SIGKILL 30 s after SIGTERM (Slurm's KillWait, Kubernetes' grace period).
_SAVE_SECONDS = 20.0
# Two, so that `status` is answered while another call of the group is under way.
_CONTROL_THREADS = 2
_log = logging.getLogger(__name__)


Wanted = Literal["run", "pause", "stop"]
_WANTED: dict[Action, Wanted] = {"pause": "pause", "resume": "run", "stop": "stop"}


@dataclass
class StudentRun:
    """One student under supervision."""

    config: StudentConfig
    state: Literal["queued", "running", "finished", "stopped", "failed", "interrupted"] = "queued"
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
    silent_since: float = 0.0
    """When its actor was asked for, or its process died, by the monotonic clock; of no meaning while it answers."""
    waits_for: str = ""
    """What its actor waits for, in words, while it does not answer."""
    actor: Any = field(default=None, repr=False)
    place: Any = field(default=None, repr=False)
    """Of one that has writers: the placement group that it shares with them."""
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

    def release(self) -> None:
        """Ends its process, which would stay, and its name and CPUs with it; its writers go with it."""
        import ray

        ray.kill(self.actor)
        if self.place is not None:
            ray.util.remove_placement_group(self.place)

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
        phase = (self.waits_for or "starting") if self.state == "running" else ""
        if self.state == "queued" and isinstance(self.config.init, StartConfig):
            phase = f"starts when {self.config.init.student} has finished"
        return StudentStatus(
            self.config.id,
            "paused" if paused else self.state,
            self.outcome.step if self.outcome else progress.step if progress else 0,
            # One that trains for epochs works its number of steps out when it has read its data.
            progress.steps if progress else self.config.steps,
            str(self.error or (here.progress.phase if here else phase)),
            here.process_id if here else None,
            dict(progress.metrics) if progress else {},
            progress.notes if progress else (),
        )


Watch = Callable[[RunStatus], None]
"""Called twice a second with where everybody is."""


@contextmanager
def local_or_connected_ray(config: CohortConfig) -> Iterator[str]:
    """A Ray to run on; a local one ends with the context, and binds to loopback only.

    Gives its dashboard's host:port; the empty string if it serves none.
    """
    import ray

    on_terminate = signal.getsignal(signal.SIGTERM)

    logging.getLogger("ray").setLevel(logging.ERROR)  # before init, which warns about its own defaults
    _nodes_to_file(config.output / "ray.log")
    # What students log is on their actors' pages; the driver's output is the table, or the lines, of all of them.
    common: dict[str, Any] = {"namespace": config.run, "log_to_driver": False, "logging_level": "error"}
    try:
        context = _initialised(config, common)
    except Exception as error:  # of no class of its own, if a node does not get ready in time
        known = as_known(error) or TutelageError(one_line(str(error)))
        raise type(known)(f"Ray does not start, or does not answer: {known.message}", "ray") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_terminate)  # Ray put its own in place, which ends the process at once
    try:
        yield str(context.dashboard_url or "")
    finally:
        ray.shutdown()


def _initialised(config: CohortConfig, common: dict[str, Any]) -> Any:
    import ray

    if config.ray.address is not None:
        return ray.init(address=config.ray.address, runtime_env=runtime_env(), **common)
    _stay_on_loopback()
    # What all students ask for: how many run at once is the supervisor's affair, and may grow.
    cpus = sum(int(asked["CPU"]) for student in config.students for asked in processes_of(student))
    # As large as what they come from: some of them start from what is yet to be trained.
    students = [student.model_copy(update={"init": config.root(student)}) for student in config.students]
    return ray.init(
        "local",  # Without an address Ray connects to one that somebody has started on this machine.
        num_cpus=config.ray.cpus or cpus,
        include_dashboard=config.ray.dashboard,
        object_store_memory=config.ray.object_store_bytes or object_store_bytes(students),
        _node_ip_address="127.0.0.1",  # Else Ray listens where other machines reach it.
        **common,
    )


def _stay_on_loopback() -> None:
    """Keeps a Ray that this process starts with the address 127.0.0.1 from listening on all of the machine's.

    Ray makes of it an address that other machines reach (`services.get_node_ip_address`), unless told not to by a
    variable that is named after the systems where that is the default; it has read it already, its processes have not.
    """
    import ray._private.ray_constants

    os.environ[ray._private.ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray._private.ray_constants.ENABLE_RAY_CLUSTER = False


def _nodes_to_file(path: Path) -> None:
    """Lets what Ray's nodes report of processes that died go to a file in the run's folder."""
    import ray._private.worker

    def write(data: dict[str, Any], **_: object) -> None:
        with suppress(OSError), path.open("a", encoding="utf-8") as stream:
            stream.writelines(f"{line}\n" for line in data["lines"])

    # Ray's `listen_error_messages` prints them on the driver's output, tracebacks in colour among them, whatever
    # `log_to_driver` says; and has no other switch.
    ray._private.worker.print_to_stdstream = write


def supervise(config: CohortConfig, watch: Watch) -> list[StudentRun]:
    """Trains every student of the cohort; needs a connected Ray.

    A student that fails does not disturb the others. At Ctrl-C and SIGTERM they save after their present step, for
    which they have 20 seconds; another one, like any exception from `watch`, kills the actors at once. What they have
    committed stays.

    Args:
        config: the cohort.
        watch: told where everybody is.

    Raises:
        KeyboardInterrupt, Terminated: after everybody has saved, or had the time to.

    """
    cohort = Cohort(config)
    with _sigterm_noted() as noted:
        try:
            while cohort.is_on:
                if noted.is_set():
                    raise Terminated
                watch(cohort.turn())
        except (KeyboardInterrupt, Terminated):
            noted.clear()
            cohort.interrupt(watch, noted)
            raise
        finally:
            for student in cohort.students:
                if student.state == "running":
                    student.release()
            if cohort.is_on:
                cohort.mark_interrupted()
            ended = cohort.publish(ended=True)
    watch(ended)
    return cohort.students


@contextmanager
def _sigterm_noted() -> Iterator[threading.Event]:
    """An event that SIGTERM sets: of what a handler raises, Ray lets KeyboardInterrupt alone through its own calls."""
    noted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield noted  # Python lets no other thread handle signals
        return
    before = signal.signal(signal.SIGTERM, lambda *_: noted.set())
    try:
        yield noted
    finally:
        signal.signal(signal.SIGTERM, before)


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
        self._imports: Any = None
        """Of the task that says why actors do not start; None while all of them do."""
        self._lost_looks = 0

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
        self._look_at_resources()
        self._look_at_imports()
        status = self.publish()
        self._collect_ended()
        self._ask()
        for student in self.students:
            student.steer()
        return status

    def interrupt(self, watch: Watch, enough: threading.Event) -> None:
        """Lets everybody save and end; those that have nothing to save, or take too long, are left running.

        Args:
            watch: as `supervise` has it.
            enough: set when nobody is to be waited for any more.

        """
        running = [student for student in self.students if student.state == "running"]
        for student in running:
            student.wanted = "stop"
        for student in self.students:
            if student.state == "queued":
                student.state = "interrupted"
        end = time.monotonic() + _SAVE_SECONDS
        while any(student.state == "running" and student.has_begun for student in running):
            if time.monotonic() > end or enough.is_set():
                break
            watch(self.turn())
        for student in running:
            if student.state == "stopped":
                student.state = "interrupted"

    def mark_interrupted(self) -> None:
        """Of everybody who trains or waits to: their actors are gone."""
        for student in self.students:
            if student.state in ("queued", "running"):
                student.state = "interrupted"

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
        queued = [student for student in queued if self._may_begin(student)]
        for student in queued[: max(0, self._concurrency - len(running))]:
            config = self._config.with_start_of(student.config.id)
            student.config = config.student(student.config.id)
            student.place = placement_of(student.config)
            student.actor = create_actor(student.config, config, student.place)
            # Completed by whichever process of the actor comes to the end; a restarted one is called again by Ray.
            student.future = student.actor.run.remote()
            student.state, student.silent_since, student.waits_for = "running", time.monotonic(), ""

    def _may_begin(self, student: StudentRun) -> bool:
        """Whether what it starts from has been trained; if that never will be, it ends as that did."""
        if not isinstance(student.config.init, StartConfig):
            return True
        first = next(each for each in self.students if each.config.id == student.config.init.student)
        if first.state == "failed":
            student.state = "failed"
            student.error = TutelageError(f"{first.config.id}, from which it starts, failed", "students.init")
        elif first.state == "stopped":
            student.state = "stopped"
        return first.state == "finished"

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
                student.error, student.state = self._failure(student, error), "failed"
            student.release()

    def _failure(self, student: StudentRun, error: Exception) -> TutelageError:
        """What its actor raised, or why it has none any more, as one line."""
        cause = getattr(error, "cause", None)
        known = as_known(cause) if isinstance(cause, Exception) else None
        if known is not None:
            return known
        log = self._config.folder(student.config.id) / LOG_FILE
        # Without a cause, a process that died: Ray's first line says so, and the others what Ray knows of it.
        what = one_line(f"{type(cause).__name__}: {cause}" if cause else str(error).strip().partition("\n")[0])
        return TutelageError(f"student {student.config.id} ended unexpectedly: {what}; its log is {log}", "students")

    def _look_at_resources(self) -> None:
        """Says of students whose actor has not answered what they wait for; ends those for which it cannot come."""
        import ray

        now, connected = time.monotonic(), self._config.ray.address is not None
        late = [
            student
            for student in self.students
            if student.state == "running"
            and student.status is None
            # A cluster that forms, or whose autoscaler is quick, has them by then.
            and now - student.silent_since > _SHORT_SECONDS * connected
        ]
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]] if late else []
        for student in late:
            student.waits_for = ""
            if fits(student.config, nodes):
                if now - student.silent_since > _LONG_SECONDS:
                    asked, free = asked_in_words(student.config), in_words(ray.available_resources())
                    student.waits_for = f"not started yet: it asks for {asked}, free now are {free}"
                continue
            student.waits_for = f"waiting: {shortage(student.config, nodes)}"
            waits = self._config.ray.wait_seconds if connected else 0.0
            if now - student.silent_since > waits:
                student.error = ConfigurationError(shortage(student.config, nodes), "students.gpus")
                student.state = "failed"
                student.release()

    def _look_at_imports(self) -> None:
        """Ends the students whose process cannot import what they are; Ray would start it again, and say nothing."""
        import ray

        now = time.monotonic()
        silent = [each for each in self.students if each.state == "running" and each.status is None]
        if self._imports is None and any(now - each.silent_since > _IMPORT_SECONDS for each in silent):
            self._imports = ray.remote(num_cpus=0, max_retries=0)(_import_of_actor()).remote()
        if self._imports is None or not silent or not ray.wait([self._imports], timeout=0)[0]:
            return
        try:
            problem = ray.get(self._imports)
        except ray.exceptions.RayError as error:
            # The host that looked may be lost: it is asked again. Imports that end their process do so each time.
            self._lost_looks += 1
            if self._lost_looks < _IMPORT_LOOKS:
                self._imports = None
                return
            problem = f"{type(error).__name__}: {error}"
        for student in silent if problem else ():
            student.error = ConfigurationError(
                f"student {student.config.id} cannot start where Ray runs it: {one_line(problem)}; install what is "
                "missing on every node, as it is here",
                "students",
            )
            student.state = "failed"
            student.release()

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
                if asked[future].status is not None:
                    asked[future].status, asked[future].silent_since = None, time.monotonic()


def _import_of_actor() -> Callable[[], str]:
    """A function that says why an actor's module cannot be imported, or nothing; Ray carries it as it stands here."""

    # Defined here, and so pickled by value: as a function of this module it could not be imported either.
    def attempt() -> str:
        try:
            import tutelage.trainer.cluster.student_actor  # noqa: F401
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""

    return attempt


def placement_of(student: StudentConfig) -> Any:
    """Room for a student and its writers, which Ray gives them together or not at all; None without writers.

    Two students that each had a part of what they need would wait for each other.
    """
    import ray

    if student.sampling.writers is None:
        return None
    return ray.util.placement_group([dict(asked) for asked in processes_of(student)], name=f"student-{student.id}")


def create_actor(student: StudentConfig, config: CohortConfig, place: Any = None) -> Any:
    """Starts a student's actor; it trains when its `run` is called.

    Args:
        student: which.
        config: the run's.
        place: as `placement_of`.

    Raises:
        Conflict: the cluster has an actor of that name in this run already.

    """
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    from tutelage.trainer.cluster.student_actor import StudentActor

    trains = student.workers == 1  # Else its workers do, and the resources are theirs.
    # The writers that it starts have the other bundles.
    strategy = place and PlacementGroupSchedulingStrategy(place, 0, placement_group_capture_child_tasks=True)
    remote = ray.remote(concurrency_groups={"control": _CONTROL_THREADS})(StudentActor)
    try:
        return remote.options(
            name=f"student-{student.id}",
            namespace=config.run,
            num_cpus=student.threads if trains else 0,
            num_gpus=student.gpus if trains else 0,
            max_restarts=config.ray.max_restarts,
            scheduling_strategy=strategy,
        ).remote(config, student.id)
    except ValueError as error:  # Ray has no class of its own for a name that is taken.
        raise Conflict(
            f"run {config.run!r} has a student {student.id!r} on this cluster already ({error}); stop that run, or "
            "give this one another name",
            "run",
        ) from error
