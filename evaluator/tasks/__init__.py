"""Test sets: the registry of tasks, in the paper's order, the generated one first.

Of the evaluator only `scoring` may be imported here.
"""

from __future__ import annotations

from pathlib import Path

from tutelage.errors import NotFound
from tutelage.evaluator.tasks import arithmetic, custom, instruct, llm_adapters
from tutelage.evaluator.tasks.base import Task

TASKS: dict[str, Task] = {task.name: task for task in (arithmetic.TASK, *llm_adapters.TASKS, *instruct.TASKS)}


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
