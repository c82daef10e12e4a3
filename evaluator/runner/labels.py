"""What a checkpoint is: the labels of its rows, from what its training left beside it.

A checkpoint of `tutelage train` lies at `<run>/students/<id>/checkpoints/step-<step>/`; its student's resolved settings
are in `<id>/student.yaml`, and the steps that it has done in the checkpoint's own `state.json`.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from tutelage.errors import CheckpointError, Conflict
from tutelage.evaluator.runner.requests import Evaluation, Labels

STEP = re.compile(r"step-(\d+)\Z")
"""Name of a checkpoint's folder."""
_SETTINGS, _STATE = "student.yaml", "state.json"
_logger = logging.getLogger(__name__)


def labels_of_checkpoint(checkpoint: Path, given: dict[str, Any] | None = None) -> Labels:
    """The labels of a checkpoint; `given` ones go before those that its training left.

    A directory that no student wrote is called by its own name, in the run `default`.

    Raises:
        CheckpointError: what its training left cannot be read.

    """
    found = _left_by_training(checkpoint.resolve()) or Labels("default", checkpoint.resolve().name)
    return replace(found, **{name: value for name, value in (given or {}).items() if value is not None})


def _left_by_training(checkpoint: Path) -> Labels | None:
    folder = checkpoint.parent.parent
    settings_file = folder / _SETTINGS
    if checkpoint.parent.name != "checkpoints" or not settings_file.exists():
        return None
    try:
        settings = yaml.safe_load(settings_file.read_text(encoding="utf-8"))
        objective = settings.get("objective") or {}
        return Labels(
            run=run_of(folder.parent.parent),
            student=settings.get("id", folder.name),
            objective=objective.get("name", ""),
            temperature=float(objective.get("temperature", 0.0)),
            noise=float(objective.get("noise", 0.0)),
            step=step_of(checkpoint),
            training_seed=int(settings.get("seed", 0)),
        )
    except (OSError, yaml.YAMLError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{settings_file} does not say what was trained ({error!r}); copy the checkpoint elsewhere and name it by "
            "--student",
            "checkpoint",
        ) from error


def run_of(folder: Path) -> str:
    """The run's name as its `cohort.yaml` says, which the evaluation service is told too; else its folder's."""
    cohort = folder / "cohort.yaml"
    if not cohort.exists():
        return folder.name
    return str(yaml.safe_load(cohort.read_text(encoding="utf-8")).get("run", folder.name))


def step_of(checkpoint: Path) -> int:
    """Steps that a checkpoint has done: as its `state.json` says, else as its folder is called; 0 if nothing does.

    Raises:
        ValueError: `state.json` is not one.

    """
    state = checkpoint / _STATE
    if state.exists():
        return int(json.loads(state.read_text(encoding="utf-8"))["step"])
    match = STEP.match(checkpoint.name)
    return int(match[1]) if match else 0


def refuse_other_rows_of_the_same_labels(evaluation: Evaluation, checkpoint_digest: str, frames: Path) -> None:
    """Summaries and reports tell evaluations apart by their labels alone: two checkpoints must not share all of them.

    Raises:
        Conflict: there are rows of another checkpoint, by another evaluation, with these labels.

    """
    labels = asdict(evaluation.labels)
    del labels["run"]  # the folder says it
    columns = ["evaluation_id", "checkpoint", "checkpoint_digest", *labels]
    for path in sorted(frames.glob(f"run={evaluation.labels.run}/task=*/*.parquet")):
        try:
            rows = pl.read_parquet(path, columns=columns, n_rows=1, hive_partitioning=False).to_dicts()
        except (pl.exceptions.PolarsError, OSError) as error:  # It is no reason not to evaluate something else.
            _logger.warning("%s cannot be read: %s", path, error)
            continue
        for row in rows:
            same = all(row[name] == value for name, value in labels.items())
            others = row["evaluation_id"] != evaluation.evaluation_id and row["checkpoint_digest"] != checkpoint_digest
            if same and others:
                raise Conflict(
                    f"{frames} has rows of {row['checkpoint']} under the labels of {evaluation.checkpoint} (run "
                    f"{evaluation.labels.run}, student {labels['student']}, step {labels['step']}), and a report would "
                    "take the two for one; name this one by --student, or remove those rows",
                    "labels",
                )
