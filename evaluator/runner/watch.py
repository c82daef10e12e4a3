"""Evaluates every checkpoint of a run as its students commit them, each once."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tutelage.errors import CheckpointError, NotFound
from tutelage.evaluator.config import EvaluationSettings, WatchConfig
from tutelage.evaluator.runner.evaluation import evaluate
from tutelage.evaluator.runner.requests import Evaluation, Labels, check, parse_tasks
from tutelage.manifest import MANIFEST

_STEP = re.compile(r"step-(\d+)\Z")
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
    steps = [(path.parent, match) for path in manifests if (match := _STEP.match(path.parent.name))]
    found = [Found(path, path.parents[1].name, int(match[1])) for path, match in steps]
    return sorted(found, key=lambda one: (one.step, one.student))


def watch(config: WatchConfig) -> Iterator[Evaluation]:
    """Evaluates what is there and what comes, and yields each evaluation when its rows are written.

    A checkpoint whose rows are there already costs one reading of its files. One that its trainer removed or that
    is not what its manifest says is passed over with a warning.

    Raises:
        DataError: a task's data is missing.
        NotFound: the run has no students, or there is no such task.

    """
    settings = EvaluationSettings(**{name: getattr(config, name) for name in EvaluationSettings.model_fields})
    seen: set[Path] = set()
    while True:
        for found in committed(config.run_dir):
            if found.path not in seen:
                seen.add(found.path)
                evaluation = _evaluation_of(found, config)
                try:
                    evaluate(evaluation, settings, config.out)
                except CheckpointError as error:
                    _logger.warning("passed over %s: %s", found.path, error)
                else:
                    yield evaluation
        if config.once:
            return
        time.sleep(config.poll_seconds)


def _trained(run_dir: Path) -> dict[str, dict[str, Any]]:
    """Settings of each student as the run's `cohort.yaml` keeps them; none if the run kept none."""
    path = run_dir / "cohort.yaml"
    if not path.exists():
        return {}
    return {student["id"]: student for student in yaml.safe_load(path.read_text(encoding="utf-8"))["students"]}


def _evaluation_of(found: Found, config: WatchConfig) -> Evaluation:
    run, trained = config.run_dir.resolve().name, _trained(config.run_dir).get(found.student, {})
    objective = trained.get("objective", {})
    labels = Labels(
        run=run,
        student=found.student,
        teacher=config.teacher,
        objective=objective.get("name", ""),
        temperature=objective.get("temperature", 0.0),
        noise=objective.get("noise", 0.0),
        step=found.step,
        training_seed=trained.get("seed", 0),
    )
    return check(
        Evaluation(
            evaluation_id=f"{run}.{found.student}.step-{found.step}",
            checkpoint=found.path,
            labels=labels,
            tasks=parse_tasks(config.tasks, config.limit),
            seed=config.seed,
        )
    )
