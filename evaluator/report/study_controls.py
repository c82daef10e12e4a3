"""Of a study: whether a method's gain is its controls' as well, and what each method spent for its score.

A method's gain is over what it starts from. It is its own if the method is higher than its control, by the rules that a
comparison holds by (`statistics.verdicts`), and else may be whatever the control has as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import altair as alt
import numpy as np
import polars as pl

from tutelage.evaluator.report.chart_style import Chart, styled, told_apart
from tutelage.evaluator.report.formats import decimals, points, signed
from tutelage.evaluator.report.page import Column, Figure, Section, Table, column
from tutelage.evaluator.report.study_data import StudyData
from tutelage.evaluator.statistics import verdicts
from tutelage.evaluator.statistics.planned_comparisons import ITEMS, Comparison, compare
from tutelage.evaluator.statistics.scores import AVERAGE

OWN, SHARED, NO_GAIN, OPEN = (
    "its own",
    "its control gains as well",
    "no gain over its start",
    "not told apart from its control",
)
_START = "start of "
_SETTING = ["model", "seed", "teacher", "temperature", "noise"]
_HIGHER = ("first higher", "these runs only")
_MEASURED = ("gain", "of_control", "apart")


def judged(data: StudyData, generator: np.random.Generator, *, resamples: int) -> pl.DataFrame:
    """A row a method and control, both scored.

    Returns:
        Columns method, control; for the gain of the method (`gain`), that of the control (`of_control`) and the
        method's score over the control's (`apart`) each the difference in points, low, high (over items and trainings)
        and holds, as `verdicts.directions`; verdict.

    """
    controlled = data.cells.filter(pl.col("control_of") != "", pl.col("scored"))
    rows = []
    for method, control in controlled.select("control_of", "method").unique(maintain_order=True).rows():
        items = _items(data, method, control)
        if items.is_empty():
            continue
        sides = {
            "gain": (method, _START),
            "of_control": (control, _START),
            "apart": (method, control),
        }
        comparisons = [
            Comparison(name, "controls", {"objective": first}, {"objective": second})
            for name, (first, second) in sides.items()
        ]
        found = verdicts.directions(compare(items, comparisons, generator, resamples=resamples))
        by_name = {row["comparison"]: row for row in found.to_dicts()}
        row: dict[str, Any] = {"method": method, "control": control}
        for name in _MEASURED:
            one = by_name[name]
            seeds = one["seeds_low"] is not None
            row |= {
                name: one["difference"],
                f"{name}_low": one["seeds_low"] if seeds else one["low"],
                f"{name}_high": one["seeds_high"] if seeds else one["high"],
                f"{name}_holds": one["holds"],
            }
        rows.append(row | {"verdict": _verdict(row)})
    return pl.DataFrame(rows, infer_schema_length=None)


def _verdict(row: Mapping[str, Any]) -> str:
    if row["gain_holds"] not in _HIGHER:
        return NO_GAIN
    if row["apart_holds"] == "first higher":
        return OWN
    return SHARED if row["of_control_holds"] in _HIGHER else OPEN


def _items(data: StudyData, method: str, control: str) -> pl.DataFrame:
    """Rows of `ITEMS` of a method, its control and what both start from, each training a `seed` of its own."""
    scored = data.cells.filter("scored")
    own, other = (scored.filter(role="student", method=name) for name in (method, control))
    both = own.join(other.select(*_SETTING, control_cell="cell"), on=_SETTING).with_row_index("run")
    base = dict(scored.filter(role="base").select("model", "cell").rows())
    known = set(scored["cell"])
    parts = []
    for row in both.to_dicts():
        # A model that is taken as it is has a cell of its own, which is not what its students name.
        start = row["start"] if row["start"] in known else base.get(row["model"])
        if start is None:
            continue
        for name, cell in ((method, row["cell"]), (control, row["control_cell"]), (_START, start)):
            parts.append(
                data.rows.filter(cell=cell).select(
                    "task",
                    "item_id",
                    "score",
                    teacher=pl.lit(None, pl.String),
                    student=pl.lit(row["model"]),
                    objective=pl.lit(name),
                    temperature=pl.lit(row["temperature"], pl.Float64),
                    noise=pl.lit(row["noise"], pl.Float64),
                    seed=pl.lit(row["run"], pl.Int64),
                    cluster="item_hash",
                )
            )
    if not parts:
        return ITEMS.to_frame()
    keys = [name for name in ITEMS if name != "score"]
    return pl.concat(parts).group_by(keys, maintain_order=True).agg(pl.col("score").mean()).match_to_schema(ITEMS)


def controls(found: pl.DataFrame) -> Section | None:
    """Whether what a method gains is its own."""
    if found.is_empty():
        return None

    def gain(name: str) -> Column:
        def text(row: Mapping[str, Any]) -> str:
            low, high = row[f"{name}_low"], row[f"{name}_high"]
            interval = "" if low is None else f" ({signed(low)} to {signed(high)})"
            return f"{signed(row[name])}{interval}, {row[f'{name}_holds']}"

        heads = {"gain": "gain over its start", "of_control": "gain of the control", "apart": "method minus control"}
        return Column(heads[name], text)

    columns = [
        column("method", "method"),
        column("control", "control", numeric=False),
        *(gain(name) for name in _MEASURED),
        column("the gain is", "verdict", numeric=False),
    ]
    caption = (
        "Points on the average of the tasks with 95 % intervals over items and training runs (over items, if there is "
        "one). A gain is a method's own if it is higher than its control, and not if the control gains as well; Holm "
        "within each method and control."
    )
    table = Table("controls", columns, found.to_dicts(), found, caption)
    return Section("Controls", "Whether what a method gains is its own.", tables=[table])


def doubted(claims: pl.DataFrame, data: StudyData, found: pl.DataFrame) -> pl.DataFrame:
    """Verdicts on claims, which say of what they are about if a control gains as well."""
    if found.is_empty() or claims.is_empty():
        return claims
    shared = found.filter(verdict=SHARED)
    texts = []
    for claim, verdict in zip(data.claims, claims["verdict"], strict=True):
        members = [one for one in data.comparisons if claim["family"] and one.family == claim["family"]]
        side = "second" if claim["expects"] == "second higher" else "first"
        methods = [getattr(one, side).get("objective") for one in members]
        names = shared.filter(pl.col("method").is_in(methods))["control"].to_list()
        texts.append(verdict + (f"; {', '.join(names)} gains as well" if names else ""))
    return claims.with_columns(verdict=pl.Series(texts, dtype=pl.String))


def spent(data: StudyData) -> pl.DataFrame:
    """A row a scored student: its score in percent, and steps, tokens and seconds, those of its warm-up included."""
    if data.metrics.is_empty():
        return pl.DataFrame()
    phases = [name for name in data.metrics.columns if name.startswith("seconds/")]
    own = data.metrics.filter(pl.col("train/tokens").is_not_null())
    if "train/teacher_tokens" not in own.columns:  # written by an earlier version
        return pl.DataFrame()
    each = {
        row["cell"]: row
        for row in own.group_by("cell")
        .agg(
            steps=pl.len(),
            scored_tokens=pl.col("train/tokens").sum(),
            teacher_tokens=pl.col("train/teacher_tokens").sum(),
            seconds=pl.sum_horizontal(pl.col(phases).fill_null(0.0)).sum(),
        )
        .to_dicts()
    }
    students = {row["cell"]: row for row in data.cells.filter(role="student").to_dicts()}
    scores = dict(data.scores().filter(task=AVERAGE).select("cell", "score").rows())
    rows = []
    for cell, row in students.items():
        chain, before = [cell], row["start"]
        while before in students:
            chain.append(before)
            before = students[before]["start"]
        if cell not in scores or not all(one in each for one in chain):
            continue
        total = {name: sum(each[one][name] for one in chain) for name in next(iter(each.values())) if name != "cell"}
        kept = {"method": row["method"], "student": row["model"], "seed": row["seed"]}
        rows.append({"cell": cell, **kept, "score": scores[cell], **total})
    return pl.DataFrame(rows)


def spending(data: StudyData) -> Section | None:
    """Score against what it cost, for every method."""
    frame = spent(data)
    if frame.is_empty():
        return None
    keys = ["student", "method"]
    means = frame.group_by(keys, maintain_order=True).agg(
        pl.col("score", "steps", "scored_tokens", "teacher_tokens", "seconds").mean(), trainings=pl.len()
    )
    methods = [method for method in data.methods if method in means["method"].to_list()]
    figures = [
        Figure(
            f"score_by_{name}",
            f"{data.measure} against {title}, a dot a training",
            _against(frame, name, title, methods, data.measure),
            f"Average {data.measure} against {title}, those of the warm-up included; a dot a training.",
        )
        for name, title in (("teacher_tokens", "tokens that the teacher read"), ("seconds", "seconds of steps"))
    ]
    whole = decimals(0, thousands=True)
    columns = [
        Column("student and method", lambda row: f"{row['student']}, {row['method']}"),
        column("trainings", "trainings"),
        column(f"{data.measure}, %", "score", points),
        column("steps", "steps", whole),
        column("scored tokens", "scored_tokens", whole),
        column("teacher tokens", "teacher_tokens", whole),
        column("seconds", "seconds", whole),
    ]
    caption = (
        "Means over seeds and settings, the warm-up that a method starts from included. Teacher tokens: of the "
        "sequences that the teacher read while a student trained, prompts included; what it wrote before (`data: "
        "rationales`) is in the teachers' own counters. The CSV has every training."
    )
    table = Table("spent", columns, means.to_dicts(), frame, caption)
    return Section("Score and cost", "What each method spent for its score.", figures, [table])


def _against(frame: pl.DataFrame, name: str, title: str, methods: list[str], measure: str) -> Chart:
    chart = (
        alt.Chart(frame)
        .mark_point(filled=True, size=45, opacity=0.8)
        .encode(
            x=alt.X(f"{name}:Q", title=title, axis=alt.Axis(format="~s", tickCount=6)),
            y=alt.Y("score:Q", title=f"{measure}, %", scale=alt.Scale(zero=False, nice=True)),
            **told_apart("method", methods, "shape"),
        )
    )
    return styled(chart.properties(width=290, height=210))
