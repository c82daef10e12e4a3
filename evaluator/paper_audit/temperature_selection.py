"""Audit, part 1: what the maximum over temperatures, taken on the test set, adds and hides."""

from __future__ import annotations

from typing import get_args

import numpy as np
import polars as pl

from tutelage.evaluator.paper_audit.published_tests import ALL_METHODS, published_tests
from tutelage.evaluator.statistics.paired import cluster_bootstrap_interval
from tutelage.evaluator.statistics.scores import AVERAGE, FINE_TUNED, Selection, improvements

SELECTIONS: tuple[Selection, ...] = get_args(Selection)


def means_by_student(scores: pl.DataFrame, generator: np.random.Generator) -> pl.DataFrame:
    """Mean improvement of the average by student and over all, under both selections.

    Returns:
        Columns track, student, selection, pairs, rows, mean, low, high; the interval (95 %, percentile)
        resamples pairs, and is null where a student has one pair only.

    """
    rows = []
    for selection in SELECTIONS:
        average = improvements(scores, selection).filter(task=AVERAGE)
        by_student = average.sort("track", "student_size", "student", descending=[True, False, False])
        groups = [(str(s), g) for (_, s), g in by_student.group_by("track", "student", maintain_order=True)]
        groups += [("all students", group) for _, group in by_student.group_by("track", maintain_order=True)]
        for student, group in groups:
            rows.append({"track": group["track"][0], "student": student, "selection": selection})
            rows[-1] |= _mean_over_pairs(group, generator)
    return pl.DataFrame(rows)


def _mean_over_pairs(group: pl.DataFrame, generator: np.random.Generator) -> dict[str, float | int | None]:
    pair = group.select(pl.concat_str("teacher", "student")).to_series().to_numpy()
    values, pairs = group["improvement"].to_numpy(), len(set(pair))
    measured: dict[str, float | int | None] = {"pairs": pairs, "rows": len(values), "mean": float(values.mean())}
    if pairs == 1:
        return measured | {"low": None, "high": None}
    interval = cluster_bootstrap_interval(values, pair, generator, method="percentile", resamples=4000)
    return measured | {"low": interval.low, "high": interval.high}


def published_by_selection(scores: pl.DataFrame, similarities: pl.DataFrame, *, alpha: float = 0.05) -> pl.DataFrame:
    """The published tests over all methods, with the maximum over temperatures and at T = 1.

    Returns:
        Columns track, task, test, n, statistic_maximum, p_maximum, statistic_temperature_1,
        p_temperature_1, changes: whether `alpha` lies between the two p-values, or the sign turns while
        both are below it.

    """
    keys = ["track", "task", "test", "n"]
    tables = [
        published_tests(improvements(scores, selection), similarities)
        .filter(method=ALL_METHODS)
        .select(*keys, pl.col("statistic").alias(f"statistic_{name}"), pl.col("p_value").alias(f"p_{name}"))
        for selection, name in zip(SELECTIONS, ("maximum", "temperature_1"), strict=True)
    ]
    below = [pl.col(f"p_{name}") <= alpha for name in ("maximum", "temperature_1")]
    turned = pl.col("statistic_maximum").sign() != pl.col("statistic_temperature_1").sign()
    joined = tables[0].join(tables[1], on=keys, how="inner", maintain_order="left")
    return joined.with_columns(changes=(below[0] != below[1]) | (below[0] & below[1] & turned))


def collapses(scores: pl.DataFrame, *, points: float = 10.0) -> pl.DataFrame:
    """Distilled students of tuned teachers whose average is more than `points` below their own fine-tuning.

    Returns:
        Columns track, teacher, student, method, temperature, score, sft_score, difference, reported: the
        difference that the maximum over temperatures shows instead.

    """
    average = scores.filter(task=AVERAGE)
    fine_tuned = average.filter(method=FINE_TUNED).select("track", "student", sft_score="score")
    runs = average.filter("teacher_tuned").join(fine_tuned, on=["track", "student"])
    runs = runs.with_columns(difference=pl.col("score") - pl.col("sft_score"))
    best = pl.col("difference").max().over("track", "teacher", "student", "method")
    columns = ["track", "teacher", "student", "method", "temperature", "score", "sft_score", "difference", "reported"]
    return runs.with_columns(reported=best).filter(pl.col("difference") < -points).select(columns)


def by_temperature(scores: pl.DataFrame) -> pl.DataFrame:
    """Mean improvement by temperature, over the pairs that were run at every one of them.

    Returns:
        Columns track, method, temperature, pairs, mean, best: in how many pairs it gives the best average.

    """
    average = scores.filter(task=AVERAGE)
    fine_tuned = average.filter(method=FINE_TUNED).select("track", "student", sft_score="score")
    cell = ["track", "teacher", "student", "method"]
    runs = average.filter("teacher_tuned").join(fine_tuned, on=["track", "student"])
    swept = runs.filter(pl.col("temperature").n_unique().over(cell) > 1)
    ranked = swept.with_columns(
        improvement=pl.col("score") - pl.col("sft_score"), best=pl.col("score") == pl.col("score").max().over(cell)
    )
    grouped = ranked.group_by("track", "method", "temperature", maintain_order=True)
    return grouped.agg(pairs=pl.len(), mean=pl.col("improvement").mean(), best=pl.col("best").sum()).sort(
        "track", "method", "temperature", descending=[True, True, False]
    )


def task_unaware(scores: pl.DataFrame) -> pl.DataFrame:
    """Students of a teacher that was not fine-tuned: their average against their own fine-tuning.

    Returns:
        Columns track, teacher, student, score, sft_score, difference.

    """
    average = scores.filter(task=AVERAGE)
    fine_tuned = average.filter(method=FINE_TUNED).select("track", "student", sft_score="score")
    unaware = average.filter(~pl.col("teacher_tuned")).join(fine_tuned, on=["track", "student"], maintain_order="left")
    return unaware.select(
        "track", "teacher", "student", "score", "sft_score", difference=pl.col("score") - pl.col("sft_score")
    )
