"""Instruction following: MiniLLM's five test sets (Gu et al. 2024, arXiv 2306.08543), from files in its schema.

One JSON object a line: `instruction`, `input`, `output` (a reference or a list of them). What MiniLLM's scripts
call `prompt` is built anew from the first two.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tutelage.data.rows import read_rows
from tutelage.errors import DataError
from tutelage.evaluator.tasks.base import Item, Task, required_file

_HUB = "https://huggingface.co/datasets/MiniLLM/"
_MIN_REFERENCE_WORDS = 11


def _read(task: Task, data_dir: Path | None) -> list[Item]:
    """Items of a file of JSON lines.

    Raises:
        DataError: it is missing or malformed.

    """
    path = required_file(task, data_dir)
    items = []
    for index, row in enumerate(read_rows(path)):
        try:
            items.append(_item(str(index), row.values))
        except (KeyError, TypeError, IndexError) as error:
            raise DataError(f"{row.where}: is not instruction, input, output ({error!r})", "tasks") from error
    return items


def _item(item_id: str, record: dict[str, Any]) -> Item:
    if "text" in record:  # a question of Vicuna's, without a reference
        return Item(item_id, record["text"], "", "")
    output = record["output"]
    references = (output,) if isinstance(output, str) else tuple(output)
    return Item(item_id, record["instruction"], record["input"], references[0], references)


def _read_long(task: Task, data_dir: Path | None) -> list[Item]:
    """Items whose longest reference has at least eleven words, at most as many as the task declares."""
    items = [item for item in _read(task, data_dir) if max(_words(item)) >= _MIN_REFERENCE_WORDS]
    return items[: task.count]


def _words(item: Item) -> list[int]:
    return [len(reference.split()) for reference in item.references]


def _task(name: str, file: str, source: str, count: int, *problems: str, long_only: bool = False) -> Task:
    return Task(
        name=name,
        version=1,
        source=source,
        count=count,
        chance_level=0.0,
        max_new_tokens=256,
        extraction=None,
        known_problems=problems,
        load=_read_long if long_only else _read,
        files=tuple(f"instruct/{one}" for one in file.split()),
    )


TASKS = (
    _task(
        "self_instruct",
        "self_inst.valid.jsonl",
        _HUB + "self-inst, valid.jsonl",
        252,
        "ROUGE-L rewards the reference's words, not a good answer",
    ),
    _task(
        "vicuna",
        "vicuna.valid.jsonl vicuna_questions_v1.jsonl",
        _HUB + "Vicuna, valid.jsonl",
        80,
        "the references are another model's answers; without a reference an answer has no score",
    ),
    _task("dolly", "dolly.valid.jsonl", _HUB + "dolly, valid.jsonl", 500),
    _task(
        "s_ni",
        "sinst.valid.jsonl",
        _HUB + "sinst, 11_/valid.jsonl",
        1694,
        "only items whose reference has eleven words or more",
        long_only=True,
    ),
    _task(
        "unnatural",
        "uinst.valid.jsonl",
        _HUB + "uinst, 11_/valid.jsonl",
        10_000,
        "the first 10,000 items whose reference has eleven words or more; written by a model",
        long_only=True,
    ),
)
