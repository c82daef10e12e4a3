"""The paper's conclusions one by one: as published, re-examined, and whether they survive.

A verdict follows a rule from the tables, given beside each function; no number is written down here.
"Survives" needs the same answer with the maximum over temperatures and at T = 1, on n = 11 pairs.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
import polars as pl

from tutelage.evaluator.paper_audit.temperature_selection import SELECTIONS
from tutelage.evaluator.statistics.equivalence import equivalence_test
from tutelage.evaluator.statistics.group_tests import friedman
from tutelage.evaluator.statistics.multiple_testing import holm_within
from tutelage.evaluator.statistics.paired import cluster_robust_interval, t_test
from tutelage.evaluator.statistics.rank_correlation import by_pair
from tutelage.evaluator.statistics.scores import AVERAGE, improvements

SURVIVES, FAILS, UNDECIDED = "survives", "does not survive", "undecided"
_, AT_ONE = SELECTIONS
EQUIVALENCE_MARGIN = 2.0  # points of the average that count as no difference between methods

Row = dict[str, str]


def methods_by_pair(scores: pl.DataFrame) -> pl.DataFrame:
    """Differences between the methods' averages on the same pairs.

    The published ANOVA treats 33 rows as unrelated; the methods were run on the same 11 pairs, so what pairs
    share cancels.

    Returns:
        Columns track, selection, p_friedman, first, second, difference (points), low, high, p_value, p_holm
        (over the three differences), p_equivalence (within ±`EQUIVALENCE_MARGIN` points), n.

    """
    rows = []
    for selection in SELECTIONS:
        average = improvements(scores, selection).filter(task=AVERAGE)
        for (track,), group in average.group_by("track", maintain_order=True):
            methods = tuple(sorted(group["method"].unique()))
            gain_GK = by_pair(group, "improvement")
            overall = friedman(gain_GK, methods).p_value
            labels = {"track": track, "selection": selection, "p_friedman": overall, "n": len(gain_GK)}
            for first, second in combinations(range(len(methods)), 2):
                interval = cluster_robust_interval(gain_GK[:, first] - gain_GK[:, second], np.arange(len(gain_GK)))
                rows.append(
                    labels
                    | {"first": methods[first], "second": methods[second], "difference": interval.estimate}
                    | {"low": interval.low, "high": interval.high, "p_value": t_test(interval).p_value}
                    | {"p_equivalence": equivalence_test(interval, margin=EQUIVALENCE_MARGIN).p_value}
                )
    return holm_within(pl.DataFrame(rows), ["track", "selection"])


def claims(tables: dict[str, pl.DataFrame]) -> pl.DataFrame:
    """Every conclusion that the tables speak to.

    Args:
        tables: `published`, `means_by_student`, `correlations`, `methods`, `by_temperature`, `task_unaware`
            and `without_contaminated`, from the functions of the same names (`published`: the paper's tests).

    Returns:
        Columns claim, published, re_examined, verdict.

    """
    rows = []
    for track in ("math", "commonsense"):
        rows += [_gain(tables, track), _size(tables, track), _alike(tables, track), _teacher(tables, track)]
        rows.append(_tasks(tables, track, "agreement", "spearman_agreement"))
    rows += [
        _tasks(tables, "math", "similarity", "spearman_similarity"),
        _tasks(tables, "math", "bleu", "spearman_bleu"),
        _clean(tables),
        _temperature(tables),
        _unaware(tables),
    ]
    return pl.DataFrame(rows)


def _published(tables: dict[str, pl.DataFrame], track: str, test: str) -> str:
    row = tables["published"].filter(track=track, task=AVERAGE, test=test, method="all").row(0, named=True)
    return f"{test}: {row['statistic']:.2f}, p = {row['p_value']:.2g}, n = {row['n']}"


def _by_selection(table: pl.DataFrame, **chosen: str) -> list[dict[str, float]]:
    return [table.filter(selection=selection, **chosen).row(0, named=True) for selection in SELECTIONS]


def _interval(row: dict[str, float], value: str = "mean", low: str = "low", high: str = "high") -> str:
    return f"{row[value]:+.2f} [{row[low]:+.2f}, {row[high]:+.2f}]"


def _gain(tables: dict[str, pl.DataFrame], track: str) -> Row:
    """Survives if both intervals of the mean over pairs lie above zero."""
    found = _by_selection(tables["means_by_student"], track=track, student="all students")
    return {
        "claim": f"Distillation beats fine-tuning ({track} average)",
        "published": _published(tables, track, "t_test"),
        "re_examined": f"mean over 11 pairs: {_interval(found[0])} with the maximum, {_interval(found[1])} at T = 1",
        "verdict": SURVIVES if all(row["low"] > 0 for row in found) else FAILS,
    }


def _size(tables: dict[str, pl.DataFrame], track: str) -> Row:
    """Survives if both correlations by pair have intervals below zero and p ≤ 0.05."""
    found = _by_selection(tables["correlations"], track=track, task=AVERAGE, quantity="student_size")
    texts = [f"{_interval(row, 'rho_pairs', 'low_pairs', 'high_pairs')}, p = {row['p_value']:.2g}" for row in found]
    holds = all(row["high_pairs"] < 0 and row["p_value"] <= 0.05 for row in found)
    return {
        "claim": f"Smaller students gain more ({track} average)",
        "published": _published(tables, track, "spearman_size"),
        "re_examined": f"n = 11: {texts[0]} with the maximum; {texts[1]} at T = 1",
        "verdict": SURVIVES if holds else FAILS,
    }


def _alike(tables: dict[str, pl.DataFrame], track: str) -> Row:
    """Fails if methods differ under either selection; survives only if every pair of them is equivalent."""
    methods = tables["methods"].filter(track=track)
    overall = [methods.filter(selection=selection)["p_friedman"][0] for selection in SELECTIONS]
    differ = min(overall) <= 0.05 or (methods["p_holm"] <= 0.05).any()
    equivalent = (methods["p_equivalence"] < 0.05).all()
    largest = methods.filter(selection=AT_ONE).sort(pl.col("difference").abs()).row(-1, named=True)
    apart = f"{largest['first']} minus {largest['second']} at T = 1: {_interval(largest, 'difference')} points"
    tests = f"p = {overall[0]:.2g} with the maximum, {overall[1]:.2g} at T = 1"
    return {
        "claim": f"The methods do equally well ({track} average)",
        "published": _published(tables, track, "anova"),
        "re_examined": f"Friedman on the same 11 pairs: {tests}; {apart}",
        "verdict": FAILS if differ else SURVIVES if equivalent else UNDECIDED,
    }


def _teacher(tables: dict[str, pl.DataFrame], track: str) -> Row:
    """Survives if the interval by pair stays within ±0.3, fails if it leaves out zero, else undecided."""
    found = _by_selection(tables["correlations"], track=track, task=AVERAGE, quantity="teacher_score")
    texts = [_interval(row, "rho_pairs", "low_pairs", "high_pairs") for row in found]
    apart = any(row["low_pairs"] > 0 or row["high_pairs"] < 0 for row in found)
    small = all(max(-row["low_pairs"], row["high_pairs"]) < 0.3 for row in found)
    return {
        "claim": f"The teacher's own score does not matter ({track} average)",
        "published": _published(tables, track, "spearman_teacher"),
        "re_examined": f"n = 11: {texts[0]} with the maximum; {texts[1]} at T = 1",
        "verdict": FAILS if apart else SURVIVES if small else UNDECIDED,
    }


def _tasks(tables: dict[str, pl.DataFrame], track: str, quantity: str, test: str) -> Row:
    """A correlation on single tasks survives where p_holm ≤ 0.05 by pair under both selections."""
    published = tables["published"].filter(track=track, test=test, method="all")
    significant = published.filter(pl.col("p_value") <= 0.05)["task"].to_list()
    by_pair_tasks = tables["correlations"].filter(track=track, quantity=quantity)
    kept = by_pair_tasks.group_by("task", maintain_order=True).agg((pl.col("p_holm") <= 0.05).all().alias("kept"))
    surviving = [task for task in kept.filter("kept")["task"].to_list() if task in significant]
    least = by_pair_tasks["p_holm"].to_numpy().min()
    count, names = published.height, ", ".join(significant) or "none"
    return {
        "claim": f"Improvement goes with {quantity} ({track}, single tasks)",
        "published": f"{test}: p ≤ 0.05 on {len(significant)} of {count} tasks ({names}), n = 33",
        "re_examined": f"n = 11, Holm over {count} tasks: {len(surviving)} remain; smallest adjusted p = {least:.2g}",
        "verdict": "none published" if not significant else SURVIVES if surviving == significant else FAILS,
    }


def _clean(tables: dict[str, pl.DataFrame]) -> Row:
    """Survives if gain and size correlation keep their sign, with p ≤ 0.05, on the clean tasks alone."""
    rows = [
        row for row in tables["without_contaminated"].iter_rows(named=True) if str(row["tasks"]).startswith("clean")
    ]
    texts = [f"gain {_interval(row)}, size {_interval(row, 'rho_size', 'rho_low', 'rho_high')}" for row in rows]
    holds = all(row["low"] > 0 and row["rho_high"] < 0 and row["p_size"] <= 0.05 for row in rows)
    return {
        "claim": "The math findings do not come from test items in the training data",
        "published": "not examined; three of the six tasks are drawn from a source of the training set",
        "re_examined": f"{rows[0]['tasks']}: {texts[0]} with the maximum; {texts[1]} at T = 1",
        "verdict": SURVIVES if holds else FAILS,
    }


def _temperature(tables: dict[str, pl.DataFrame]) -> Row:
    """Survives if T = 2 is best in most swept pairs for every method and track."""
    table = tables["by_temperature"].filter(temperature=2.0)
    texts = [f"{row['method']} {row['track']} {row['best']} of {row['pairs']}" for row in table.iter_rows(named=True)]
    return {
        "claim": "T = 2 is consistently the best temperature",
        "published": "stated without a test",
        "re_examined": f"best in: {', '.join(texts)} pairs",
        "verdict": SURVIVES if (table["best"] * 2 > table["pairs"]).all() else FAILS,
    }


def _unaware(tables: dict[str, pl.DataFrame]) -> Row:
    """Survives if every student of a task-unaware teacher falls below its own fine-tuning."""
    lost = -tables["task_unaware"]["difference"].to_numpy()
    span = f"{lost.min():.1f} to {lost.max():.1f} points"
    return {
        "claim": "A teacher that was not fine-tuned on the task hurts, by up to 40 %",
        "published": "stated without a test",
        "re_examined": f"{(lost > 0).sum()} of {len(lost)} averages fall, by {span}",
        "verdict": SURVIVES if (lost > 0).all() else FAILS,
    }
