"""What was found before the first step, as the doctor shows it: of a study, what is alike once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import polars as pl

from tutelage.evaluator.report.page import Column, Section, Table, column
from tutelage.evaluator.report.run_data import RunData
from tutelage.findings import MARKS


def preflight(data: RunData) -> Section | None:
    """What could make the numbers mean something else."""
    return _section(data.preflight, column("student", "student"))


def of_several(found: Iterable[Mapping[str, str]]) -> Section | None:
    """The same of many trainings: how many of them each finding is of."""
    counted = Counter((finding["topic"], finding["state"], finding["text"]) for finding in found)
    rows = [
        {"trainings": count, "topic": topic, "state": state, "text": text}
        for (topic, state, text), count in sorted(counted.items())
    ]
    return _section(rows, column("trainings", "trainings"))


def _section(found: Sequence[Mapping[str, Any]], who: Column) -> Section | None:
    if not found:
        return None
    rows = [{**finding, "mark": f"{MARKS[finding['state']]} {finding['topic']}"} for finding in found]
    columns = [who, column("looked at", "mark", numeric=False), column("found", "text", numeric=False)]
    caption = "Looked at before the first step. ✓ as it should be; · may make numbers mean something else."
    text = "What could make the numbers mean something else."
    return Section("Preflight", text, tables=[Table("preflight", columns, rows, pl.DataFrame(rows), caption)])
