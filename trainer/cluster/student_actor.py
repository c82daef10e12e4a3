"""One student as a Ray actor: `student-<id>` in the namespace of the run.

Ray restarts it when its process dies, and calls `run` again, which goes on from the last checkpoint; the
future that the first call returned is the one that completes. `status`, `pause`, `resume` and `stop` have
a concurrency group of their own and answer while it trains. A student with several workers (`cluster.worker_group`)
trains in those; its actor speaks for them.
"""

from __future__ import annotations

import logging
import os
import time
from contextlib import ExitStack
from dataclasses import replace
from typing import Literal

import ray

from tutelage.errors import as_known
from tutelage.trainer.cluster.student_log import write_log
from tutelage.trainer.config.run import CohortConfig
from tutelage.trainer.metrics.progress import ActorStatus, Outcome, Progress, metric_texts, progress_line
from tutelage.trainer.metrics.prometheus import PrometheusGauges
from tutelage.trainer.training.control import Control, Stopped

# What a host runs that is cut off lives on: its node of Ray ends when it has not reached the head for 60 s, or when the
# head, which has given it up, can tell it so. By then Ray has started its students elsewhere.
PREDECESSOR_SECONDS = 180.0
_log = logging.getLogger(__name__)


class StudentActor:
    """Runs the training of one student of a cohort.

    Args:
        config: the cohort's.
        student_id: which of its students.

    """

    def __init__(self, config: CohortConfig, student_id: str) -> None:
        self._config, self._student = config, config.student(student_id)
        self._control = Control()
        self._gauges = PrometheusGauges(config.run, student_id, config.folder(student_id))
        self._progress = Progress(student_id, 0, self._student.steps, "starting")
        self.take_progress(self._progress)

    def __repr__(self) -> str:
        """What the dashboard and Ray's logs call it."""
        return f"{self._student.objective.label} student {self._student.id}"

    # -1: Ray calls it again on a restarted actor as often as that is restarted; the default is not to.
    @ray.method(max_task_retries=-1)
    def run(self) -> Outcome:
        """Trains to the end, or until `stop`.

        Raises:
            TutelageError: as `training.loop.train` and `TeacherClient`, and what `as_known` makes of other errors.

        """
        write_log(self._config.folder(self._student.id))
        try:
            return self._train()
        except Stopped:
            return Outcome(self._student.id, self._progress.step, finished=False, checkpoint=None)
        except Exception as error:
            known = as_known(error)
            _log.error("it failed: %s", known or error, exc_info=known is None)
            if known is None or known is error:
                raise
            raise known from error

    def _train(self) -> Outcome:
        # The driver, which imports this module too, needs no torch.
        from tutelage.trainer.cluster.connections import open_evaluator, open_teacher
        from tutelage.trainer.training.loop import train

        config, student = self._config, self._student
        if student.workers > 1:
            from tutelage.trainer.cluster.worker_group import WorkerTask, train_with_workers

            return train_with_workers(WorkerTask(config, student.id, ray.get_runtime_context().current_actor))
        with ExitStack() as stack:
            teacher = open_teacher(config, student, self._waiting, stack)
            return train(
                student,
                folder=config.folder(student.id),
                teacher=teacher,
                report=self.take_progress,
                evaluations=open_evaluator(config, student, teacher, stack),
                control=self._control,
                predecessor_seconds=PREDECESSOR_SECONDS,
            )

    # Asked for twice a second: as events these calls would bury everything else that the dashboard lists.
    @ray.method(concurrency_group="control", enable_task_events=False)
    def status(self) -> ActorStatus:
        """Where it is."""
        return ActorStatus(self._progress, self._control.paused, os.getpid(), self._updated_at_seconds)

    @ray.method(concurrency_group="control")
    def pause(self) -> None:
        """Stands still after the present step."""
        self._control.pause()
        self._gauges.paused(True)

    @ray.method(concurrency_group="control")
    def resume(self) -> None:
        """Goes on after a pause."""
        self._control.resume()
        self._gauges.paused(False)

    @ray.method(concurrency_group="control")
    def stop(self) -> None:
        """Saves and ends after the present step."""
        self._control.stop()

    @ray.method(concurrency_group="control")
    def asked(self) -> Literal["run", "pause", "stop"]:
        """What its workers are to do."""
        if self._control.stopped:
            return "stop"
        return "pause" if self._control.paused else "run"

    @ray.method(concurrency_group="control")
    def take_progress(self, progress: Progress) -> None:
        """Where its training is, in this process or in its workers."""
        for note in progress.notes:
            if note not in self._progress.notes:
                _log.warning(note)
        # Phases are logged one by one until there are steps, then one line with each step.
        before = self._progress
        if progress.step != before.step or (not progress.metrics and progress.phase != before.phase):
            _log.info(progress_line(progress.step, progress.steps, metric_texts(progress.metrics), progress.phase))
        self._progress, self._updated_at_seconds = progress, time.time()
        self._gauges.update(progress)

    @ray.method(concurrency_group="control")
    def take_waiting(self, seconds: float, reason: str) -> None:
        """How long the teacher has not answered, and why."""
        self.take_progress(replace(self._progress, phase=f"waiting for the teacher, {seconds:.0f} s: {reason}"))

    def _waiting(self, seconds: float, reason: str) -> None:
        """For `TeacherClient`, which calls it while it waits: the only moment at which a stop can end that.

        Raises:
            Stopped: a stop was asked for.

        """
        self._control.check_stopped()
        self.take_waiting(seconds, reason)
