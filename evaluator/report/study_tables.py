"""The tables of a study: scores by method and student, comparisons, likeness to the teacher, what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from tutelage.evaluator.report.formats import decimals, p_value, percent, points, signed
from tutelage.evaluator.report.page import Column, Table, column
from tutelage.evaluator.report.study_data import StudyData
from tutelage.evaluator.scoring.agreement import agreement, fidelity, pair
from tutelage.evaluator.statistics.paired import are_decisions
from tutelage.evaluator.statistics.planned_comparisons import CANNOT_TELL, compare_methods, method_model
from tutelage.evaluator.statistics.rank_correlation import Correlation
from tutelage.evaluator.statistics.scores import AVERAGE
from tutelage.names import name_in_run

_LIKENESS_KEYS = ["cell", "student", "method", "training_seed"]


def setting(data: StudyData) -> pl.Expr:
    """What a cell is called beside its model: its role, or its method and what departs from the study's default."""
    temperature = pl.when(pl.col("temperature") != 1.0).then(pl.format(", T = {}", "temperature")).otherwise(pl.lit(""))
    noise = pl.when(pl.col("noise") != 0.0).then(pl.format(", σ = {}", "noise")).otherwise(pl.lit(""))
    own = (pl.col("method") + temperature + noise).str.replace_all(r"\.0\b", "")
    roles = {"base": "base model", "tuned": "fine-tuned teacher"}
    return (
        pl.when(pl.col("role") != "student")
        .then(pl.col("role").replace_strict(roles, default="student"))
        .when(~pl.col("teacher").is_in(["", next(iter(data.teachers), "")]))
        .then(pl.format("{}, teacher {}", own, "teacher"))
        .otherwise(own)
    )


def by_method(data: StudyData) -> Table:
    """Score of every model and setting, mean ± standard deviation over seeds, by task.

    A setting is the method, and where it departs from T = 1, no noise, and the study's default teacher.
    """
    tasks = [*data.rows["task"].unique().sort(), AVERAGE]
    scores = data.scores().with_columns(setting=setting(data))
    keys = ["student", "parameters", "setting"]
    frame = scores.group_by(*keys, "task", maintain_order=True).agg(
        pl.col("score").mean(), sd=pl.col("score").std(), seeds=pl.len()
    )
    written = data.rows.filter(pl.col("finish_reason").is_in(["stop", "length"]))
    cut = written.group_by("cell").agg(cut_off=(pl.col("finish_reason") == "length").mean())
    by_setting = scores.unique("cell").join(cut, on="cell").group_by(keys).agg(pl.col("cut_off").mean())
    cut_off = {row[:-1]: row[-1] for row in by_setting.rows()}
    by_model = frame.sort("parameters", descending=True, maintain_order=True).group_by(keys, maintain_order=True)
    rows = [
        {"model": f"{key[0]}, {key[2]}", "seeds": own["seeds"].max(), "cut off": cut_off.get(key)}
        | {row["task"]: row for row in own.to_dicts()}
        for key, own in by_model
    ]

    def spread(row: Mapping[str, Any]) -> str:
        return points(row["score"]) + ("" if row["sd"] is None else f" ± {row['sd']:.1f}")

    columns = [column("model", "model"), column("seeds", "seeds"), *(column(task, task, spread) for task in tasks)]
    columns.append(column("cut off", "cut off", percent))
    caption = (
        f"Mean {data.measure} in percent ± standard deviation over training seeds (none for one seed). Average: "
        "unweighted mean of the tasks. Items answered without a number count as wrong. Cut off: percent of the outputs "
        "that reached the limit of new tokens before the model ended them."
    )
    return Table("scores", columns, rows, frame, caption)


