"""One student trained by several processes: its actor has a Ray `TorchTrainer` run `training.loop.train` in each.

The actor stays the one that is asked and steered; its workers ask it what to do, and the first tells it how far they
are. What they know besides is in the student's folder, so workers that died are replaced by others, which go on from
the last checkpoint.
"""

from __future__ import annotations

import logging
import os
import threading
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import ray

from tutelage.errors import TutelageError
from tutelage.trainer.cluster.student_log import write_log
from tutelage.trainer.config.run import CohortConfig
from tutelage.trainer.metrics.progress import Outcome, Progress
from tutelage.trainer.training.control import Control, Stopped

# Ray reads it when a trainer is made: paths of a configuration are relative to where the command was started.
os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"

_POLL_SECONDS, _END_SECONDS = 0.3, 30.0
# Workers wait for the first one, which may be paused. One that dies is noticed by its connections.
_LONGEST_PAUSE_SECONDS = 30 * 24 * 3600
# What workers in their place would meet as well.
_FINAL = (TutelageError, Stopped)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerTask:
    """What a worker is started with."""

    config: CohortConfig
    student_id: str
    actor: Any
    """Handle of the student's `StudentActor`."""


def train_with_workers(task: WorkerTask) -> Outcome:
    """Trains the student with `workers` processes; for its actor.

    Workers of which one died are replaced, all of them, `ray.max_restarts` times.

    Raises:
        Stopped: it was asked to stop while it waited for the teacher.
        TutelageError: as `training.loop.train` and `TeacherClient`.
        WorkerGroupError: the workers failed otherwise, once more than they may.

    """
    from ray.train import RunConfig, ScalingConfig, WorkerGroupError
    from ray.train.torch import TorchConfig, TorchTrainer

    student, folder = task.config.student(task.student_id), task.config.folder(task.student_id)
    resources = {"CPU": student.threads} | ({"GPU": student.gpus} if student.gpus else {})
    restarts = 0
    while True:
        # Made anew for each try. Ray's own FailureConfig would also retry what workers in their place meet again.
        trainer = TorchTrainer(
            train_loop_per_worker,
            train_loop_config={"task": task},
            torch_config=TorchConfig(timeout_s=_LONGEST_PAUSE_SECONDS),
            scaling_config=ScalingConfig(
                num_workers=student.workers, use_gpu=student.gpus > 0, resources_per_worker=resources
            ),
            run_config=RunConfig(name=task.student_id, storage_path=str(folder.resolve() / "ray_train")),
        )
        try:
            outcome: Outcome = trainer.fit().return_value
            return outcome
        except WorkerGroupError as error:
            final = [failure for failure in error.worker_failures.values() if isinstance(failure, _FINAL)]
            if final:
                raise final[0] from error
            if restarts == task.config.ray.max_restarts:
                raise
            restarts += 1
            _log.warning("%s: workers are replaced, since %s", task.student_id, error)


def train_loop_per_worker(settings: dict[str, WorkerTask]) -> Outcome:
    """The training in one worker, as a `TorchTrainer` calls it.

    Args:
        settings: the task, by the name `task`.

    """
    from tutelage.trainer.cluster.connections import open_evaluator, open_teacher
    from tutelage.trainer.cluster.student_actor import PREDECESSOR_SECONDS
    from tutelage.trainer.model.process_group import workers_of_process_group
    from tutelage.trainer.training.loop import train

    task, workers = settings["task"], workers_of_process_group()
    config, student = task.config, task.config.student(task.student_id)
    if workers.first:
        write_log(config.folder(student.id))
    with ExitStack() as stack:
        control = stack.enter_context(RemoteControl(task.actor))
        teacher = open_teacher(config, student, control.waiting, stack)
        return train(
            student,
            folder=config.folder(student.id),
            teacher=teacher,
            report=control.report,
            evaluations=open_evaluator(config, student, teacher, stack) if workers.first else None,
            control=control,
            workers=workers,
            predecessor_seconds=PREDECESSOR_SECONDS,
        )


class RemoteControl(Control):
    """A `Control` that does what the student's actor was asked, which a thread brings over; a context manager.

    Args:
        actor: its handle.

    """

    def __init__(self, actor: Any) -> None:
        super().__init__()
        self._actor, self._ended = actor, threading.Event()
        self._thread = threading.Thread(target=self._follow, name="control", daemon=True)

    def __enter__(self) -> RemoteControl:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        # Whoever waits for an answer of Ray's when it is shut down is ended by `SystemExit`.
        self._thread.join(_END_SECONDS)

    def report(self, progress: Progress) -> None:
        """Tells the actor where the training is."""
        self._actor.take_progress.remote(progress)

    def waiting(self, seconds: float, reason: str) -> None:
        """Tells the actor that the teacher does not answer; for `TeacherClient`.

        Raises:
            Stopped: a stop was asked for.

        """
        self.check_stopped()
        self._actor.take_waiting.remote(seconds, reason)

    def _follow(self) -> None:
        # Polled: a TorchTrainer gives no handle of its workers that the actor could call.
        actions = {"stop": self.stop, "pause": self.pause, "run": self.resume}
        while not self._ended.wait(_POLL_SECONDS):
            actions[ray.get(self._actor.asked.remote())]()
