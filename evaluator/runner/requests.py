"""What can be asked for: a checkpoint, some tasks, a seed, and the labels of its rows."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tutelage.errors import InvalidRequest
from tutelage.evaluator.tasks import TASKS, task_of_name
from tutelage.names import check_name

_EVALUATION_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}\Z")


@dataclass(frozen=True)
class Labels:
    """What the checkpoint is; copied into every row. Fields as in the contract's `EvaluationLabels`."""

    run: str
    student: str
    teacher: str = ""
    objective: str = ""
    temperature: float = 0.0
    noise: float = 0.0
    step: int = 0
    training_seed: int = 0


@dataclass(frozen=True)
class TaskRequest:
    """One task under one protocol; `limit` 0 means all items."""

    task: str
    protocol: str
    limit: int = 0


@dataclass(frozen=True)
class Evaluation:
    """One checkpoint on some tasks."""

    evaluation_id: str
    checkpoint: Path
    labels: Labels
    tasks: tuple[TaskRequest, ...]
    seed: int = 0


def check(evaluation: Evaluation) -> Evaluation:
    """The evaluation itself if it can be queued.

    Raises:
        ConfigurationError: the run's name is not allowed.
        InvalidRequest: the id is not allowed, or there is no task, or one twice, or one without that protocol.
        NotFound: there is no such task.

    """
    if not _EVALUATION_ID.match(evaluation.evaluation_id):
        raise InvalidRequest(
            f"{evaluation.evaluation_id!r} is not an id; use 1 to 128 of a-z, 0-9, '.', '_', '-', starting with a "
            "letter or digit",
            "evaluation_id",
        )
    check_name(evaluation.labels.run, "labels.run")
    if not evaluation.tasks:
        raise InvalidRequest("no task is given; name at least one", "tasks")
    pairs = [(request.task, request.protocol) for request in evaluation.tasks]
    if len(set(pairs)) != len(pairs):
        raise InvalidRequest("a task is given twice under one protocol; give it once", "tasks")
    for name, protocol in pairs:
        task = task_of_name(name)
        if protocol not in task.protocols:
            raise InvalidRequest(f"{name} has no protocol {protocol!r}; choose from {task.protocols}", "tasks")
    return evaluation


def parse_tasks(text: str, limit: int) -> tuple[TaskRequest, ...]:
    """Requests from "arithmetic:paper,ARC-Easy:loglik"; "all" is every task with an answer to extract.

    Raises:
        InvalidRequest: a part is not TASK:PROTOCOL.

    """
    if text == "all":
        answered = [task for task in TASKS.values() if task.extraction is not None]
        return tuple(TaskRequest(task.name, name, limit) for task in answered for name in task.protocols)
    requests = []
    for part in text.split(","):
        task, colon, protocol = part.strip().rpartition(":")
        if not colon:
            raise InvalidRequest(f"{part!r} is not TASK:PROTOCOL, for example arithmetic:paper", "tasks")
        requests.append(TaskRequest(task, protocol, limit))
    return tuple(requests)