def comparisons(averages: pl.DataFrame, compared: pl.DataFrame) -> Table:
    """Every declared comparison on the average of the tasks; the CSV has the single tasks too."""
    columns = [
        column("comparison", "comparison"),
        column("family", "family"),
        Column("first / second", lambda row: f"{points(row['first'])} / {points(row['second'])}"),
        column("difference", "difference", signed),
        Column("95 %, items", lambda row: f"{signed(row['low'])} to {signed(row['high'])}"),
        Column("95 %, items and runs", lambda row: f"{signed(row['seeds_low'])} to {signed(row['seeds_high'])}"),
        column("p (Holm)", "p_holm", p_value),
        column("detectable", "detectable", points),
        column("reads", "holds"),
    ]
    caption = (
        "Points. Paired on the same items, seeds and students; items are clustered over runs. p: cluster-robust t, "
        "Holm within the family. Detectable: smallest true difference found with 80 % power. The single tasks, with "
        "bootstrap and permutation tests, are in the CSV."
    )
    tasks = {
        name: ", ".join(part["task"].unique(maintain_order=True))
        for (name,), part in compared.filter(pl.col("task") != AVERAGE).group_by("comparison", maintain_order=True)
    }
    if len(set(tasks.values())) > 1:
        columns.insert(2, Column("tasks", lambda row: tasks[row["comparison"]]))
    return Table("comparisons", columns, averages.to_dicts(), compared, caption)


def methods_alike(cells: pl.DataFrame) -> Table:
    """Friedman and Kruskal-Wallis over the distillation methods, by task and over all."""
    frame = compare_methods(cells)
    columns = [
        column("task", "task"),
        column("test", "test"),
        column("blocks", "blocks"),
        column("statistic", "statistic", decimals(2)),
        Column("p", lambda row: CANNOT_TELL if row["p_value"] is None else p_value(row["p_value"])),
        column("effect", "effect", decimals(2)),
    ]
    caption = (
        "Do the distillation methods differ at all? Friedman's test over blocks of student, seed and task (effect: "
        "Kendall's W), Kruskal-Wallis over unpaired cells (effect: epsilon squared). A large p is no proof of likeness."
    )
    return Table("methods", columns, frame.unique(["task", "test"], maintain_order=True).to_dicts(), frame, caption)


def methods_apart(cells: pl.DataFrame) -> Table:
    """Which pairs of methods differ, over all tasks."""
    frame = compare_methods(cells).filter(task=AVERAGE)
    columns = [
        Column("methods", lambda row: f"{row['first']} and {row['second']}"),
        column("after", "test"),
        column("p", "p_pairwise", p_value),
    ]
    caption = "After Friedman's test Nemenyi's, after Kruskal-Wallis Dunn's with Holm's adjustment; all tasks."
    return Table("methods_apart", columns, frame.to_dicts(), frame, caption)


def added_by_methods(cells: pl.DataFrame, reference: str) -> Table:
    """What each method adds to the reference by the mixed-effects model."""
    model = method_model(cells, reference)
    if model is None:
        caption = "What each method adds cannot be told from one score a method; more seeds, tasks or students can."
        return Table("methods_model", [], [], None, caption)
    frame = pl.DataFrame([vars(effect) for effect in model.effects])
    columns = [
        Column("method", lambda row: reference if row["name"] == "Intercept" else str(row["name"])),
        Column("estimate", lambda row: (points if row["name"] == "Intercept" else signed)(row["estimate"])),
        Column("95 %", lambda row: f"{signed(row['low'])} to {signed(row['high'])}"),
        column("p", "p_value", p_value),
    ]
    spread = ", ".join(f"{name} {variance**0.5:.1f}" for name, variance in model.variances.items())
    remarks = [*([] if model.converged else ["the fit did not converge"]), *model.remarks]
    doubts = f" The optimiser remarks: {'; '.join(remarks)}" if remarks else ""
    caption = (
        f"Linear mixed model of {model.observations} scores (percent): points over {reference}, whose own mean is the "
        f"first line; intervals by Student's t. Standard deviations of the random intercepts: {spread}; residual "
        f"{model.residual_variance**0.5:.1f}.{doubts}"
    )
    return Table("methods_model", columns, frame.to_dicts(), frame, caption)


