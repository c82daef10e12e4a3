"""A task of one's own, described by a YAML file beside its data.

name: capitals
data: capitals.jsonl              # a .jsonl, .json (a list) or .parquet file of records, beside this one
question: "Capital of {country}?" # from fields of the record: {field}, {list[0]}, {list[place]} with the field `place`
answer: "{capital}"
extraction: number                # number, letter, truth, `label: answer` (answer1 … answer9), or none: open questions
choices: ["{a}", "{b}"]           # optional; then `loglik` scores them after the question, `answer` is one of them
chance_level: 0.0
max_new_tokens: 32
"""

from __future__ import annotations

import hashlib
import re
import string
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, field_validator

from tutelage.config import Config, read_mapping, validate
from tutelage.data.rows import Row, read_rows
from tutelage.errors import ConfigurationError, DataError
from tutelage.evaluator.scoring.extraction import LETTER, NUMBER, TRUTH, Extraction, labelled
from tutelage.evaluator.tasks.base import Choices, Item, Task
from tutelage.evaluator.tasks.multiple_choice import shared_context

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
_EXTRACTIONS = {"number": NUMBER, "letter": LETTER, "truth": TRUTH}


class _Fields(string.Formatter):
    """Python's format strings, in which `{choices[answer]}` is also the choice whose place the field `answer` says."""

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        try:
            return super().get_field(field_name, args, kwargs)
        except TypeError:  # a list has no names
            placed = re.sub(r"\[(\w+)\]", lambda name: f"[{kwargs.get(name[1], name[1])}]", field_name)
            return super().get_field(placed, args, kwargs)


def _check_name(name: str) -> str:
    if not _NAME.match(name):
        raise ValueError(f"{name!r} is not a name; use A-Z, a-z, 0-9, '.', '_', '-'")
    return name


class Label(Config):
    """Answers `<label>1` … `<label>9`."""

    label: str
    """Stem of the labels, for example `answer`."""


class TaskFile(Config):
    """What the file may say."""

    ELSEWHERE: ClassVar[dict[str, str]] = {
        "task": "name",
        "dataset_path": "data",
        "prompt": "question",
        "doc_to_text": "question",
        "doc_to_target": "answer",
        "target": "answer",
        "doc_to_choice": "choices",
        "options": "choices",
        "output_type": "it follows from choices and extraction",
        "metric_list": "it follows from choices and extraction",
        "filter_list": "extraction",
        "generation_kwargs": "max_new_tokens",
    }

    name: Annotated[str, AfterValidator(_check_name)]
    """Of the task, for the rows."""
    data: Path
    """File of records, relative to this one."""
    question: str
    """Template of the question; `{field}` is a field of the record."""
    answer: str
    """Template of the right answer; of an open question, of a reference."""
    extraction: Literal["number", "letter", "truth"] | Label | None = None
    """How the answer is read from an output; none for open questions, which ROUGE-L scores."""
    choices: tuple[str, ...] = ()
    """Templates of the choices, for `loglik`."""
    chance_level: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Score of guessing."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    """Length limit of an answer."""

    @field_validator("question", "answer")
    @classmethod
    def _differs_by_record(cls, template: str) -> str:
        """Jinja's `{{field}}` is text in braces here, the same in each record."""
        if all(field is None for _, field, _, _ in _Fields().parse(template)):
            raise ValueError(f"{template!r} names no field of a record; write {{field}}, in single braces")
        return template


def read_task(path: Path) -> Task:
    """The task that a file describes.

    Raises:
        ConfigurationError: the file is missing, or does not describe a task.

    """
    content = read_mapping(path, "tasks")
    try:
        described = validate(TaskFile, content)
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}", "tasks") from error
    data = path.parent / described.data
    rows = tuple(read_rows(data))
    return Task(
        name=described.name,
        version=int(hashlib.sha256(described.model_dump_json().encode()).hexdigest()[:7], 16),
        source=str(data),
        count=len(rows),
        chance_level=described.chance_level,
        max_new_tokens=described.max_new_tokens,
        extraction=_extraction_of(described),
        choices=partial(_choices, described, rows) if described.choices else None,
        load=partial(_load, described, rows),
    )


def _extraction_of(described: TaskFile) -> Extraction | None:
    if isinstance(described.extraction, Label):
        return labelled(described.extraction.label, 9)
    return None if described.extraction is None else _EXTRACTIONS[described.extraction]


def _filled(template: str, row: Row) -> str:
    try:
        return _Fields().vformat(template, (), row.values)
    # A template can ask for a key that is not there, for a word of a list, for an attribute, or be no template at all.
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        reason = f"there is no {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(
            f"{row.where} does not fill {template!r}: {reason}; `{{field}}` is a field of the record, "
            "`{field[0]}` the first of its list, `{field[other]}` the one at the place that another field says. "
            f"Its fields: {', '.join(row.values)}",
            "data",
        ) from error


def _load(described: TaskFile, rows: Sequence[Row], task: Task, data_dir: Path | None) -> list[Item]:
    items = []
    for index, row in enumerate(rows):
        question, answer = _filled(described.question, row), _filled(described.answer, row)
        items.append(Item(str(index), question, "", answer, (answer,)))
    return items


def _choices(described: TaskFile, rows: Sequence[Row], item: Item) -> Choices:
    row = rows[int(item.item_id)]
    options = [_filled(choice, row) for choice in described.choices]
    if item.target not in options:
        raise DataError(f"{row.where}: the answer {item.target!r} is none of {options}", "choices")
    return shared_context(item.instruction, options, options, options.index(item.target))
