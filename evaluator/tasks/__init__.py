"""The registry of tasks, in the paper's order, the generated one first."""

from __future__ import annotations

from pathlib import Path

from tutelage.errors import NotFound
from tutelage.evaluator.tasks import (
    addsub,
    aqua,
    arc_challenge,
    arc_easy,
    arithmetic,
    boolq,
    custom,
    gsm8k,
    hellaswag,
    instruct,
    multiarith,
    openbookqa,
    piqa,
    singleeq,
    social_i_qa,
    svamp,
    winogrande,
)
from tutelage.evaluator.tasks.base import Task

_MODULES = (
    arithmetic,
    gsm8k,
    svamp,
    multiarith,
    singleeq,
    addsub,
    aqua,
    hellaswag,
    boolq,
    social_i_qa,
    piqa,
    arc_easy,
    arc_challenge,
    winogrande,
    openbookqa,
)
TASKS: dict[str, Task] = {task.name: task for task in (*(module.TASK for module in _MODULES), *instruct.TASKS)}


def task_of_name(name: str) -> Task:
    """The task of that name; a name that ends in `.yaml` is the file of a task of one's own.

    Raises:
        ConfigurationError: the file does not describe a task.
        NotFound: no task goes by it.

    """
    if name.endswith(".yaml"):
        return custom.read_task(Path(name))
    if name not in TASKS:
        raise NotFound(f"{name!r} is not a task; choose from {', '.join(TASKS)}", "tasks")
    return TASKS[name]
