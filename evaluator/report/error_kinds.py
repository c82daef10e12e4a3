"""The section on why answers to word problems of one operation are wrong, of a run's report and of a study's."""

from __future__ import annotations

import polars as pl

from tutelage.evaluator.report.formats import percent
from tutelage.evaluator.report.page import Section, Table, column
from tutelage.evaluator.report.run_data import questions
from tutelage.evaluator.scoring.math_errors import KINDS, ONE_OPERATION_TASKS, count_kinds


def errors(rows: pl.DataFrame, labels: pl.DataFrame) -> Section | None:
    """Why answers are wrong, where such a task is among the rows.

    Args:
        rows: one an item.
        labels: `evaluation_id` and what it is called, `label`, in the order to show; evaluations that are called alike
            (trainings with several seeds) are counted together.

    """
    rows = rows.filter(pl.col("task").is_in(ONE_OPERATION_TASKS), pl.col("protocol") == "paper")
    if rows.is_empty():
        return None
    asked = {task: questions(task) for task in rows["task"].unique().sort()}
    missing = [task for task, known in asked.items() if not known]
    text = "Why answers to word problems of one operation are wrong."
    if missing:
        text += f" The questions of {', '.join(missing)} are not here; name their folder by TUTELAGE_DATA_DIR."
    counted = count_kinds(rows, {item: question for known in asked.values() for item, question in known.items()})
    return Section("Kinds of errors", text, tables=[_table(counted, labels)] if len(counted) else [])


def _table(counted: pl.DataFrame, labels: pl.DataFrame) -> Table:
    """Shares of the kinds, from `math_errors.count_kinds`."""
    named = labels.join(counted, on="evaluation_id", maintain_order="left_right")
    rows = []
    for (label, task), own in named.group_by("label", "task", maintain_order=True):
        items = int(own["items"].sum())
        by_kind = dict(own.group_by("kind").agg(pl.col("items").sum()).iter_rows())
        shares = {kind: by_kind.get(kind, 0) / items for kind in KINDS}
        rows.append({"label": f"{label}, {task}", "items": items} | shares)
    columns = [
        column("evaluation", "label"),
        *(column(kind.replace("_", " "), kind, percent) for kind in KINDS),
        column("n", "items"),
    ]
    caption = (
        "Percent of the outputs; each is of one kind, the first that holds. Extraction failure: the output states "
        "the right answer and LLM-Adapters' rule reads another. Arithmetic slip: a false equation whose true result "
        "is right. Wrong operation and wrong operand: another operation on the right numbers of the question, or the "
        "right one on others."
    )
    return Table("error_kinds", columns, rows, counted, caption)