def likeness(data: StudyData) -> pl.DataFrame:
    """Agreement and BLEU of each distilled cell with its own teacher, in percent, mean of the tasks.

    Agreement is null where items are not right or wrong (protocol `open`).
    """
    by_cell = {str(cell): rows for (cell,), rows in data.rows.group_by("cell")}
    nothing = data.rows.clear()
    found = []
    for cell, teacher in data.main.filter(pl.col("teacher") != "").select("cell", "teacher").rows():
        for task in data.rows["task"].unique().sort():
            sides = [by_cell.get(one, nothing).filter(task=task) for one in (data.teachers[teacher]["cell"], cell)]
            if any(side.is_empty() for side in sides) or (both := pair(*sides)).is_empty():
                continue
            decided = are_decisions(both["score"].drop_nulls(), both["score_student"].drop_nulls())
            agreed = agreement(both).agreement if decided and both["extracted"].null_count() < len(both) else None
            found.append(
                {
                    "cell": cell,
                    "agreement": None if agreed is None else 100 * agreed,
                    "fidelity": None if both["output"].has_nulls() else fidelity(both).bleu,
                }
            )
    frame = pl.DataFrame(found, schema={"cell": pl.String, "agreement": pl.Float64, "fidelity": pl.Float64})
    return frame.group_by("cell", maintain_order=True).agg(pl.col("agreement", "fidelity").mean())


def measures(data: StudyData, alike: pl.DataFrame) -> pl.DataFrame:
    """One row a distilled training at T = 1: score, improvement over fine-tuning of its seed, size, likeness."""
    scores = data.scores().filter(task=AVERAGE).join(data.main.select("cell"), on="cell")
    tuned = scores.filter(teacher="", method=data.fine_tuning).select("student", "training_seed", sft="score")
    distilled = scores.filter(pl.col("teacher") != "").join(tuned, on=["student", "training_seed"])
    return distilled.join(alike, on="cell").select(
        *_LIKENESS_KEYS,
        seed="training_seed",
        size=pl.col("parameters").cast(pl.Float64),
        score="score",
        improvement=pl.col("score") - pl.col("sft"),
        agreement="agreement",
        fidelity="fidelity",
    )


def whole_runs(rows: pl.DataFrame) -> pl.DataFrame:
    """Runs (student and seed) that have every method."""
    methods = rows["method"].n_unique()
    return rows.filter(pl.col("method").n_unique().over("student", "seed") == methods)


def by_size(rows: pl.DataFrame, students: Sequence[str], methods: Sequence[str], fine_tuning: str) -> Table:
    """Mean improvement by student and method."""
    frame = rows.group_by("student", "method", maintain_order=True).agg(
        pl.col("improvement").mean(), sd=pl.col("improvement").std(), seeds=pl.len()
    )
    cells = {(row["student"], row["method"]): row for row in frame.to_dicts()}

    def gain(row: Mapping[str, Any]) -> str:
        return signed(row["improvement"]) + ("" if row["sd"] is None else f" ± {row['sd']:.1f}")

    listed = [{"student": one} | {method: cells.get((one, method)) for method in methods} for one in students]
    columns = [column("student", "student"), *(column(method, method, gain) for method in methods)]
    caption = f"Points over {fine_tuning} at T = 1 without noise, mean ± standard deviation over seeds."
    return Table("improvement", columns, listed, rows, caption)


def trends(found: Mapping[str, Correlation], rows: pl.DataFrame) -> Table:
    """With what the improvement goes: size, agreement, fidelity; the CSV has every training's values."""
    listed = [
        {"name": name, **vars(trend)}
        for name in ("size", "agreement", "fidelity")
        if (trend := found.get(name)) and trend.rho is not None
    ]
    columns = [
        column("improvement with", "name"),
        column("rho", "rho", "{:+.2f}".format),
        Column("95 %", lambda row: CANNOT_TELL if row["low"] is None else f"{row['low']:+.2f} to {row['high']:+.2f}"),
        column("p", "p_value", p_value),
        column("runs", "n"),
    ]
    caption = (
        "Spearman of the improvement over fine-tuning, methods averaged within a run; intervals by bootstrap over "
        "runs. The CSV has every training's score, improvement, agreement and BLEU."
    )
    return Table("trends", columns, listed, rows, caption)


