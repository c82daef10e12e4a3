"""Audit, part 2: values used several times, measures that are not what they are called, and coupled variables."""

from __future__ import annotations

import numpy as np
import polars as pl
from scipy import stats

from tutelage.evaluator.paper_audit.published_tests import with_measure
from tutelage.evaluator.paper_audit.temperature_selection import SELECTIONS
from tutelage.evaluator.statistics.multiple_testing import holm_within
from tutelage.evaluator.statistics.paired import Floats
from tutelage.evaluator.statistics.rank_correlation import by_pair, spearman_over_pairs
from tutelage.evaluator.statistics.scores import AVERAGE, FINE_TUNED, improvements

_QUANTITIES = ("student_size", "teacher_score", "sft_score", "agreement", "similarity", "bleu")


def correlations(scores: pl.DataFrame, similarities: pl.DataFrame, generator: np.random.Generator) -> pl.DataFrame:
    """Each Spearman family pooled over methods as published, by pair, and by method, under both selections.

    Every quantity has one value a pair, the same for all methods, so the pooled rows are no independent
    observations. By pair, improvement is averaged over methods first: n = 11 instead of 33. Intervals (95 %)
    resample pairs. Holm's families are the single tasks of one track, quantity and selection; the average,
    which the claims are about, stands alone.

    Returns:
        Columns track, task, quantity, selection; rho_pooled, p_pooled, n_pooled; rho_pairs, low_pairs,
        high_pairs, p_value, n_pairs, p_holm; rho_least, rho_most: the extremes of the single methods; low,
        high: of the pooled rho.

    """
    rows = []
    for selection in SELECTIONS:
        rows_of_selection = improvements(scores, selection)
        for quantity in _QUANTITIES:
            known = quantity in rows_of_selection.columns
            table = rows_of_selection if known else with_measure(rows_of_selection, similarities, quantity)
            for (track, task), group in table.group_by("track", "task", maintain_order=True):
                labels = {"track": track, "task": task, "quantity": quantity, "selection": selection}
                rows.append(labels | _three_ways(group, quantity, generator))
    frame = pl.DataFrame(rows).with_columns(is_average=pl.col("task") == AVERAGE)
    return holm_within(frame, ["track", "quantity", "selection", "is_average"]).drop("is_average")


def _three_ways(group: pl.DataFrame, quantity: str, generator: np.random.Generator) -> dict[str, float | int | None]:
    gain_GK, value_GK = by_pair(group, "improvement"), by_pair(group, quantity)
    pooled = spearman_over_pairs(gain_GK, value_GK, generator)
    pairs = spearman_over_pairs(gain_GK.mean(axis=1, keepdims=True), value_GK[:, :1], generator)
    single = [stats.spearmanr(gain_GK[:, m], value_GK[:, m]).statistic for m in range(gain_GK.shape[1])]
    return {
        "rho_pooled": pooled.rho,
        "p_pooled": pooled.p_value,
        "low": pooled.low,
        "high": pooled.high,
        "n_pooled": pooled.n,
        "rho_pairs": pairs.rho,
        "p_value": pairs.p_value,
        "low_pairs": pairs.low,
        "high_pairs": pairs.high,
        "n_pairs": pairs.n,
        "rho_least": float(min(single)),
        "rho_most": float(max(single)),
    }


def which_method(scores: pl.DataFrame, similarities: pl.DataFrame) -> pl.DataFrame:
    """Which distilled students an agreement table can be about.

    If two models' answers agree on a share A of the items, their accuracies differ by no more than 1 - A,
    and A is no less than the sum of the accuracies minus 1. A table that breaks this for a method is about
    another one. The other model is the tuned teacher, or the student's own fine-tuned version.

    Returns:
        Columns track, measure, other (teacher or sft), method, temperature, cells, violations; only methods
        and temperatures that cover every pair of the table.

    """
    fine_tuned = scores.filter(method=FINE_TUNED).select("track", "task", model="student", other_score="score")
    agreement = similarities.filter((pl.col("of") == "kd") & pl.col("measure").str.starts_with("agreement"))
    runs = scores.filter("teacher_tuned").drop("student_size", "teacher_tuned")
    cells = agreement.join(runs, on=["track", "teacher", "student", "task"])
    tables = []
    for other in ("teacher", "student"):
        joined = cells.join(fine_tuned, left_on=["track", "task", other], right_on=["track", "task", "model"])
        # Accuracies are printed with two decimals, so a bound may be missed by a hundredth.
        apart = (pl.col("score") - pl.col("other_score")).abs() > 100 - pl.col("value") + 0.02
        below = pl.col("value") < pl.col("score") + pl.col("other_score") - 100 - 0.02
        grouped = joined.group_by("track", "measure", "method", "temperature").agg(
            cells=pl.len(), violations=(apart | below).sum()
        )
        tables.append(grouped.with_columns(other=pl.lit("teacher" if other == "teacher" else "own fine-tuning")))
    everything = pl.concat(tables).filter(pl.col("cells") == pl.col("cells").max().over("track", "measure"))
    return everything.select("track", "measure", "other", "method", "temperature", "cells", "violations").sort(
        "track", "measure", "violations", "other", "method", descending=[True, False, False, False, False]
    )


def similarity_files(similarities: pl.DataFrame) -> pl.DataFrame:
    """What tells the two files that are called BLEU apart.

    A neural similarity is computed in float32; a BLEU score is a product in float64, and of sentences as
    unlike as these not above 60. `float32` is the share of values that float32 holds exactly.

    Returns:
        Columns measure, cells, float32, least, most, and the Pearson and Spearman correlations of the two.

    """
    two = [
        similarities.filter(measure=measure).sort("teacher", "student", "of", "task")["value"].to_numpy()
        for measure in ("similarity", "bleu")
    ]
    pearson, spearman = float(stats.pearsonr(*two).statistic), float(stats.spearmanr(*two).statistic)
    rows = [
        {
            "measure": measure,
            "cells": len(values),
            "float32": _share_in_float32(values / 100),
            "least": float(values.min()),
            "most": float(values.max()),
            "pearson": pearson,
            "spearman": spearman,
        }
        for measure, values in zip(("similarity", "bleu"), two, strict=True)
    ]
    return pl.DataFrame(rows)


def _share_in_float32(values: Floats) -> float:
    # The tables hold 100 times the value, so the last bit of float64 is not to be relied on.
    return float(np.mean(np.isclose(values, values.astype(np.float32), rtol=1e-15, atol=0)))


def coupling(scores: pl.DataFrame) -> pl.DataFrame:
    """Improvement against what it is computed from, and Oldham's way round it.

    Improvement is score minus fine-tuned score, so it correlates with the fine-tuned score even if nothing
    is there: error in the latter enters both. Against the mean of the two scores that part cancels
    (Oldham 1962, Journal of Chronic Diseases 15).

    Returns:
        Columns track, task, selection, rho_sft, rho_mean, p_mean: Spearman over pairs, improvement averaged
        over methods.

    """
    rows = []
    for selection in SELECTIONS:
        for (track, task), group in improvements(scores, selection).group_by("track", "task", maintain_order=True):
            gain, start = by_pair(group, "improvement").mean(1), by_pair(group, "sft_score").mean(1)
            oldham = stats.spearmanr(gain, start + gain / 2)
            labels = {"track": track, "task": task, "selection": selection}
            rho_sft = float(stats.spearmanr(gain, start).statistic)
            rows.append(
                labels | {"rho_sft": rho_sft, "rho_mean": float(oldham.statistic), "p_mean": float(oldham.pvalue)}
            )
    return pl.DataFrame(rows)
