"""What a cohort names is there and can be read: seen before Ray is started, and by a dry run."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from tutelage.data.conversations import BadRow, conversation_of, format_of
from tutelage.data.hub import local_model
from tutelage.data.models import check_model, pinned
from tutelage.data.rows import read_rows
from tutelage.errors import DataError
from tutelage.files import require_writable
from tutelage.rpc.transport import check_access
from tutelage.trainer.config.run import CohortConfig
from tutelage.trainer.config.student import SourceConfig

_ROWS, _STREAMED_ROWS = 10_000, 100
"""Rows of a data set whose format is looked at, in less than a second; the students read the rest."""


def checked(config: CohortConfig) -> CohortConfig:
    """The cohort with each model of the hub named with its commit; every model and file that it names was looked at.

    Raises:
        ConfigurationError: the run's folder cannot be written, or a file of TLS or a token cannot be read.
        TutelageError: as `check_model`, `pinned` and `read_rows`.

    """
    require_writable(config.output, "output")
    teachers = {f"teachers.{name}": teacher for name, teacher in config.teachers.items()}
    for field, access in {"teacher": config.teacher, "evaluator": config.evaluator, **teachers}.items():
        if access is not None:
            check_access(access, field)
    if config.signals_from is not None and not config.signals_from.is_dir():
        raise DataError(f"{config.signals_from} is no folder; give that of a signal store", "signals_from")
    models = {init: pinned(init, "init") for init in {config.root(student) for student in config.students}}
    for model in models.values():
        check_model(local_model(model, "init"), "init")
    held_out = [student.held_out.data for student in config.students if student.held_out.data is not None]
    sources = [*held_out, *(source for student in config.students for source in student.sources)]
    for source in {source.model_dump_json(): source for source in sources}.values():
        _check_rows(source)
    students = tuple(
        student.model_copy(update={"init": models[student.init]}) if isinstance(student.init, Path) else student
        for student in config.students
    )
    return config.model_copy(update={"students": students})


def _check_rows(source: SourceConfig) -> None:
    row_format = None
    for row in islice(read_rows(source.path, source.part), _STREAMED_ROWS if source.streaming else _ROWS):
        try:
            row_format = row_format or format_of(row.values)
            conversation_of(row.values, row_format, row.where, source.turns)
        except BadRow as error:
            field, problem = error.args
            raise DataError(f"{row.where}: {problem}", field) from error
    if row_format is None:
        raise DataError(f"{source.path} holds no rows", "data.path")
