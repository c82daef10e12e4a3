"""Evaluates every checkpoint of a run as its students commit them, each once."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tutelage.errors import CheckpointError, Conflict, NotFound
from tutelage.evaluator.config import EvaluationSettings, WatchConfig
from tutelage.evaluator.runner.evaluation import evaluate
from tutelage.evaluator.runner.labels import STEP, labels_of_checkpoint, run_of
from tutelage.evaluator.runner.requests import Evaluation, check, parse_tasks
from tutelage.evaluator.tasks.base import default_data_dir
from tutelage.manifest import MANIFEST

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """A committed checkpoint of a student."""

    path: Path
    student: str
    step: int


def committed(run_dir: Path) -> list[Found]:
    """All checkpoints of a run that have a manifest, the earliest step first.

    Raises:
        NotFound: the run has no students.

    """
    students = run_dir / "students"
    if not students.is_dir():
        raise NotFound(f"{students} does not exist; name the folder of a run of `tutelage train`", "run_dir")
    manifests = students.glob(f"*/checkpoints/*/{MANIFEST}")
    steps = [(path.parent, match) for path in manifests if (match := STEP.match(path.parent.name))]
    found = [Found(path, path.parents[1].name, int(match[1])) for path, match in steps]
    return sorted(found, key=lambda one: (one.step, one.student))


def watch(config: WatchConfig) -> Iterator[tuple[Evaluation, list[Path]]]:
    """Evaluates what is there and what comes, and yields each evaluation and its files when its rows are written.

    A checkpoint whose rows are there already costs one reading of its files. One that its trainer removed or that
    is not what its manifest says is passed over with a warning.

    Raises:
        DataError: a task's data is missing.
        NotFound: the run has no students, or there is no such task.

    """
    settings = EvaluationSettings(**{name: getattr(config, name) for name in EvaluationSettings.model_fields})
    seen: set[Path] = set()
    run = run_of(config.run_dir.resolve())
    while True:
        for found in committed(config.run_dir):
            if found.path not in seen:
                seen.add(found.path)
                try:
                    labels = replace(labels_of_checkpoint(found.path), run=run, teacher=config.teacher)
                    evaluation = Evaluation(
                        evaluation_id=f"{run}.{found.student}.step-{found.step}",
                        checkpoint=found.path,
                        labels=replace(labels, student=found.student, step=found.step),
                        tasks=parse_tasks(config.tasks, config.limit, config.data_dir or default_data_dir()),
                        seed=config.seed,
                    )
                    files = evaluate(check(evaluation), settings, config.out)
                except Conflict as error:
                    _logger.warning("passed over %s: %s", found.path, error)
                except CheckpointError as error:
                    if error.field != "checkpoint":  # the disk is full, say: no fault of this checkpoint
                        raise
                    _logger.warning("passed over %s: %s", found.path, error)
                else:
                    yield evaluation, files
        if config.once:
            return
        time.sleep(config.poll_seconds)
