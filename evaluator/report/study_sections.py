"""The sections of a study's report, each from the study's data and its results; None where there is nothing to show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl

from tutelage.evaluator.report import error_kinds, study_controls
from tutelage.evaluator.report import study_figures as figures
from tutelage.evaluator.report import study_tables as tables
from tutelage.evaluator.report.page import Figure, Section
from tutelage.evaluator.report.preflight import of_several
from tutelage.evaluator.report.study_data import StudyData, complete
from tutelage.evaluator.statistics import verdicts
from tutelage.evaluator.statistics.planned_comparisons import COMPARED, cells_of_items, compare
from tutelage.evaluator.statistics.rank_correlation import Correlation
from tutelage.evaluator.statistics.scores import AVERAGE

_SEED = 0  # of the bootstrap, so that the report is the same every time
_RESAMPLES = 2000


@dataclass(frozen=True)
class StudyResults:
    """What is computed once and shown in several sections.

    Attributes:
        compared: of `planned_comparisons.compare`; every task.
        averages: of `verdicts.directions`.
        measures: one row a distilled training: score, improvement, size, agreement, fidelity.
        trends: of `verdicts.trends`.
        controls: of `study_controls.judged`.

    """

    compared: pl.DataFrame
    averages: pl.DataFrame
    measures: pl.DataFrame
    trends: Mapping[str, Correlation]
    controls: pl.DataFrame


def results_of(data: StudyData) -> StudyResults:
    """Compares what is scored on both sides, and correlates the runs that have every method."""
    generator = np.random.default_rng(_SEED)
    ready = complete(data, data.comparisons)
    nothing = COMPARED.to_frame().with_columns(p_holm=pl.lit(None, pl.Float64), conclusion=pl.lit(None, pl.String))
    compared = compare(data.items(), ready, generator, resamples=_RESAMPLES) if ready else nothing
    measures = tables.measures(data, tables.likeness(data))
    whole = tables.whole_runs(measures)
    trends = verdicts.trends(whole, generator) if len(whole) else {}
    controls = study_controls.judged(data, generator, resamples=_RESAMPLES)
    return StudyResults(compared, verdicts.directions(compared), measures, trends, controls)


def claims(data: StudyData, found: StudyResults) -> Section | None:
    """What was declared before the run, and whether it shows."""
    if not data.claims:
        return None
    families = Counter(comparison.family for comparison in data.comparisons)
    frame = verdicts.verdicts(data.claims, found.averages, found.trends, families)
    frame = study_controls.doubted(frame, data, found.controls)
    text = "What was declared before the run, and whether it shows."
    return Section("Claims", text, tables=[tables.claims(data, frame)])


def scores(data: StudyData, found: StudyResults) -> Section:
    """Every model and setting."""
    return Section("Scores", "Every model and setting.", tables=[tables.by_method(data)])


def gain_by_size(data: StudyData, found: StudyResults) -> Section | None:
    """Whether smaller students gain more; of students of one size, what they gain."""
    rows = found.measures
    if rows.is_empty():
        return None
    methods = [method for method in data.methods if method in rows["method"].to_list()]
    listed = [tables.by_size(rows, data.students, methods, data.fine_tuning)]
    if rows["size"].n_unique() == 1:
        return Section("Gain over fine-tuning", f"What each method adds to {data.fine_tuning}.", tables=listed)
    caption = f"Points of {data.measure}, the distilled student's minus the fine-tuned one's of its seed. "
    trend = found.trends.get("size")
    if trend is not None and trend.rho is not None:
        interval = f", 95 % {trend.low:.2f} to {trend.high:.2f} (bootstrap over runs)" if trend.low is not None else ""
        caption += (
            f"Spearman with size, methods averaged: rho = {trend.rho:.2f}{interval}, p = {trend.p_value:.2g}, "
            f"n = {trend.n} runs."
        )
    figure = Figure(
        "improvement_by_size",
        "points gained over fine-tuning against the student's parameters, a line a method",
        figures.improvement_by_size(rows, methods),
        caption,
    )
    return Section("Gain by size", "Whether smaller students gain more.", [figure], listed)


def comparisons(data: StudyData, found: StudyResults) -> Section | None:
    """The comparisons that the study file declared."""
    if found.averages.is_empty():
        return None
    figure = Figure(
        "forest",
        "paired differences of the declared comparisons with two intervals each",
        figures.forest(found.averages),
        "Average of the tasks. Thick: 95 % over items, these trainings fixed. Thin: over items and training runs.",
    )
    listed = [tables.comparisons(found.averages, found.compared)]
    return Section("Primary comparisons", "Declared in the study file before the run.", [figure], listed)


def methods(data: StudyData, found: StudyResults) -> Section | None:
    """Whether the distillation methods differ at all, which of them, and what each adds to fine-tuning."""
    main = data.rows.filter(pl.col("cell").is_in(data.main["cell"].to_list()))
    cells = cells_of_items(
        main.select(
            "student",
            "temperature",
            "noise",
            "task",
            "item_id",
            "score",
            teacher=pl.when(pl.col("teacher") != "").then("teacher"),
            objective="method",
            seed=pl.col("training_seed").cast(pl.Int64),
            cluster="item_hash",
        )
    )
    distilled = cells.filter(pl.col("teacher").is_not_null())
    if distilled["objective"].n_unique() < 2:
        return None
    listed = [tables.methods_alike(distilled), tables.methods_apart(distilled)]
    listed += [tables.added_by_methods(cells, data.fine_tuning)] if data.fine_tuning else []
    return Section("Methods alike?", "All trainings at T = 1 without noise.", tables=listed)


def temperature_and_noise(data: StudyData, found: StudyResults) -> Section | None:
    """What smoothing and noise do, where a study sweeps them."""
    default = next(iter(data.teachers), "")
    scores = data.scores().filter(task=AVERAGE, role="student", teacher=default)
    scores = scores.with_columns(series=pl.format("{}, {}", "method", "student"))
    shown = []
    for column, other, title in (("temperature", "noise", "temperature T"), ("noise", "temperature", "noise σ")):
        plain = scores.filter(pl.col(other) == (0.0 if other == "noise" else 1.0))
        swept = plain.filter(pl.col(column).n_unique().over("series") > 1)
        if len(swept):
            series = swept["series"].unique().sort().to_list()
            shown.append(
                Figure(
                    f"by_{column}",
                    f"{data.measure} over {title}, a line a method and student",
                    figures.response(swept, column, title, series, data.measure),
                    f"Average {data.measure} by {title}: lines are means over "
                    f"{swept['training_seed'].n_unique()} seeds, dots single trainings.",
                )
            )
    return Section("Temperature and noise", "What temperature and noise do.", shown) if shown else None


def likeness(data: StudyData, found: StudyResults) -> Section | None:
    """Whether likeness to the teacher explains the gain."""
    rows = found.measures
    if rows.is_empty():
        return None
    methods = [method for method in data.methods if method in rows["method"].to_list()]
    keys = ["student", "method"]
    means = rows.group_by(keys).agg(pl.col("agreement", "fidelity", "score").mean()).sort(keys)
    shown = []
    if len(means.drop_nulls("agreement")):
        shown.append(
            Figure(
                "agreement",
                "mean agreement with the teacher by method and student",
                figures.heat_map(means.drop_nulls("agreement"), methods, data.students),
                "Items with the teacher's answer, percent, mean of tasks and seeds; no answer agrees with nothing.",
            )
        )
    if len(means.drop_nulls("fidelity")):
        shown.append(
            Figure(
                "accuracy_fidelity",
                "score against BLEU, a dot a training",
                figures.score_against_fidelity(rows.drop_nulls("fidelity"), methods, data.students, data.measure),
                "Being right against sounding like the teacher: sacreBLEU of the student's text with the teacher's.",
            )
        )
    text = "Whether likeness explains the gain."
    return Section("Agreement and fidelity", text, shown, [tables.trends(found.trends, rows)])


def learning(data: StudyData, found: StudyResults) -> Section | None:
    """How near the smallest and the largest student come to their teacher while they train."""
    column = "heldout/forward_kl"
    if data.metrics.is_empty() or column not in data.metrics.columns:
        return None
    known = data.metrics.join(data.main.select("cell"), on="cell").filter(pl.col(column).is_not_null())
    keys = ["method", "step"]
    shown = []
    for student in dict.fromkeys((data.students[0], data.students[-1])):
        own = known.filter(model=student).group_by(keys).agg(value=pl.col(column).mean()).sort(keys)
        methods = [method for method in data.methods if method in own["method"].to_list()]
        if methods:
            shown.append(
                Figure(
                    f"learning_{student}",
                    f"held-out KL of student {student} over optimizer steps",
                    figures.learning(own, methods),
                    f"Student {student}: exact KL(teacher ‖ student) at T = 1 on sequences that are never trained on, "
                    "mean of the seeds.",
                )
            )
    return Section("Learning", "How near students come to their teacher.", shown) if shown else None


def errors(data: StudyData, found: StudyResults) -> Section | None:
    """Why answers to word problems of one operation are wrong, by model and method."""
    named = data.cells.filter("scored").sort("parameters", descending=True, maintain_order=True)
    label = pl.format("{}, {}", "model", tables.setting(data)).alias("label")
    return error_kinds.errors(data.rows, named.select("evaluation_id", label))


def cost(data: StudyData, found: StudyResults) -> Section | None:
    """Throughput, and what the teachers did."""
    speeds = tables.speeds(data)
    if speeds.is_empty():
        return None
    figure = Figure(
        "throughput",
        "trained tokens a second by method, a dot a student",
        figures.rates(speeds, data.methods, data.students),
        "Tokens that enter the loss, by second of sampling, scoring and stepping together.",
    )
    listed = [tables.cost(speeds), *([tables.usage(data)] if data.usage else [])]
    return Section("Cost", "Throughput, and what the teachers did.", [figure], listed)


def controls(data: StudyData, found: StudyResults) -> Section | None:
    """Whether what a method gains is its own."""
    return study_controls.controls(found.controls)


def spending(data: StudyData, found: StudyResults) -> Section | None:
    """Score against what it cost."""
    return study_controls.spending(data)


def preflight(data: StudyData, found: StudyResults) -> Section | None:
    """What could make the numbers mean something else."""
    return of_several(data.preflight)


SECTIONS = (
    claims,
    scores,
    gain_by_size,
    comparisons,
    controls,
    methods,
    temperature_and_noise,
    likeness,
    errors,
    learning,
    spending,
    cost,
    preflight,
)