def usage(data: StudyData) -> Table:
    """What each teacher counted: sequences asked for, and engine passes that they cost."""

    def counted(cells: pl.DataFrame) -> set[str]:
        return {name_in_run(data.name, cell) for cell in cells["cell"]}

    kinds = {
        "off-policy cells": counted(data.cells.filter(~pl.col("on_policy"))),
        "on-policy cells": counted(data.cells.filter("on_policy")),
    }
    records = []
    for start in data.usage:
        for kind, cells in kinds.items():
            students = [one for one in start["students"] if one["student_id"] in cells]
            if not students:
                continue
            asked = sum(int(one["sequences"]) for one in students)
            records.append(
                {
                    "teacher": start["teacher"],
                    "start": start["instance_id"][:8],
                    "kind": kind,
                    "cells": len(students),
                    "sequences": asked,
                    "engine_passes": asked - sum(int(one["store_hits"]) for one in students),
                    "mebibytes": sum(int(one["bytes"]) for one in students) / 2**20,
                }
            )
    whole = decimals(0, thousands=True)
    columns = [
        Column("teacher", lambda row: f"{row['teacher']}, {row['kind']}"),
        column("cells", "cells"),
        column("sequences asked", "sequences", whole),
        column("engine passes", "engine_passes", whole),
        column("MiB sent", "mebibytes", decimals(1, thousands=True)),
    ]
    caption = (
        "The teachers' own counters, one line a start and kind. Off-policy cells ask for the same sequences again and "
        "again; each costs one engine pass, whatever the objective, temperature and noise."
    )
    return Table("teacher_usage", columns, records, pl.DataFrame(records), caption)


def speeds(data: StudyData) -> pl.DataFrame:
    """Trained tokens a second and seconds a cell, mean of the seeds, by method and student."""
    if data.metrics.is_empty():
        return pl.DataFrame()
    phases = [name for name in data.metrics.columns if name.startswith("seconds/")]
    steps = data.metrics.filter(pl.col("role") == "student", pl.col("train/tokens").is_not_null())
    by_cell = steps.group_by("method", "model", "parameters", "cell", maintain_order=True).agg(
        tokens=pl.col("train/tokens").sum(), seconds=pl.sum_horizontal(pl.col(phases).fill_null(0.0)).sum()
    )
    return (
        by_cell.with_columns(tokens_per_second=pl.col("tokens") / pl.col("seconds"))
        .group_by("method", pl.col("model").alias("student"), "parameters", maintain_order=True)
        .agg(pl.col("tokens_per_second", "seconds").mean(), cells=pl.len())
        .sort("parameters", maintain_order=True)
    )


def cost(frame: pl.DataFrame) -> Table:
    """Seconds a cell and tokens a second, from `speeds`."""
    columns = [
        Column("student and method", lambda row: f"{row['student']}, {row['method']}"),
        column("cells", "cells"),
        column("seconds of steps a cell", "seconds", decimals(1)),
        column("trained tokens a second", "tokens_per_second", decimals(0, thousands=True)),
    ]
    caption = "Mean of the seeds and settings; the start of a process is not in it."
    return Table("cost", columns, frame.to_dicts(), frame, caption)


def claims(data: StudyData, frame: pl.DataFrame) -> Table:
    """What was declared, and the verdicts of `statistics.verdicts`."""
    students = data.rows.filter(role="student")
    items, runs = students.select("task", "item_id").n_unique(), students.select("student", "training_seed").n_unique()
    columns = [
        column("claim", "claim", numeric=False),
        column("at this size", "verdict", numeric=False),
        column("what was found", "found", numeric=False),
        column("test", "test", numeric=False),
    ]
    caption = (
        "Rules fixed before the run. A family shows if every member, on the average of the tasks, falls on the "
        "expected side with p ≤ 0.05 after Holm (items clustered over students and seeds) and an interval over items "
        "and training runs without zero, or for equivalence within the margin; “these runs only” passes the first test "
        "and not the second, and one training a side never does. A trend shows if "
        "the 95 % interval of rho, bootstrapped over runs, lies on the expected side and p ≤ 0.05. "
        f"n: {items} items, {runs} runs (student and seed)."
    )
    return Table("claims", columns, frame.to_dicts(), frame, caption)
