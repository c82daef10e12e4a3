"""The tables of a study: scores by method and student, comparisons, likeness to the teacher, what it cost."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from tutelage.evaluator.report.run_tables import Table, p_value
from tutelage.evaluator.report.study_data import StudyData
from tutelage.evaluator.scoring.agreement import agreement, fidelity, pair
from tutelage.evaluator.statistics.planned_comparisons import compare_methods, method_model
from tutelage.evaluator.statistics.scores import AVERAGE

_LIKENESS_KEYS = ["cell", "student", "method", "training_seed"]


def points(value: float | None) -> str:
    """Points with one decimal; a dash for none."""
    return "–" if value is None else f"{value:.1f}"


def signed(value: float | None) -> str:
    """Points with their sign (a true minus); a dash for none."""
    return "–" if value is None else f"{value:+.1f}".replace("-", "−")


def labels(scores: pl.DataFrame) -> pl.DataFrame:
    """The rows with `setting`: the method, and where it departs from T = 1, no noise, the default teacher."""
    temperature = pl.when(pl.col("temperature") != 1.0).then(pl.format(", T = {}", "temperature")).otherwise(pl.lit(""))
    noise = pl.when(pl.col("noise") != 0.0).then(pl.format(", σ = {}", "noise")).otherwise(pl.lit(""))
    return scores.with_columns(setting=(pl.col("method") + temperature + noise).str.replace_all(r"\.0\b", ""))


def by_method(data: StudyData) -> Table:
    """Accuracy of every model and setting, mean ± standard deviation over seeds, by task."""
    tasks = [*data.rows["task"].unique().sort(), AVERAGE]
    default = next(iter(data.teachers), "")
    scores = labels(data.scores()).with_columns(
        setting=pl.when(pl.col("role") != "student")
        .then(pl.col("role").replace_strict({"base": "base model", "tuned": "fine-tuned teacher"}, default="student"))
        .when(~pl.col("teacher").is_in(["", default]))
        .then(pl.format("{}, teacher {}", "setting", "teacher"))
        .otherwise("setting")
    )
    keys = ["student", "parameters", "setting"]
    frame = scores.group_by(*keys, "task", maintain_order=True).agg(
        pl.col("score").mean(), sd=pl.col("score").std(), seeds=pl.len()
    )
    rows = []
    for (student, _, setting), own in frame.sort("parameters", descending=True, maintain_order=True).group_by(
        keys, maintain_order=True
    ):
        cells = {row["task"]: row for row in own.to_dicts()}
        rows.append([f"{student}, {setting}", str(own["seeds"].max()), *(_spread(cells.get(task)) for task in tasks)])
    return Table("scores", ["model", "seeds", *tasks], rows, frame)


def _spread(cell: dict[str, float] | None) -> str:
    if cell is None:
        return "–"
    return points(cell["score"]) + ("" if cell["sd"] is None else f" ± {cell['sd']:.1f}")


def comparisons(averages: pl.DataFrame, compared: pl.DataFrame) -> Table:
    """Every declared comparison on the average of the tasks; the CSV has the single tasks too."""
    rows = [
        [
            row["comparison"],
            row["family"],
            f"{points(row['first'])} / {points(row['second'])}",
            signed(row["difference"]),
            f"{signed(row['low'])} to {signed(row['high'])}",
            f"{signed(row['seeds_low'])} to {signed(row['seeds_high'])}",
            p_value(row["p_holm"]),
            points(row["detectable"]),
            row["holds"],
        ]
        for row in averages.to_dicts()
    ]
    heads = ["comparison", "family", "first / second", "difference", "95 %, items", "95 %, items and runs"]
    return Table("comparisons", [*heads, "p (Holm)", "detectable", "reads"], rows, compared)


def methods_alike(cells: pl.DataFrame) -> tuple[Table, str]:
    """Friedman and Kruskal-Wallis over the distillation methods, by task and over all; with its caption."""
    frame = compare_methods(cells)
    tests = frame.unique(["task", "test"], maintain_order=True)
    rows = [
        [one["task"], one["test"], str(one["blocks"]), f"{one['statistic']:.2f}", p_value(one["p_value"]),
         f"{one['effect']:.2f}"]
        for one in tests.to_dicts()
    ]  # fmt: skip
    caption = (
        "Do the distillation methods differ at all? Friedman's test over blocks of student, seed and task (effect: "
        "Kendall's W), Kruskal-Wallis over unpaired cells (effect: epsilon squared). A large p is no proof of likeness."
    )
    return Table("methods", ["task", "test", "blocks", "statistic", "p", "effect"], rows, frame), caption


def methods_apart(cells: pl.DataFrame) -> tuple[Table, str]:
    """Which pairs of methods differ, over all tasks; with its caption."""
    frame = compare_methods(cells).filter(task=AVERAGE)
    rows = [
        [f"{one['first']} and {one['second']}", one["test"], p_value(one["p_pairwise"])] for one in frame.to_dicts()
    ]
    caption = "After Friedman's test Nemenyi's, after Kruskal-Wallis Dunn's with Holm's adjustment; all tasks."
    return Table("methods_apart", ["methods", "after", "p"], rows, frame), caption


def added_by_methods(cells: pl.DataFrame, reference: str) -> tuple[Table, str]:
    """What each method adds to the reference by the mixed-effects model; with its caption."""
    model = method_model(cells, reference)
    frame = pl.DataFrame([vars(effect) for effect in model.effects])
    rows = [
        [
            reference if one["name"] == "Intercept" else one["name"],
            points(one["estimate"]) if one["name"] == "Intercept" else signed(one["estimate"]),
            f"{signed(one['low'])} to {signed(one['high'])}",
            p_value(one["p_value"]),
        ]
        for one in frame.to_dicts()
    ]
    spread = ", ".join(f"{name} {variance**0.5:.1f}" for name, variance in model.variances.items())
    remarks = [*([] if model.converged else ["the fit did not converge"]), *model.remarks]
    doubts = f" The optimiser remarks: {'; '.join(remarks)}" if remarks else ""
    caption = (
        f"Linear mixed model of {model.observations} scores (percent): points over {reference}, whose own mean is the "
        f"first line; Wald intervals. Standard deviations of the random intercepts: {spread}; residual "
        f"{model.residual_variance**0.5:.1f}. Few levels make intervals too narrow.{doubts}"
    )
    return Table("methods_model", ["method", "estimate", "95 %", "p"], rows, frame), caption


def likeness(data: StudyData) -> pl.DataFrame:
    """Agreement and BLEU of each distilled cell with its own teacher, in percent, mean of the tasks."""
    cells = data.main.filter(pl.col("teacher") != "")
    rows = [
        {"cell": cell, "agreement": 100 * agreed, "fidelity": bleu}
        for cell, teacher in cells.select("cell", "teacher").rows()
        for agreed, bleu in _task_likeness(data, cell, data.teachers[teacher]["cell"])
    ]
    frame = pl.DataFrame(rows, schema={"cell": pl.String, "agreement": pl.Float64, "fidelity": pl.Float64})
    return frame.group_by("cell", maintain_order=True).agg(pl.col("agreement", "fidelity").mean())


def _task_likeness(data: StudyData, cell: str, teacher: str) -> list[tuple[float, float]]:
    found = []
    for task in data.rows["task"].unique().sort():
        sides = [data.rows.filter(pl.col("cell") == one, pl.col("task") == task) for one in (teacher, cell)]
        if any(side.is_empty() for side in sides):
            continue
        both = pair(*sides)
        agreed, text = agreement(both).agreement, fidelity(both).bleu
        if agreed is not None and text is not None:
            found.append((agreed, text))
    return found


def measures(data: StudyData, alike: pl.DataFrame) -> pl.DataFrame:
    """One row a distilled training at T = 1: score, improvement over fine-tuning of its seed, size, likeness."""
    scores = data.scores().filter(task=AVERAGE).join(data.main.select("cell"), on="cell")
    tuned = scores.filter(teacher="").select("student", "training_seed", sft="score")
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


def by_size(rows: pl.DataFrame, students: Sequence[str], methods: Sequence[str]) -> Table:
    """Mean improvement by student and method."""
    frame = rows.group_by("student", "method", maintain_order=True).agg(
        pl.col("improvement").mean(), sd=pl.col("improvement").std(), seeds=pl.len()
    )
    cells = {(row["student"], row["method"]): row for row in frame.to_dicts()}
    listed = [[student, *(_gain(cells.get((student, method))) for method in methods)] for student in students]
    return Table("improvement", ["student", *methods], listed, rows)


def _gain(cell: dict[str, float] | None) -> str:
    if cell is None:
        return "–"
    return signed(cell["improvement"]) + ("" if cell["sd"] is None else f" ± {cell['sd']:.1f}")


def usage(data: StudyData) -> Table:
    """What each teacher counted: sequences asked for, and engine passes that they cost."""
    off_policy = set(data.cells.filter(~pl.col("on_policy"))["cell"].to_list())
    records = []
    for start in data.usage:
        for kind, ids in (("off-policy cells", off_policy), ("on-policy cells", None)):
            students = [one for one in start["students"] if _of_kind(one["student_id"], ids, off_policy, data)]
            asked = sum(int(one["sequences"]) for one in students)
            hits = sum(int(one["store_hits"]) for one in students)
            records.append(
                {
                    "teacher": start["teacher"],
                    "start": start["instance_id"][:8],
                    "kind": kind,
                    "cells": len(students),
                    "sequences": asked,
                    "engine_passes": asked - hits,
                    "mebibytes": sum(int(one["bytes"]) for one in students) / 2**20,
                }
            )
    records = [record for record in records if record["cells"]]
    rows = [
        [
            f"{one['teacher']}, {one['kind']}",
            f"{one['cells']}",
            f"{one['sequences']:,}",
            f"{one['engine_passes']:,}",
            f"{one['mebibytes']:,.1f}",
        ]
        for one in records
    ]
    frame = pl.DataFrame(records)
    return Table("teacher_usage", ["teacher", "cells", "sequences asked", "engine passes", "MiB sent"], rows, frame)


def _of_kind(student: str, ids: set[str] | None, off_policy: set[str], data: StudyData) -> bool:
    if ids is not None:
        return student in ids
    return student not in off_policy and student in set(data.cells["cell"].to_list())


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
    """Seconds a cell and tokens a second."""
    rows = [
        [
            f"{row['student']}, {row['method']}",
            str(row["cells"]),
            f"{row['seconds']:.1f}",
            f"{row['tokens_per_second']:,.0f}",
        ]
        for row in frame.to_dicts()
    ]
    return Table(
        "cost", ["student and method", "cells", "seconds of steps a cell", "trained tokens a second"], rows, frame
    )
