"""Of a run: what its trainings found before their first step, as the doctor shows it."""

from __future__ import annotations

import polars as pl

from tutelage.evaluator.report.page import Section, Table, column
from tutelage.evaluator.report.run_data import RunData
from tutelage.findings import MARKS


def preflight(data: RunData) -> Section | None:
    """What could make the numbers mean something else."""
    if not data.preflight:
        return None
    rows = [{**finding, "mark": f"{MARKS[finding['state']]} {finding['topic']}"} for finding in data.preflight]  # type: ignore[index]
    columns = [
        column("student", "student"),
        column("looked at", "mark", numeric=False),
        column("found", "text", numeric=False),
    ]
    caption = "Looked at before the first step. ✓ as it should be; · may make numbers mean something else."
    text = "What could make the numbers mean something else."
    return Section("Preflight", text, tables=[Table("preflight", columns, rows, pl.DataFrame(rows), caption)])
