"""What a task is: where its items are, how they are asked, read and scored."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tutelage.data.conversations import Conversation, user_message
from tutelage.data.rows import read_rows
from tutelage.errors import DataError
from tutelage.evaluator.scoring.extraction import NUMBER, Extraction


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        item_id: its index in the test file, as text.
        instruction: the question as LLM-Adapters words it.
        input: further context, usually empty.
        target: the gold answer; of an open question the first reference, or empty.
        references: all reference answers of an open question.

    """

    item_id: str
    instruction: str
    input: str
    target: str
    references: tuple[str, ...] = ()

    @property
    def conversation(self) -> Conversation:
        """The question as a template takes it, which is how a trainer gives it a data file's row."""
        return Conversation([user_message(self.instruction)], None, self.input, f"item {self.item_id}")

    @property
    def item_hash(self) -> str:
        """16 hex digits of the SHA-256 of what is asked and what is right."""
        content = json.dumps([self.instruction, self.input, self.target])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Choices:
    """One item as lm-evaluation-harness scores it: the log-probability of each continuation of its context.

    Attributes:
        contexts: one a choice (all equal, but for tasks that fill a blank).
        continuations: one a choice, with the space before it.
        lengths: characters of each choice, by which `acc_norm` divides.
        labels: the answer that each choice stands for.
        gold: index of the right one.

    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    lengths: tuple[int, ...]
    labels: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class Task:
    """One test set.

    Attributes:
        name: as LLM-Adapters spells it.
        version: rises when a change here changes rows.
        source: where the items come from.
        count: items in all.
        chance_level: score of guessing (for two or more choices: uniformly), in [0, 1].
        max_new_tokens: length limit of an answer under `paper`.
        extraction: from text to answer, or None for open questions, which have no answer to extract.
        known_problems: what a reader of its scores should know.
        choices: the item under `loglik`, or None if the task has no choices.
        load: reads the items from the data folder.
        files: below the data folder, the first of them that is there is read; by default LLM-Adapters' layout.
        harness_name: what lm-evaluation-harness calls the task whose requests `loglik` makes; empty if it makes others.

    """

    name: str
    version: int
    source: str
    count: int
    chance_level: float
    max_new_tokens: int
    extraction: Extraction | None
    known_problems: tuple[str, ...] = ()
    choices: Callable[[Item], Choices] | None = None
    load: Callable[[Task, Path | None], list[Item]] | None = None
    files: tuple[str, ...] = ()
    harness_name: str = ""

    @property
    def protocols(self) -> tuple[str, ...]:
        """Protocols under which the task can run."""
        generated = "open" if self.extraction is None else "paper"
        return (generated,) if self.choices is None else (generated, "loglik")

    @property
    def default_protocol(self) -> str:
        """Where none is named: choices are scored as the harness does, numbers and texts are written."""
        return "loglik" if self.choices is not None and self.extraction is not NUMBER else self.protocols[0]

    def chance(self, protocol: str) -> float:
        """Score of guessing under a protocol; a number that must be written is not guessed."""
        return 0.0 if protocol == "paper" and self.extraction is NUMBER else self.chance_level

    def items(self, data_dir: Path | None, limit: int = 0) -> list[Item]:
        """The first `limit` items in the file's order; 0 means all.

        Raises:
            DataError: the test file is missing or malformed; the message says how to get it.

        """
        items = (self.load or read_test_file)(self, data_dir)
        return items[:limit] if limit else items

    def missing(self, data_dir: Path | None) -> str:
        """How to get the data; empty if it is here."""
        if (self.load is not None and not self.files) or data_file(self, data_dir) is not None:
            return ""
        looked = f"looked in {data_dir}" if data_dir else "no data folder is set"
        return (
            f"{self.name} needs <data>/{self._files[0]}, which is {self.source} ({looked}); "
            "name the folder <data> by --data-dir or TUTELAGE_DATA_DIR"
        )

    @property
    def _files(self) -> tuple[str, ...]:
        return self.files or (f"tasks/{self.name}/test.json",)


def default_data_dir() -> Path | None:
    """The folder that TUTELAGE_DATA_DIR names, if it does."""
    folder = os.environ.get("TUTELAGE_DATA_DIR")
    return Path(folder) if folder else None


def data_file(task: Task, data_dir: Path | None) -> Path | None:
    """The task's file, if it is here."""
    places = [data_dir / name for name in task._files] if data_dir else []
    return next((place for place in places if place.is_file()), None)


def required_file(task: Task, data_dir: Path | None) -> Path:
    """The task's file.

    Raises:
        DataError: it is not here; the message says how to get it.

    """
    path = data_file(task, data_dir)
    if path is None:
        raise DataError(task.missing(data_dir), "tasks")
    return path


def read_test_file(task: Task, data_dir: Path | None) -> list[Item]:
    """Items of `<data_dir>/tasks/<task>/test.json`: a list of `instruction`, `input`, `output`, `answer`.

    The `output` of that file is a model's rationale and often wrong; it is not read.
    """
    path = required_file(task, data_dir)
    try:
        return items_of_records([row.values for row in read_rows(path)])
    except KeyError as error:
        raise DataError(f"{path} is not a list of instruction, input, answer ({error!r})", "tasks") from error


def items_of_records(records: Sequence[dict[str, str]]) -> list[Item]:
    """Items from records of `instruction`, `input`, `answer`."""
    return [
        Item(str(index), record["instruction"], record["input"], record["answer"])
        for index, record in enumerate(records)
    ]
