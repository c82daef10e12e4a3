"""One student as a Ray actor: `student-<id>` in the namespace of the run.

Ray restarts it when its process dies, and calls `run` again, which goes on from the last checkpoint; the
future that the first call returned is the one that completes. `status`, `pause`, `resume` and `stop` have
a concurrency group of their own and answer while it trains.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

import ray
from tutelage.identity import tokenizer_digests

from trainer.config import CohortConfig
from trainer.control import Control, Stopped
from trainer.gauges import Gauges
from trainer.progress import Outcome, Progress, Status

if TYPE_CHECKING:
    from trainer.evaluator_client import EvaluatorClient
    from trainer.teacher_client import Teacher


class StudentActor:
    """Runs the training of one student of a cohort.

    Args:
        config: the cohort's.
        student_id: which of its students.

    """

    def __init__(self, config: CohortConfig, student_id: str) -> None:
        self._config, self._student = config, config.student(student_id)
        self._folder = config.folder(student_id)
        self._control = Control()
        self._gauges = Gauges(config.run, student_id)
        self._report(Progress(student_id, 0, self._student.steps, "starting"))

    def __repr__(self) -> str:
        """What the dashboard and Ray's logs call it."""
        return f"{self._student.objective.name} student {self._student.id}"

    @ray.method(max_task_retries=-1)
    def run(self) -> Outcome:
        """Trains to the end, or until `stop`.

        Raises:
            TutelageError: as `trainer.loop.train` and `TeacherClient`.

        """
        # The driver, which imports this module too, needs no torch.
        from trainer.loop import train

        try:
            with ExitStack() as stack:
                teacher = self._connect(stack)
                name = teacher.identity.model_name if teacher else ""
                return train(
                    self._student,
                    folder=self._folder,
                    teacher=teacher,
                    report=self._report,
                    evaluations=self._evaluations(stack, name),
                    control=self._control,
                )
        except Stopped:
            return Outcome(self._student.id, self._progress.step, finished=False, checkpoint=None)

    @ray.method(concurrency_group="control")
    def status(self) -> Status:
        """Where it is."""
        return Status(self._progress, self._control.paused, os.getpid(), self._updated_at_seconds)

    @ray.method(concurrency_group="control")
    def pause(self) -> None:
        """Stands still after the present step."""
        self._control.pause()

    @ray.method(concurrency_group="control")
    def resume(self) -> None:
        """Goes on after a pause."""
        self._control.resume()

    @ray.method(concurrency_group="control")
    def stop(self) -> None:
        """Saves and ends after the present step."""
        self._control.stop()

    def _connect(self, stack: ExitStack) -> Teacher | None:
        from trainer.stored_teacher import StoredTeacher
        from trainer.teacher_client import TeacherClient

        if self._config.signals_from is not None:
            return StoredTeacher(self._config.signals_from, tokenizer_digests=tokenizer_digests(self._student.init))
        if self._config.teacher is None:
            return None
        return stack.enter_context(
            TeacherClient(
                self._config.teacher.address,
                student_id=self._student.id,
                wait_seconds=self._config.teacher.wait_seconds,
                tokenizer_digests=tokenizer_digests(self._student.init),
                adapter=self._config.teacher.adapter,
                waiting=self._waiting,
                tls=self._config.teacher.tls,
                token_file=self._config.teacher.token_file,
            )
        )

    def _evaluations(self, stack: ExitStack, teacher: str) -> EvaluatorClient | None:
        from trainer.evaluator_client import EvaluatorClient

        if self._config.evaluator is None:
            return None
        client = EvaluatorClient(
            self._config.evaluator, run=self._config.run, student=self._student, teacher=teacher, folder=self._folder
        )
        return stack.enter_context(client)

    def _report(self, progress: Progress) -> None:
        self._progress, self._updated_at_seconds = progress, time.time()
        self._gauges.show(progress)

    def _waiting(self, seconds: float, reason: str) -> None:
        self._control.check_stopped()
        self._report(replace(self._progress, phase=f"waiting for the teacher, {seconds:.0f} s: {reason}"))
