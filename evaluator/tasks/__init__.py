"""Test sets: the registry of tasks, in the paper's order, the generated one first.

Of the evaluator only `scoring` may be imported here.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from tutelage.errors import NotFound
from tutelage.evaluator.tasks import arithmetic, custom, instruct, llm_adapters
from tutelage.evaluator.tasks.base import Task

TASKS: dict[str, Task] = {task.name: task for task in (arithmetic.TASK, *llm_adapters.TASKS, *instruct.TASKS)}


def task_of_name(name: str) -> Task:
    """The task of that name, ours or lm-evaluation-harness', in any case; a name that ends in `.yaml` is a file's.

    Raises:
        ConfigurationError: the file does not describe a task.
        NotFound: no task goes by it.

    """
    if name.endswith((".yaml", ".yml")):
        return custom.read_task(Path(name))
    task = _BY_NAME.get(_key(name))
    if task is None:
        nearest = difflib.get_close_matches(_key(name), _BY_NAME, n=1)
        hint = f"; did you mean {_BY_NAME[nearest[0]].name}?" if nearest else ""
        raise NotFound(
            f"{name!r} is not a task; choose from {', '.join(TASKS)}, or name the YAML file of your own{hint}", "tasks"
        )
    return task


def _key(name: str) -> str:
    return name.lower().replace("-", "_")


_BY_NAME = {_key(name): task for task in TASKS.values() for name in (task.name, task.harness_name) if name}
