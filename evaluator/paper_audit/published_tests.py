"""The paper's own tests, on its own unit of analysis: one row a teacher, student and method.

Ramesh, Sengupta & Chakraborty, "On the Generalization vs Fidelity Paradox in Knowledge Distillation",
Findings of ACL 2025: one-sided t-test of improvement, one-way ANOVA over methods, Spearman correlations of
improvement with five quantities; Kruskal-Wallis beside the ANOVA. Everything per task and for the average,
over all methods together and for each. Whether these tests suit the data, the other modules ask.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import polars as pl
from scipy import stats

TESTS = pl.Schema(
    {
        "track": pl.String,
        "task": pl.String,
        "method": pl.String,  # `all`, or one method alone
        "test": pl.String,
        "n": pl.Int64,  # rows that entered
        "statistic": pl.Float64,
        "p_value": pl.Float64,
    }
)
ALL_METHODS = "all"

# Spearman families: name of the test, column that improvement is correlated with.
_COLUMNS = {"spearman_size": "student_size", "spearman_teacher": "teacher_score", "spearman_sft": "sft_score"}
_MEASURES = {"spearman_agreement": "agreement", "spearman_similarity": "similarity", "spearman_bleu": "bleu"}

Result = tuple[str, int, float, float]


def with_measure(improvements: pl.DataFrame, similarities: pl.DataFrame, measure: str) -> pl.DataFrame:
    """Improvements joined to a similarity of a distilled student on track, teacher, student and task.

    The tables hold one value a pair, whatever the method, so with three methods each value appears three
    times: the paper's join, kept here as it was.

    Returns:
        The rows of `improvements` that have a value, with the column `measure`.

    """
    values = similarities.filter((pl.col("measure") == measure) & (pl.col("of") == "kd"))
    keys = ["track", "teacher", "student", "task"]
    return improvements.join(values.select(*keys, pl.col("value").alias(measure)), on=keys, how="inner")


def published_tests(improvements: pl.DataFrame, similarities: pl.DataFrame) -> pl.DataFrame:
    """Every test of the paper's section on statistics.

    Args:
        improvements: from `scores.improvements`; the paper's choice is `maximum_over_temperatures`.
        similarities: rows of `SIMILARITIES`, none of them if there are none.

    Returns:
        Rows of `TESTS`. A correlation with a constant has a null statistic and p-value.

    """
    rows = []
    for track, task, method, group in _groups(improvements):
        results = [_t_test(group), *_correlations(group, _COLUMNS)]
        if method == ALL_METHODS:
            results += _across_methods(group)
        rows += [(track, task, method, *result) for result in results]
    for test, measure in _MEASURES.items():
        for track, task, method, group in _groups(with_measure(improvements, similarities, measure)):
            rows += [(track, task, method, *result) for result in _correlations(group, {test: measure})]
    return pl.DataFrame(rows, schema=TESTS, orient="row").with_columns(pl.col("statistic", "p_value").fill_nan(None))


def _groups(frame: pl.DataFrame) -> Iterator[tuple[str, str, str, pl.DataFrame]]:
    for (track, task), rows in frame.group_by("track", "task", maintain_order=True):
        yield str(track), str(task), ALL_METHODS, rows
        for (method,), part in rows.group_by("method", maintain_order=True):
            yield str(track), str(task), str(method), part


def _t_test(group: pl.DataFrame) -> Result:
    result = stats.ttest_1samp(group["improvement"].to_numpy(), 0.0, alternative="greater")
    return "t_test", group.height, float(result.statistic), float(result.pvalue)


def _correlations(group: pl.DataFrame, columns: dict[str, str]) -> list[Result]:
    improvement = group["improvement"].to_numpy()
    results = []
    for test, column in columns.items():
        values = group[column].to_numpy()
        defined = np.ptp(values) > 0 and np.ptp(improvement) > 0
        rho, p_value = stats.spearmanr(improvement, values) if defined else (np.nan, np.nan)
        results.append((test, group.height, float(rho), float(p_value)))
    return results


def _across_methods(group: pl.DataFrame) -> list[Result]:
    samples = [part["improvement"].to_numpy() for _, part in group.group_by("method", maintain_order=True)]
    if len(samples) < 2:
        return []
    anova, kruskal = stats.f_oneway(*samples), stats.kruskal(*samples)
    return [
        ("anova", group.height, float(anova.statistic), float(anova.pvalue)),
        ("kruskal", group.height, float(kruskal.statistic), float(kruskal.pvalue)),
    ]
