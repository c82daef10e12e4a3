"""Trainings in processes of their own that kill themselves with SIGKILL when they reach a named place.

The places are functions of the trainer that are replaced in the child; the trainer itself knows nothing of them.
Children are forked from a server that has imported everything (multiprocessing's `forkserver`), in a moment each.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer_doubles import InProcessTeacher
from tutelage.trainer.config.student import StudentConfig
from tutelage.trainer.metrics.progress import Progress
from tutelage.trainer.training.loop import train


@dataclass(frozen=True)
class Failpoint:
    """Before a function is called, once training has done some steps."""

    module: str
    attribute: str


FAILPOINTS = {
    "fetch": Failpoint("trainer_doubles", "InProcessTeacher.signals"),
    "sample": Failpoint("tutelage.trainer.rollout.hf_sampler", "sample"),
    "score": Failpoint("tutelage.trainer.training.batch_builder", "teacher_rows"),
    "noise": Failpoint("tutelage.trainer.losses.teacher_distribution", "counter_normal"),
    "forward": Failpoint("tutelage.trainer.model.student", "Student.hidden"),
    "backward": Failpoint("torch", "Tensor.backward"),
    "between micro-batches": Failpoint("tutelage.trainer.model.student", "Student.collect_gradients"),
    "step": Failpoint("torch.optim", "AdamW.step"),
    "step, weights not yet copied": Failpoint("tutelage.trainer.model.student", "Student._publish"),
    "metrics row": Failpoint("tutelage.trainer.metrics.log", "MetricsLog.append"),
    "held-out measures": Failpoint("tutelage.trainer.training.validation", "Validation.run"),
    "save: metrics": Failpoint("tutelage.trainer.metrics.log", "MetricsLog.commit"),
    "save: Parquet": Failpoint("tutelage.trainer.metrics.log", "write_durably"),
    "save: weights": Failpoint("tutelage.trainer.model.student", "Student.save"),
    "save: optimizer": Failpoint("tutelage.trainer.model.student", "save_file"),
    "save: state": Failpoint("tutelage.trainer.checkpoint.trainer_state", "State.save"),
    "save: durable": Failpoint("tutelage.trainer.checkpoint.store", "commit"),
    "save: manifest": Failpoint("tutelage.manifest", "write_durably"),
    "save: removal of old ones": Failpoint("tutelage.trainer.checkpoint.store", "CheckpointStore._prune"),
}


@contextmanager
def fork_server(tests: Path) -> Iterator[Any]:
    """A multiprocessing context whose children need no imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["pytest", "killed_training", "transformers.models.llama.modeling_llama", "peft", "polars", "datasets"]
    )
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(tests), *sys.path])
    try:
        yield context
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def run_to_the_end_or_the_failpoint(
    context: Any, config: StudentConfig, folder: Path, teacher: Path, failpoint: str = "", after_steps: int = 0
) -> bool:
    """Trains in a child; True if it came to the end, False if it was killed at the failpoint.

    Args:
        context: of `fork_server`.
        config: the student's.
        folder: the student's.
        teacher: directory of the teacher's model.
        failpoint: a name of `FAILPOINTS`; empty for none.
        after_steps: how many steps must be done before it kills.

    """
    process = context.Process(
        target=_train, args=(config.model_dump(mode="json"), folder, teacher, failpoint, after_steps)
    )
    process.start()
    process.join(120)
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return process.exitcode == 0


def _train(values: dict[str, Any], folder: Path, teacher: Path, failpoint: str, after_steps: int) -> None:
    steps = [-1]

    def report(progress: Progress) -> None:
        steps[0] = progress.step

    if failpoint:
        _arm(FAILPOINTS[failpoint], lambda: steps[0] >= after_steps)
    train(StudentConfig.model_validate(values), folder=folder, teacher=InProcessTeacher(teacher), report=report)


def _arm(failpoint: Failpoint, armed: Callable[[], bool]) -> None:
    owner: Any = importlib.import_module(failpoint.module)
    *path, name = failpoint.attribute.split(".")
    for part in path:
        owner = getattr(owner, part)
    original = getattr(owner, name)

    def replacement(*arguments: Any, **keywords: Any) -> Any:
        if armed():
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **keywords)

    setattr(owner, name, replacement)
