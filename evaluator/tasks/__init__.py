"""The registry of tasks, in the paper's order, the generated one first."""

from __future__ import annotations

from tutelage.errors import NotFound

from evaluator.tasks import (
    addsub,
    aqua,
    arc_challenge,
    arc_easy,
    arithmetic,
    boolq,
    gsm8k,
    hellaswag,
    multiarith,
    openbookqa,
    piqa,
    singleeq,
    social_i_qa,
    svamp,
    winogrande,
)
from evaluator.tasks.base import Task

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
TASKS: dict[str, Task] = {module.TASK.name: module.TASK for module in _MODULES}


def task_of_name(name: str) -> Task:
    """The task of that name.

    Raises:
        NotFound: no task goes by it.

    """
    if name not in TASKS:
        raise NotFound(f"{name!r} is not a task; choose from {', '.join(TASKS)}", "tasks")
    return TASKS[name]
