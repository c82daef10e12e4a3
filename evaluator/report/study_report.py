"""The report of a study: what each claim looks like at this size, and everything that the verdicts are read from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl

from tutelage import __version__
from tutelage.evaluator.report import study_figures as figures
from tutelage.evaluator.report import study_tables as results
from tutelage.evaluator.report.page import Figure, Section, html_page, markdown_page, write_besides
from tutelage.evaluator.report.run_tables import Table, p_value
from tutelage.evaluator.report.study_data import StudyData, complete, read_study
from tutelage.evaluator.statistics import verdicts
from tutelage.evaluator.statistics.planned_comparisons import COMPARED, cells_of_items, compare
from tutelage.evaluator.statistics.rank_correlation import Correlation
from tutelage.evaluator.statistics.scores import AVERAGE

_SEED = 0  # of the bootstrap, so that the report is the same every time
_RESAMPLES = 2000


@dataclass(frozen=True)
class _Results:
    """What is computed once and shown in several sections."""

    compared: pl.DataFrame
    """Of `planned_comparisons.compare`; every task."""
    averages: pl.DataFrame
    """Of `verdicts.directions`."""
    measures: pl.DataFrame
    trends: Mapping[str, Correlation]


def write_study_report(*, frames: Path, study: Path, out: Path) -> Path:
    """Writes `out`, the same as `report.md` beside it, and `figures/` and `tables/`.

    Args:
        frames: folder of the frames.
        study: folder of the study.
        out: the HTML file.

    Raises:
        DataError: as `read_study`.

    """
    data = read_study(study, frames)
    found = _results(data)
    sections = [section for section in _sections(data, found) if section is not None]
    facts = _facts(data)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_besides(sections, out.parent)
    out.write_text(html_page(data.name, facts, [], sections), encoding="utf-8")
    out.with_name("report.md").write_text(markdown_page(f"Study {data.name}", facts, sections), encoding="utf-8")
    return out


def _results(data: StudyData) -> _Results:
    generator = np.random.default_rng(_SEED)
    ready = complete(data, data.comparisons)
    compared = compare(data.items(), ready, generator, resamples=_RESAMPLES) if ready else _nothing_compared()
    measures = results.measures(data, results.likeness(data))
    whole = results.whole_runs(measures)
    trends = verdicts.trends(whole, generator) if len(whole) else {}
    return _Results(compared, verdicts.directions(compared), measures, trends)


def _nothing_compared() -> pl.DataFrame:
    return COMPARED.to_frame().with_columns(p_holm=pl.lit(None, pl.Float64), conclusion=pl.lit(None, pl.String))


def _facts(data: StudyData) -> list[tuple[str, str]]:
    rows, cells = data.rows, data.cells
    seeds = sorted(cells.filter(role="student")["seed"].unique().to_list())
    decoding = rows["sampling_temperature"].drop_nulls().unique().to_list()
    items = rows.group_by("task").agg(pl.col("item_id").n_unique()).sort("task")
    sizes = {row["model"]: row["parameters"] for row in cells.to_dicts()}
    return [
        ("models", ", ".join(f"{name} ({size:,} parameters)" for name, size in sizes.items())),
        ("cells", f"{int(cells['scored'].sum())} of {len(cells)} scored"),
        ("seeds", ", ".join(map(str, seeds))),
        ("tasks", ", ".join(f"{task} ({count} items)" for task, count in items.rows())),
        ("protocol", ", ".join(rows["protocol"].unique().sort()) + ", prompt " + ", ".join(rows["template"].unique())),
        ("decoding", ", ".join("greedy" if one == 0 else f"sampled at T = {one:g}" for one in decoding)),
        ("rows", f"{len(rows):,}, one an item and evaluation"),
        ("written", f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC by tutelage {__version__}"),
    ]


def _sections(data: StudyData, found: _Results) -> list[Section | None]:
    return [
        _claims(data, found),
        _scores(data),
        _size(data, found),
        _comparisons(found),
        _methods(data),
        _responses(data),
        _likeness(data, found),
        _learning(data),
        _cost(data),
    ]


def _claims(data: StudyData, found: _Results) -> Section | None:
    if not data.claims:
        return None
    families = Counter(comparison.family for comparison in data.comparisons)
    frame = verdicts.verdicts(data.claims, found.averages, found.trends, families)
    rows = [[row["claim"], row["verdict"], row["found"], row["test"]] for row in frame.to_dicts()]
    caption = (
        "Rules fixed before the run. A family shows if every member, on the average of the tasks, falls on the "
        "expected side with p ≤ 0.05 after Holm (items clustered over students and seeds) and an interval over items "
        "and training runs without zero; “these runs only” passes the first test and not the second. A trend shows if "
        f"the 95 % interval of rho, bootstrapped over runs, lies on the expected side. n: {_counts(data)}."
    )
    table = Table("claims", ["claim", "at this size", "what was found", "test"], rows, frame)
    return Section("Claims", "What was declared before the run, and whether it shows.", tables=[(table, caption)])


def _counts(data: StudyData) -> str:
    students = data.rows.filter(role="student")
    items, runs = students.select("task", "item_id").n_unique(), students.select("student", "training_seed").n_unique()
    return f"{items} items, {runs} runs (student and seed)"


def _scores(data: StudyData) -> Section:
    caption = (
        "Accuracy in percent, mean ± standard deviation over training seeds (none for one seed). Average: unweighted "
        "mean of the tasks. Items answered without a number count as wrong."
    )
    return Section("Scores", "Every model and setting.", tables=[(results.by_method(data), caption)])


def _size(data: StudyData, found: _Results) -> Section | None:
    rows = found.measures
    if rows.is_empty():
        return None
    methods = [method for method in data.methods if method in rows["method"].to_list()]
    trend = found.trends.get("size")
    test = "" if trend is None or trend.rho is None else _spoken(trend)
    figure = Figure(
        "improvement_by_size",
        "points gained over fine-tuning against the student's parameters, a line a method",
        figures.improvement_by_size(rows, methods),
        f"Accuracy of the distilled student minus that of the fine-tuned one of its seed. {test}",
    )
    caption = "Points over fine-tuning at T = 1 without noise, mean ± standard deviation over seeds."
    text = "Whether smaller students gain more."
    return Section("Gain by size", text, [figure], [(results.by_size(rows, data.students, methods), caption)])


def _spoken(trend: Correlation) -> str:
    return (
        f"Spearman with size, methods averaged: rho = {trend.rho:.2f}, 95 % {trend.low:.2f} to {trend.high:.2f} "
        f"(bootstrap over runs), p = {trend.p_value:.2g}, n = {trend.n} runs."
    )


def _comparisons(found: _Results) -> Section | None:
    if found.averages.is_empty():
        return None
    figure = Figure(
        "forest",
        "paired differences of the declared comparisons with two intervals each",
        figures.forest(found.averages),
        "Average of the tasks. Thick: 95 % over items, these trainings fixed. Thin: over items and training runs.",
    )
    caption = (
        "Points. Paired on the same items, seeds and students; items are clustered over runs. p: cluster-robust t, "
        "Holm within the family. Detectable: smallest true difference found with 80 % power. The single tasks, with "
        "bootstrap and permutation tests, are in the CSV."
    )
    table = results.comparisons(found.averages, found.compared)
    return Section("Primary comparisons", "Declared in the study file before the run.", [figure], [(table, caption)])


def _methods(data: StudyData) -> Section | None:
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
    tables = [results.methods_alike(distilled), results.methods_apart(distilled)]
    alone = cells.filter(pl.col("teacher").is_null())["objective"].unique(maintain_order=True).to_list()
    tables += [results.added_by_methods(cells, alone[0])] if alone else []
    return Section("Methods alike?", "All trainings at T = 1 without noise.", tables=tables)


def _responses(data: StudyData) -> Section | None:
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
                    f"accuracy over {title}, a line a method and student",
                    figures.response(swept, column, title, series),
                    f"Average accuracy by {title}: lines are means over {swept['training_seed'].n_unique()} seeds, "
                    "dots single trainings.",
                )
            )
    return Section("Temperature and noise", "What smoothing and noise do.", shown) if shown else None


def _likeness(data: StudyData, found: _Results) -> Section | None:
    rows = found.measures
    if rows.is_empty():
        return None
    methods = [method for method in data.methods if method in rows["method"].to_list()]
    means = rows.group_by("student", "method").agg(pl.col("agreement", "fidelity", "score").mean())
    shown = [
        Figure(
            "agreement",
            "mean agreement with the teacher by method and student",
            figures.heat_map(means, methods, data.students),
            "Items with the teacher's answer, percent, mean of tasks and seeds; no answer agrees with nothing.",
        ),
        Figure(
            "accuracy_fidelity",
            "accuracy against BLEU, a dot a training",
            figures.accuracy_against(rows, methods, data.students),
            "Being right against sounding like the teacher: sacreBLEU of the student's text with the teacher's.",
        ),
    ]
    names = ("size", "agreement", "fidelity")
    listed = [
        [name, f"{one.rho:+.2f}", f"{one.low:+.2f} to {one.high:+.2f}", p_value(one.p_value), str(one.n)]
        for name in names
        if (one := found.trends.get(name)) and one.rho is not None and one.p_value is not None
    ]
    table = Table("trends", ["improvement with", "rho", "95 %", "p", "runs"], listed, rows)
    caption = (
        "Spearman of the improvement over fine-tuning, methods averaged within a run; intervals by bootstrap over "
        "runs. The CSV has every training's score, improvement, agreement and BLEU."
    )
    return Section("Agreement and fidelity", "Whether likeness explains the gain.", shown, [(table, caption)])


def _learning(data: StudyData) -> Section | None:
    column = "heldout/forward_kl"
    if data.metrics.is_empty() or column not in data.metrics.columns:
        return None
    known = data.metrics.join(data.main.select("cell"), on="cell").filter(pl.col(column).is_not_null())
    shown = []
    for student in dict.fromkeys((data.students[0], data.students[-1])):
        own = known.filter(model=student).group_by("method", "step").agg(value=pl.col(column).mean()).sort("step")
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


def _cost(data: StudyData) -> Section | None:
    speeds = results.speeds(data)
    if speeds.is_empty():
        return None
    figure = Figure(
        "throughput",
        "trained tokens a second by method, a dot a student",
        figures.rates(speeds, data.methods, data.students),
        "Tokens that enter the loss, by second of sampling, scoring and stepping together.",
    )
    listed = [(results.cost(speeds), "Mean of the seeds and settings; the start of a process is not in it.")]
    if data.usage:
        caption = (
            "The teachers' own counters, one line a start and kind. Off-policy cells ask for the same sequences again "
            "and again; each costs one engine pass, whatever the objective, temperature and noise."
        )
        listed.append((results.usage(data), caption))
    return Section("Cost", "Throughput, and what the teachers did.", [figure], listed)
