"""What is compared item by item: a student after training with itself before, and with its teacher."""

from __future__ import annotations

import numpy as np
import polars as pl

from tutelage.evaluator.report.run_data import CELL, RunData
from tutelage.evaluator.scoring.agreement import agreement, fidelity, pair
from tutelage.evaluator.statistics.paired import cluster_bootstrap_interval, mcnemar_exact

CHANGES = pl.Schema(
    {
        "student": pl.String,
        "task": pl.String,
        "protocol": pl.String,
        "items": pl.Int64,
        "before": pl.Float64,
        "after": pl.Float64,
        "change": pl.Float64,
        "low": pl.Float64,  # of the 95 % interval of the change
        "high": pl.Float64,
        "gained": pl.Int64,  # items right only after
        "lost": pl.Int64,  # items right only before
        "p_value": pl.Float64,
    }
)
LIKENESS = pl.Schema(
    {
        "student": pl.String,
        "role": pl.String,
        "step": pl.UInt64,
        "task": pl.String,
        "protocol": pl.String,
        "items": pl.Int64,
        "score": pl.Float64,
        "agreement": pl.Float64,
        "kappa": pl.Float64,
        "when_teacher_right": pl.Float64,
        "when_teacher_wrong": pl.Float64,
        "teacher_unparsable": pl.Float64,
        "student_unparsable": pl.Float64,
        "bleu": pl.Float64,
        "sentence_bleu": pl.Float64,
        "chrf": pl.Float64,
        "signature": pl.String,
    }
)
_RESAMPLES = 2000


def changes(data: RunData) -> pl.DataFrame:
    """Before against after training, a row a student, task and protocol.

    The interval is a bias-corrected and accelerated bootstrap over items (items with the same text are one
    cluster), the p-value McNemar's exact test, two-sided.
    """
    rows = []
    for (student, task, protocol), cells in data.summary.group_by(["student", *CELL], maintain_order=True):
        before, after = (_only(cells.filter(role=role)) for role in ("before", "after"))
        if before is None or after is None:
            continue
        both = pair(_rows_of(data, before), _rows_of(data, after))
        if len(both) < 2:
            continue
        was, is_now = both["score"].to_numpy(), both["score_student"].to_numpy()
        # A generator a cell: what one student's interval is does not hang on which others are in the frames.
        interval = cluster_bootstrap_interval(
            is_now - was, both["item_hash"].to_list(), np.random.default_rng(0), resamples=_RESAMPLES
        )
        test = mcnemar_exact(is_now == 1.0, was == 1.0)
        rows.append(
            {
                **{"student": student, "task": task, "protocol": protocol, "items": len(both)},
                "before": float(was.mean()),
                "after": float(is_now.mean()),
                "change": interval.estimate,
                "low": interval.low,
                "high": interval.high,
                "gained": test.only_first,
                "lost": test.only_second,
                "p_value": test.p_value,
            }
        )
    return pl.DataFrame(rows, schema=CHANGES)


def likeness(data: RunData) -> pl.DataFrame:
    """Every evaluation of a student against its teacher's of the same task: agreement and, for texts, BLEU."""
    teachers = data.summary.filter(role="teacher")
    rows = []
    for cell in data.summary.filter(pl.col("role") != "teacher").to_dicts():
        own = {"task": cell["task"], "protocol": cell["protocol"], "template": cell["template"]}
        teacher = _only(teachers.filter(student=cell["teacher"], **own))
        if teacher is None:
            continue
        both = pair(_rows_of(data, teacher), _rows_of(data, cell))
        if both.is_empty():
            continue
        agreed = agreement(both)
        texts = fidelity(both) if cell["protocol"] == "paper" else None
        measured = {**vars(agreed), **(vars(texts) if texts else {})}
        rows.append({name: measured.get(name, cell.get(name)) for name in LIKENESS})
    return pl.DataFrame(rows, schema=LIKENESS)


def _only(cells: pl.DataFrame) -> dict[str, str] | None:
    """The evaluation of a cell; of several, the last by id."""
    return cells.sort("evaluation_id").row(-1, named=True) if len(cells) else None


def _rows_of(data: RunData, cell: dict[str, str]) -> pl.DataFrame:
    return data.rows.filter(evaluation_id=cell["evaluation_id"], task=cell["task"], protocol=cell["protocol"])
