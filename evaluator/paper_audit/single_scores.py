"""Audit, part 3: the single cells: what cannot be, what repeats, and tasks that measure something else."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import permutations
from pathlib import Path

import numpy as np
import polars as pl
from scipy import stats

from tutelage.errors import DataError
from tutelage.evaluator.paper_audit.released_tables import MATH, TEST_ITEMS
from tutelage.evaluator.paper_audit.temperature_selection import SELECTIONS
from tutelage.evaluator.statistics.paired import cluster_bootstrap_interval
from tutelage.evaluator.statistics.rank_correlation import by_pair, spearman_over_pairs
from tutelage.evaluator.statistics.scores import AVERAGE, BASE, improvements

# Math10K, the training set of the math track, contains MAWPS, from which these three test sets are drawn.
CONTAMINATED = ("AddSub", "MultiArith", "SingleEq")
MATH_TASKS = (*CONTAMINATED, "SVAMP", "gsm8k", "AQuA")


def impossible_cells(scores: pl.DataFrame) -> pl.DataFrame:
    """Scores that no whole number of right answers gives on the full test set.

    Returns:
        Columns track, teacher, student, method, temperature, cells, impossible (how many), examples; one
        row a run that has any. Such a run was scored on another number of items, or is a mean of runs.

    """
    sized = scores.filter(pl.col("task") != AVERAGE).with_columns(
        items=pl.col("task").replace_strict(TEST_ITEMS, return_dtype=pl.Int64)
    )
    nearest = (pl.col("score") * pl.col("items") / 100).round()
    off = (100 * nearest / pl.col("items") - pl.col("score")).abs() > 0.0051  # printed with two decimals
    labelled = sized.with_columns(
        off=off, label=pl.format("{} {} of {}", "task", pl.col("score").round(2), pl.col("items"))
    )
    run = ["track", "teacher", "student", "method", "temperature", "teacher_tuned"]
    grouped = labelled.group_by(run, maintain_order=True).agg(
        cells=pl.len(), impossible=pl.col("off").sum(), examples=pl.col("label").filter(pl.col("off")).str.join("; ")
    )
    return grouped.filter(pl.col("impossible") > 0).drop("teacher_tuned")


def repeated_cells(scores: pl.DataFrame) -> pl.DataFrame:
    """Equal scores of one teacher, student and task under different methods or temperatures.

    Two runs of accuracy p on N items are equal by chance about 1 / (2 √(π N p (1 - p))) of the time, more
    on small test sets; the sum over all compared pairs of runs says how many repeats to expect.

    Returns:
        Columns track, task, compared (pairs of runs), repeats, expected, p_value: of as many repeats or
        more, by a Poisson distribution. Runs of task-unaware teachers are left out.

    """
    runs = scores.filter((pl.col("task") != AVERAGE) & pl.col("teacher_tuned")).with_row_index("run")
    keys = ["track", "teacher", "student", "task"]
    both = runs.join(runs, on=keys, suffix="_other").filter(pl.col("run") < pl.col("run_other"))
    share = (pl.col("score") + pl.col("score_other")) / 200
    items = pl.col("task").replace_strict(TEST_ITEMS, return_dtype=pl.Float64)
    variance = items * (share * (1 - share)).clip(lower_bound=1e-3)
    # The normal approximation of two binomials meeting: only for pairs whose scores could meet at all.
    apart = items * (pl.col("score") - pl.col("score_other")).abs() / 100
    chance = pl.when(apart <= 3 * (2 * variance).sqrt()).then(1 / (2 * (np.pi * variance).sqrt())).otherwise(0.0)
    counted = both.with_columns(repeat=pl.col("score") == pl.col("score_other"), chance=chance)
    grouped = counted.group_by("track", "task", maintain_order=True).agg(
        compared=pl.len(), repeats=pl.col("repeat").sum(), expected=pl.col("chance").sum()
    )
    total = grouped.group_by("track", maintain_order=True).agg(
        task=pl.lit("all tasks"),
        compared=pl.col("compared").sum(),
        repeats=pl.col("repeats").sum(),
        expected=pl.col("expected").sum(),
    )
    table = pl.concat([grouped, total.select(grouped.columns)])
    p_value = stats.poisson.sf(table["repeats"].cast(pl.Int64).to_numpy() - 1, table["expected"].to_numpy())
    return table.with_columns(p_value=pl.Series(p_value))


def averages(scores: pl.DataFrame, *, tolerance: float = 0.02) -> pl.DataFrame:
    """Printed averages that differ from the mean of their row's tasks by more than `tolerance` points.

    Returns:
        Columns track, teacher, student, method, temperature, printed, mean; no rows if all agree.

    """
    run = ["track", "teacher", "student", "method", "temperature", "teacher_tuned"]
    grouped = scores.group_by(run, maintain_order=True).agg(
        printed=pl.col("score").filter(pl.col("task") == AVERAGE).first(),
        mean=pl.col("score").filter(pl.col("task") != AVERAGE).mean(),
    )
    return grouped.filter((pl.col("printed") - pl.col("mean")).abs() > tolerance).drop("teacher_tuned")


def without_contaminated(scores: pl.DataFrame, generator: np.random.Generator) -> pl.DataFrame:
    """The math track on the tasks that its training data contains, and on the others.

    Returns:
        Columns selection, tasks, mean, low, high (mean improvement over rows; interval over pairs), n,
        p_t_test (one-sided, by pair: n = 11), rho_size, rho_low, rho_high, p_size (by pair).

    """
    rows = []
    for selection in SELECTIONS:
        math = improvements(scores, selection).filter((pl.col("track") == MATH) & (pl.col("task") != AVERAGE))
        contaminated = pl.col("task").is_in(CONTAMINATED)
        for name, part in (("contaminated", math.filter(contaminated)), ("clean", math.filter(~contaminated))):
            keys = ["teacher", "student", "student_size", "method"]
            cells = part.group_by(keys, maintain_order=True).agg(pl.col("improvement").mean())
            label = f"{name}: {', '.join(part['task'].unique(maintain_order=True))}"
            rows.append({"selection": selection, "tasks": label} | _over_pairs(cells, generator))
    return pl.DataFrame(rows)


def _over_pairs(cells: pl.DataFrame, generator: np.random.Generator) -> dict[str, float | int | None]:
    gain = by_pair(cells, "improvement").mean(axis=1, keepdims=True)
    size = by_pair(cells, "student_size")[:, :1]
    interval = cluster_bootstrap_interval(
        gain.ravel(), np.arange(len(gain)), generator, method="percentile", resamples=4000
    )
    rho = spearman_over_pairs(gain, size, generator)
    return {
        "mean": interval.estimate,
        "low": interval.low,
        "high": interval.high,
        "n": len(gain),
        "p_t_test": float(stats.ttest_1samp(gain.ravel(), 0.0, alternative="greater").pvalue),
        "rho_size": rho.rho,
        "rho_low": rho.low,
        "rho_high": rho.high,
        "p_size": rho.p_value,
    }


def boolq_majority(scores: pl.DataFrame, tasks: Path) -> pl.DataFrame:
    """BoolQ scores against always answering with the commoner label.

    Args:
        scores: rows of `SCORES`.
        tasks: folder with `boolq/test.json`, whose records have an `answer`.

    Returns:
        One row: majority (percent), cells (fine-tuned and distilled), at_or_below, best.

    Raises:
        DataError: the file is missing or unreadable.

    """
    answers = Counter(record["answer"] for record in _records(tasks / "boolq" / "test.json"))
    majority = 100 * max(answers.values()) / answers.total()
    unaware = pl.col("teacher_tuned").eq_missing(False)
    cells = scores.filter((pl.col("task") == "boolq") & (pl.col("method") != BASE) & ~unaware)
    at_or_below = int((cells["score"] <= round(majority, 2)).sum())
    best = cells["score"].max()
    return pl.DataFrame({"majority": [majority], "cells": [cells.height], "at_or_below": [at_or_below], "best": [best]})


def shared_questions(tasks: Path) -> pl.DataFrame:
    """Test items of the math tasks whose question is also in another task's test set.

    Questions are compared by their letters and digits alone, lower-cased.

    Returns:
        Columns task, items, also_in, shared; pairs of tasks that share none are left out.

    Raises:
        DataError: a task file is missing or unreadable.

    """
    questions = {
        task: [_letters_and_digits(record["instruction"]) for record in _records(tasks / task / "test.json")]
        for task in MATH_TASKS
    }
    rows = []
    for task, other in permutations(MATH_TASKS, 2):
        theirs = set(questions[other])
        shared = sum(question in theirs for question in questions[task])
        if shared:
            rows.append({"task": task, "items": len(questions[task]), "also_in": other, "shared": shared})
    schema = {"task": pl.String, "items": pl.Int64, "also_in": pl.String, "shared": pl.Int64}
    return pl.DataFrame(rows, schema=schema)


def _letters_and_digits(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def _records(path: Path) -> list[dict[str, str]]:
    try:
        records: list[dict[str, str]] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}", "from_paper") from error
    return records
