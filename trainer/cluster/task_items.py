"""Whether students are trained on what they are tested on: the items of the evaluator's tasks among their rows.

The evaluator's command says which items there are: it may not be installed here, or lack their data. What is found is
kept in the run's folder, for its report.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from tutelage.data.conversations import Turns
from tutelage.data.dataset_files import conversations
from tutelage.data.overlap import WORDS, Overlap, overlaps, texts_of
from tutelage.data.rows import Part
from tutelage.errors import TutelageError
from tutelage.files import write_durably
from tutelage.findings import Finding
from tutelage.runtime.programs import tutelage
from tutelage.trainer.config.run import CohortConfig
from tutelage.trainer.config.services import EvaluatorConfig

FILE = "preflight.json"
_TOPIC = "test items"
_SHOWN = 80


class _Rows(NamedTuple):
    """What is read of a source."""

    path: Path
    turns: Turns
    part: Part


def findings_of_cohort(config: CohortConfig) -> dict[str, list[Finding]]:
    """One finding a student and task: a note if an item is a row of its data, or shares 13 words in a row with one.

    None without an evaluator. What cannot be compared is said, and refuses nothing.
    """
    if config.evaluator is None:
        return {}
    items, missing = _items_of(config.evaluator)
    sources = {each.id: tuple(_Rows(one.path, one.turns, one.part) for one in each.sources) for each in config.students}
    found = {rows: missing + (_compared(rows, items) if items else []) for rows in set(sources.values())}
    return {student: found[rows] for student, rows in sources.items()}


def keep(findings: dict[str, list[Finding]], output: Path) -> None:
    """Writes them into the run's folder, beside those of students that an earlier command trained there."""
    if not findings:
        return
    path = output / FILE
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known |= {student: [asdict(finding) for finding in found] for student, found in findings.items()}
    write_durably(path, json.dumps(known, indent=1, ensure_ascii=False) + "\n")


def _items_of(evaluator: EvaluatorConfig) -> tuple[dict[str, list[str]], list[Finding]]:
    """What the items ask that each task is scored on, and the tasks of which that is not known here."""
    limits: dict[str, list[int]] = {}
    for asked in evaluator.tasks:
        limits.setdefault(asked.task, []).append(asked.limit)
    texts, problem = _texts_of(list(limits))
    missing = []
    if problem:  # It is one task's, which does not hide the others.
        for task in limits:
            found, problem = _texts_of([task])
            texts |= found
            missing += [_not_compared(f"{task}: {problem}")] if problem else []
    # A task with several protocols is scored on the most that one of them asks; 0 is all.
    return {task: texts[task][: None if 0 in limits[task] else max(limits[task])] for task in texts}, missing


def _texts_of(tasks: Sequence[str]) -> tuple[dict[str, list[str]], str]:
    """What each item of some tasks asks, or why one of them cannot be read."""
    done = subprocess.run(
        tutelage("evaluate", "items", "--tasks", ",".join(tasks)), check=False, capture_output=True, text=True
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"`tutelage evaluate items` ended with {done.returncode}"]
        return {}, said[-1]
    texts: dict[str, list[str]] = {task: [] for task in tasks}
    for line in done.stdout.splitlines():
        item = json.loads(line)
        texts[item["task"]].append(item["text"])
    return texts, ""


def _compared(sources: Sequence[_Rows], items: dict[str, list[str]]) -> list[Finding]:
    whole = [source for source in sources if not source.part.streaming]
    streamed = [str(source.path) for source in sources if source.part.streaming]
    rows = ((said.where, texts_of(said)) for source in whole for _, said in conversations(*source))
    try:
        found = [_finding(task, items[task], each) for task, each in overlaps(items, rows).items()]
    except TutelageError as error:  # a row that the student will refuse, by name
        found = [_not_compared(error.message)]
    return found + ([_not_compared(f"{', '.join(streamed)} is streamed")] if streamed else [])


def _not_compared(why: str) -> Finding:
    return Finding(_TOPIC, "note", f"not compared with the rows: {why}")


def _finding(task: str, items: list[str], overlap: Overlap) -> Finding:
    count = overlap.items
    short = f"; {overlap.short:,} have fewer words, and are found word for word only" if overlap.short else ""
    if overlap.example is None:
        text = f"{task}: no item (of {count:,}) is a training row or shares {WORDS} words in a row with one{short}"
        return Finding(_TOPIC, "ok", text)
    index, where = overlap.example
    question = " ".join(items[index].split())[:_SHOWN]
    return Finding(
        _TOPIC,
        "note",
        f"{task}: {overlap.exact:,} of {count:,} items ({overlap.exact / count:.1%}) are training rows word for word, "
        f"{overlap.shared:,} more ({overlap.shared / count:.1%}) share {WORDS} words in a row with one{short}: their "
        f"scores may be memory; item {index} with {where}: {question!r}",
    )
