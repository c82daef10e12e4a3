"""The paper's statistics from its authors' released tables, and an audit of what they carry.

    tutelage report --from-paper FOLDER [--out FOLDER]

reads the ten CSV files (`math_results_main.csv`, …, `BLEU2.csv`). Where the task files lie beside that folder
(`../tasks/<task>/test.json`), what needs them is computed too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from tutelage.evaluator.paper_audit import correlations, single_scores, temperature_selection
from tutelage.evaluator.paper_audit.conclusions import claims, methods_by_pair
from tutelage.evaluator.paper_audit.published_tests import ALL_METHODS, published_tests
from tutelage.evaluator.paper_audit.released_tables import read_scores, read_similarities
from tutelage.evaluator.report.formats import NONE
from tutelage.evaluator.report.page import Column, Page, Section, Table, column
from tutelage.evaluator.statistics.scores import improvements

TITLE = "The generalization-fidelity study: its statistics again, and what they carry"
_SEED = 0  # of the bootstrap, so that the report is the same every time


@dataclass(frozen=True)
class PaperReport:
    """Every table by name, as long frames, and the page that shows them."""

    tables: dict[str, pl.DataFrame]
    page: Page


def from_paper(folder: Path, out: Path | None = None) -> PaperReport:
    """Reproduces the published statistics and audits them.

    Args:
        folder: the authors' released result tables.
        out: where to write `report.md`, `report.html` and `tables/<name>.csv`; nothing is written if None.

    Raises:
        DataError: a table is missing or unreadable.

    """
    scores, similarities = read_scores(folder), read_similarities(folder)
    tables = audit_tables(scores, similarities, np.random.default_rng(_SEED))
    tasks = folder.resolve().parent / "tasks"
    if tasks.is_dir():
        tables["boolq_majority"] = single_scores.boolq_majority(scores, tasks)
        tables["shared_questions"] = single_scores.shared_questions(tasks)
    origin = "Every number is derived from the authors' released tables."
    report = PaperReport(tables, Page("Audit", TITLE, sections(tables), origin=origin, contents=True))
    if out is not None:
        report.page.write(out / "report.html")
        for name, table in report.tables.items():
            table.write_csv(out / "tables" / f"{name}.csv")
    return report


def audit_tables(
    scores: pl.DataFrame, similarities: pl.DataFrame, generator: np.random.Generator
) -> dict[str, pl.DataFrame]:
    """Everything that the released tables alone give, by name; the claims are read from the others."""
    tables = {
        "published": published_tests(improvements(scores, "maximum_over_temperatures"), similarities),
        "means_by_student": temperature_selection.means_by_student(scores, generator),
        "published_by_selection": temperature_selection.published_by_selection(scores, similarities),
        "collapses": temperature_selection.collapses(scores),
        "by_temperature": temperature_selection.by_temperature(scores),
        "task_unaware": temperature_selection.task_unaware(scores),
        "correlations": correlations.correlations(scores, similarities, generator),
        "coupling": correlations.coupling(scores),
        "methods": methods_by_pair(scores),
        "which_method": correlations.which_method(scores, similarities),
        "similarity_files": correlations.similarity_files(similarities),
        "without_contaminated": single_scores.without_contaminated(scores, generator),
        "repeated_cells": single_scores.repeated_cells(scores),
        "impossible_cells": single_scores.impossible_cells(scores),
        "averages": single_scores.averages(scores),
    }
    return tables | {"claims": claims(tables)}


def shown_as(name: str, frame: pl.DataFrame) -> Table:
    """A frame as it is, a column a column; its CSV file holds the long form, which the audit writes itself."""

    def form(name: str) -> Callable[[Any], str]:
        places = "{:.3g}" if name.startswith("p_") else "{:g}" if name == "temperature" else "{:.2f}"
        written = "{:.4f}" if "rho" in name and not name.startswith("p_") else places
        return lambda value: written.format(value) if isinstance(value, float) else str(value)

    columns = [column(name, name, form(name), numeric=kind.is_numeric()) for name, kind in frame.schema.items()]
    return Table(name, columns, frame.to_dicts(), None)


def published_table(published: pl.DataFrame, track: str, method: str) -> Table:
    """The published tests of one track: a row a task, a column a test, "statistic (p)" in each."""
    rows: dict[str, dict[str, Any]] = {}
    own = published.filter(track=track, method=method)
    for row in own.to_dicts():
        rows.setdefault(row["task"], {"task": row["task"]})[row["test"]] = row

    def result(test: str) -> Column:
        def text(row: Mapping[str, Any]) -> str:
            found = row.get(test)
            if found is None or found["statistic"] is None:
                return NONE
            return f"{found['statistic']:.4f} ({found['p_value']:.3g})"

        return Column(test, text)

    tests = own["test"].unique(maintain_order=True).to_list()
    columns = [column("task", "task"), *(result(test) for test in tests)]
    return Table(f"published_{track}_{method.lower()}", columns, list(rows.values()), None)


# Name of the table, heading, caption. The tests as published come before these, method by method.
_AUDIT = (
    (
        "means_by_student",
        "Gain by student, with and without the maximum over temperatures",
        "Mean improvement of the average over fine-tuning, points. The paper keeps each task's best of T = 1, 2, 5, "
        "chosen on the test set, for the five pairs with 3B and 7B teachers and two of three methods. At T = 1 nothing "
        "is chosen. Intervals: 95 %, percentile bootstrap over pairs; none for a student with one pair.",
    ),
    (
        "published_by_selection",
        "Published tests whose answer depends on that maximum",
        "All methods, n = 33 rows. Shown: p crosses 0.05 between the two selections, or the sign turns.",
    ),
    (
        "collapses",
        "Collapsed runs, and what the maximum shows instead",
        "Distilled averages more than 10 points below the same student's fine-tuning. `reported` is the improvement "
        "that the maximum over temperatures keeps for that pair and method.",
    ),
    (
        "by_temperature",
        "Temperatures",
        "Mean improvement of the average over the five pairs that were run at every T; `best`: pairs won.",
    ),
    (
        "methods",
        "Methods on the same pairs",
        "Differences of the averages, points, n = 11 pairs: paired t intervals (95 %), Holm over three, two one-sided "
        "tests within ±2 points, Friedman over the three.",
    ),
    (
        "correlations",
        "Correlations with improvement: pooled, by pair, by method",
        "Spearman. Pooled as published (n = 33, each value three times), by pair (n = 11, methods averaged), extremes "
        "of the single methods. Intervals: 95 %, bootstrap over pairs (`low`, `high`: of the pooled rho; `low_pairs`, "
        "`high_pairs`: by pair). p_value and p_holm (over the track's tasks; the average alone) are by pair.",
    ),
    (
        "coupling",
        "Improvement against the score it is computed from",
        "rho_sft correlates score - sft with sft, which is negative without any effect; rho_mean is against the mean "
        "of both (Oldham). By pair, n = 11.",
    ),
    (
        "which_method",
        "Which method the agreement tables are about",
        "Cells that break |acc_S - acc_T| ≤ 1 - A or A ≥ acc_S + acc_T - 1. None: possible, not proven.",
    ),
    (
        "similarity_files",
        "BLEU.csv is not BLEU",
        "`similarity` is BLEU.csv, on which the published fidelity tests ran; `bleu` is BLEU2.csv. `float32`: share of "
        "cells that are exact float32 numbers, as a neural similarity is.",
    ),
    (
        "without_contaminated",
        "Without the tasks that the training data contains",
        "Math10K contains MAWPS, from which AddSub, MultiArith and SingleEq are drawn. By pair, n = 11. How many test "
        "items are in the training set needs that set, which is not among the released tables.",
    ),
    (
        "shared_questions",
        "Test sets that share questions",
        "Tasks that share items are not independent replications.",
    ),
    (
        "boolq_majority",
        "BoolQ without its passages",
        "Share of the commoner label, and the fine-tuned and distilled scores at or below it.",
    ),
    (
        "repeated_cells",
        "Equal scores of different runs",
        "Same teacher, student and task; `expected` by chance from N and accuracy; p from a Poisson distribution.",
    ),
    (
        "impossible_cells",
        "Scores that the full test set cannot give",
        "Runs with cells that are no k/N.",
    ),
    ("averages", "Averages that are not the mean of their tasks", "Off by more than 0.02 points."),
    (
        "task_unaware",
        "Students of a teacher that was not fine-tuned",
        "Seq-KD at T = 1; average, points below the student's own fine-tuning.",
    ),
)


def sections(tables: dict[str, pl.DataFrame]) -> list[Section]:
    """The conclusions first, then the tests as published, then what the audit found."""
    first = Section(
        "Conclusions, and whether they survive",
        "Verdicts follow fixed rules from the tables below: the same answer with the maximum over temperatures and "
        "at T = 1, on n = 11 pairs. Even that is generous: the pairs share six students and their fine-tuned "
        "scores. Brackets are 95 % intervals.",
        tables=[shown_as("claims", tables["claims"])],
    )
    published = [
        Section(
            f"As published: {track}, {'all methods' if method == ALL_METHODS else method}",
            f"statistic (p), n = {33 if method == ALL_METHODS else 11}, maximum over temperatures. t: one-sided; ANOVA "
            "and Kruskal-Wallis over methods; Spearman of improvement with size, teacher's score, own fine-tuned "
            "score, agreement, BLEU.csv (similarity) and BLEU2.csv (bleu). No correction for multiple tests.",
            tables=[published_table(tables["published"], track, method)],
        )
        for track in ("math", "commonsense")
        for method in (ALL_METHODS, "Seq-KD", "Rev-KD", "GKD")
    ]
    shown = tables | {"published_by_selection": tables["published_by_selection"].filter("changes").drop("changes")}
    found = [
        Section(title, caption, tables=[shown_as(name, shown[name])])
        for name, title, caption in _AUDIT
        if name in shown
    ]
    return [first, *published, *found]
