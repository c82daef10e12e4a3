"""What is looked at before an engine starts, and by a dry run: the checkpoint's files, the tasks' items."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tutelage.data.hub import local_model
from tutelage.data.models import check_weights
from tutelage.errors import DataError, TutelageError
from tutelage.evaluator.models.registry import not_loading
from tutelage.evaluator.runner.requests import TaskRequest
from tutelage.evaluator.tasks import task_of_name


def require_checkpoint(checkpoint: Path) -> None:
    """Refuses what no engine would load, having read configuration, tokenizer and the heads of the weights.

    Raises:
        CheckpointError: it is no folder and no model of the hub, or transformers does not read its tokenizer or
            configuration.
        TutelageError: as `check_weights`.

    """
    folder = local_model(checkpoint, "checkpoint")
    check_weights(folder, "checkpoint")
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # it warns of what is refused here
    try:
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if (folder / "config.json").exists():  # an adapter's names the model that it belongs to
            AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise not_loading(checkpoint, error) from error


def require_items(tasks: Sequence[TaskRequest], data_dir: Path | None) -> None:
    """Refuses tasks whose data is missing or malformed, or of which no item can be asked.

    Raises:
        DataError: names the file, or what the first item lacks.

    """
    for request in tasks:
        task = task_of_name(request.task)
        items = task.items(data_dir, request.limit)
        if not items:
            raise DataError(f"{request.task} has no items", "tasks")
        if request.protocol != "loglik" or task.choices is None:
            continue
        problems = []
        for item in items:
            try:
                task.choices(item)
                break  # one that cannot be asked is a row with its error; only a task of such is for nothing
            except TutelageError as error:
                problems.append(error)
        else:
            raise problems[0]
