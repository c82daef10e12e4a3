"""What can be asked for: a checkpoint, some tasks, a seed, and the labels of its rows."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from math import ceil
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
    """One task under one protocol, the task's own if it is empty; `limit` 0 means all items."""

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
    """The evaluation if it can be queued, its tasks by our names and with their protocols.

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
    tasks = tuple(_resolved(request) for request in evaluation.tasks)
    if len({(request.task, request.protocol) for request in tasks}) != len(tasks):
        raise InvalidRequest("a task is given twice under one protocol; give it once", "tasks")
    return replace(evaluation, tasks=tasks)


def _resolved(request: TaskRequest) -> TaskRequest:
    task = task_of_name(request.task)
    protocol = request.protocol or task.default_protocol
    if protocol not in task.protocols:
        raise InvalidRequest(
            f"{request.task} has no protocol {protocol!r}; choose from {', '.join(task.protocols)}", "tasks"
        )
    # A task of one's own stays the file that it is read from.
    return replace(request, task=task.name if task.name in TASKS else request.task, protocol=protocol)


def parse_tasks(text: str, limit: float, data_dir: Path | None = None) -> tuple[TaskRequest, ...]:
    """Requests from "gsm8k,arc_easy:loglik"; "all" is every task with an answer to extract, under all its protocols.

    Args:
        text: TASK or TASK:PROTOCOL, with commas; without a protocol it is the task's own.
        limit: items of each task; 0 is all of them, and below 1 that share of them, rounded up.
        data_dir: folder of the tasks' data, which a share is of.

    Raises:
        DataError: a share is asked for, and the task's data is not here.
        InvalidRequest: a part is empty, or its task has no such protocol.
        NotFound: there is no such task.

    """
    if text == "all":
        answered = [task for task in TASKS.values() if task.extraction is not None]
        named = [(task.name, protocol) for task in answered for protocol in task.protocols]
    else:
        named = [_task_and_protocol(part.strip()) for part in text.split(",")]
    requests = [_resolved(TaskRequest(task, protocol)) for task, protocol in named]
    if limit == int(limit):
        return tuple(replace(request, limit=int(limit)) for request in requests)
    items = [task_of_name(request.task).items(data_dir) for request in requests]
    return tuple(replace(one, limit=ceil(limit * len(of_task))) for one, of_task in zip(requests, items, strict=True))


def _task_and_protocol(part: str) -> tuple[str, str]:
    name, _, protocol = part.partition(":")
    if not name:
        raise InvalidRequest(f"{part!r} is not TASK or TASK:PROTOCOL, for example arithmetic:paper", "tasks")
    return name, protocol
