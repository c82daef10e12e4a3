"""The frames that study-level statistics start from, and the improvement over fine-tuning.

One row of `SCORES` is one cell of a results table: a trained student on one task. `Average` is a task of
its own, as the tables print it. `SIMILARITIES` holds what compares two models' outputs (agreement, BLEU).
"""

from __future__ import annotations

from typing import Literal

import polars as pl

from tutelage.errors import DataError

AVERAGE = "Average"
BASE, FINE_TUNED = "base", "sft"  # the two methods without a teacher

SCORES = pl.Schema(
    {
        "track": pl.String,  # e.g. math, commonsense
        "teacher": pl.String,  # null for base and fine-tuned models
        "student": pl.String,
        "student_size": pl.Float64,  # parameters, any one unit: only ranks are used
        "method": pl.String,  # base, sft, or the name of a distillation method
        "temperature": pl.Float64,  # of distillation; null for base and fine-tuned models
        "teacher_tuned": pl.Boolean,  # false: the task-unaware teacher; null without a teacher
        "task": pl.String,
        "score": pl.Float64,  # percent, 0 … 100
    }
)

SIMILARITIES = pl.Schema(
    {
        "track": pl.String,
        "measure": pl.String,
        "of": pl.String,  # which student was compared: sft, or kd for a distilled one
        "teacher": pl.String,
        "student": pl.String,
        "task": pl.String,
        "value": pl.Float64,  # percent
    }
)

Selection = Literal["maximum_over_temperatures", "temperature_1"]
"""How several temperatures of one teacher, student and method become one score.

`maximum_over_temperatures` takes each task's best, chosen on the test set: what the paper did.
`temperature_1` takes the temperature that every method was run at, so nothing is chosen.
"""


def distilled(scores: pl.DataFrame, selection: Selection) -> pl.DataFrame:
    """One score per track, teacher, student, method and task, of students of tuned teachers.

    Args:
        scores: rows of `SCORES`.
        selection: see `Selection`.

    Returns:
        Columns track, teacher, student, student_size, method, task, score.

    """
    rows = scores.filter(pl.col("teacher_tuned"))
    if selection == "temperature_1":
        rows = rows.filter(pl.col("temperature") == 1.0)
    keys = ["track", "teacher", "student", "student_size", "method", "task"]
    return rows.group_by(keys, maintain_order=True).agg(pl.col("score").max())


def improvements(scores: pl.DataFrame, selection: Selection) -> pl.DataFrame:
    """Distilled score minus the same student's fine-tuned score, with what it is compared against.

    Args:
        scores: rows of `SCORES`, fine-tuned students and teachers among them.
        selection: see `Selection`.

    Returns:
        The columns of `distilled` and sft_score, teacher_score (the fine-tuned teacher's), improvement
        (percentage points; one subtraction in float64). It is not rounded, as the authors' is not: rounding
        would join ties that the subtraction splits, and move the published rank statistics.

    Raises:
        DataError: a student or teacher has no fine-tuned score on a task.

    """
    fine_tuned = scores.filter(pl.col("method") == FINE_TUNED).select("track", "student", "task", "score")
    joined = (
        distilled(scores, selection)
        .join(fine_tuned.rename({"score": "sft_score"}), on=["track", "student", "task"], how="left")
        .join(
            fine_tuned.rename({"score": "teacher_score", "student": "teacher"}),
            on=["track", "teacher", "task"],
            how="left",
        )
    )
    incomplete = joined.filter(pl.any_horizontal(pl.col("sft_score", "teacher_score").is_null()))
    if incomplete.height:
        row = incomplete.row(0, named=True)
        missing = "student" if row["sft_score"] is None else "teacher"
        raise DataError(
            f"{missing} {row[missing]!r} has no {FINE_TUNED!r} score on {row['task']!r}; improvement is measured "
            "against the fine-tuned model, so evaluate it too"
        )
    return joined.with_columns(improvement=pl.col("score") - pl.col("sft_score"))
