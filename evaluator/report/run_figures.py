"""The figures of a run, each a function from a table to an Altair chart that is legible 360 pixels wide."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt
import polars as pl

from tutelage.evaluator.report.chart_style import MUTED, TEACHER_COLOUR, Chart, colour_by, colours, styled, told_apart

_WIDTH, _HEIGHT = 300, 200
_MARKED_POINTS = 30  # a line with more points than that shows the line only
_TEACHER = "teacher"
_PERCENT_AXIS = alt.Axis(format=".0%", tickCount=4)
_PHASES = {"sampling": "#56B4E9", "scoring": "#E69F00", "stepping": "#009E73", "waiting": "#999999"}


def _dots(base: alt.Chart, x: alt.X) -> alt.LayerChart:
    """A point a row: hollow where `filled` is false (before training)."""
    hollow = base.transform_filter("!datum.filled").mark_point(size=64, strokeWidth=2, fill="white", opacity=1)
    solid = base.transform_filter("datum.filled").mark_point(size=64, strokeWidth=2, filled=True, opacity=1)
    return solid.encode(x=x) + hollow.encode(x=x)  # a legend takes its marks from the first layer


def curve(metrics: pl.DataFrame, column: str, students: Sequence[str], *, title: str, percent: bool = False) -> Chart:
    """One measure over training steps, a line a student; `title` names the measure and its unit."""
    data = metrics.filter(pl.col(column).is_not_null()).select("student", "step", value=pl.col(column))
    axis = _PERCENT_AXIS if percent else alt.Axis(format="~g", tickCount=5)
    base = alt.Chart(data).encode(
        x=alt.X("step:Q", title="optimizer step", axis=alt.Axis(tickMinStep=1, tickCount=6, format="d")),
        y=alt.Y("value:Q", title=title, axis=axis, scale=alt.Scale(zero=not percent, nice=True)),
        color=colour_by("student", students, symbolType="stroke"),
    )
    lines = base.mark_line(strokeWidth=2).encode(**told_apart("student", students, "strokeDash", symbolType="stroke"))
    sparse = len(data) <= _MARKED_POINTS * max(len(students), 1)
    chart = lines + base.mark_point(filled=True, size=30, opacity=1) if sparse else lines
    return styled(chart.properties(width=_WIDTH, height=_HEIGHT))


def scores(summary: pl.DataFrame, order: Sequence[str], students: Sequence[str]) -> Chart:
    """Mean scores of one task with 95 % intervals, a line a model."""
    data = summary.with_columns(
        series=pl.when(role="teacher").then(pl.lit(_TEACHER)).otherwise(pl.col("student")),
        filled=pl.col("role") != "before",
    )
    scale = alt.Scale(domain=[*students, _TEACHER], range=[*colours(students), TEACHER_COLOUR])
    base = alt.Chart(data).encode(
        y=alt.Y("label:N", sort=list(order), title=None, axis=alt.Axis(labelLimit=180, grid=True)),
        color=alt.Color("series:N", scale=scale, legend=None),
    )
    bars = base.mark_rule(strokeWidth=2).encode(x=alt.X("low:Q"), x2="high:Q")
    x = alt.X("score:Q", title="score and 95 % interval", axis=_PERCENT_AXIS, scale=alt.Scale(domainMin=0))
    return styled((bars + _dots(base, x)).properties(width=170, height=alt.Step(24)))


def _by_cell(data: pl.DataFrame, students: Sequence[str]) -> alt.Chart:
    """A line a task and protocol, the students one below the other in it."""
    return alt.Chart(data.with_columns(cell=pl.format("{} · {}", "task", "protocol"))).encode(
        y=alt.Y("cell:N", title=None, axis=alt.Axis(labelLimit=180)),
        yOffset=alt.YOffset("student:N", scale=alt.Scale(domain=list(students))),
        color=colour_by("student", students, symbolType="circle"),
    )


def _cell_height(students: Sequence[str]) -> alt.Step:
    return alt.Step(20, **{"for": "offset"}) if len(students) > 1 else alt.Step(40, **{"for": "position"})


def forest(changes: pl.DataFrame, students: Sequence[str]) -> Chart:
    """Change of each task's score by training with its 95 % interval; zero is no change."""
    data = changes.with_columns(pl.col("change", "low", "high") * 100, filled=pl.lit(True))
    base = _by_cell(data, students)
    zero = alt.Chart(pl.DataFrame({"zero": [0.0]})).mark_rule(color=MUTED, strokeDash=[4, 3]).encode(x="zero:Q")
    bars = base.mark_rule(strokeWidth=2.5).encode(x="low:Q", x2="high:Q")
    dots = _dots(base, alt.X("change:Q", title="change in points, 95 % interval"))
    return styled((zero + bars + dots).properties(width=210, height=_cell_height(students)))


def agreement(likeness: pl.DataFrame, students: Sequence[str]) -> Chart:
    """Agreement with the teacher before (hollow) and after (filled) training."""
    data = likeness.filter(pl.col("role").is_in(["before", "after"])).with_columns(filled=pl.col("role") == "after")
    base = _by_cell(data, students)
    x = alt.X("agreement:Q", title="same answer as the teacher", axis=_PERCENT_AXIS)
    lines = base.mark_line(strokeWidth=2).encode(x=x, detail=["student:N", "cell:N"])
    return styled((lines + _dots(base, x)).properties(width=210, height=_cell_height(students)))


def score_against_fidelity(likeness: pl.DataFrame, students: Sequence[str]) -> Chart:
    """Score against BLEU of the student's text with the teacher's; hollow is before training."""
    data = likeness.filter(pl.col("bleu").is_not_null()).with_columns(filled=pl.col("role") != "before")
    shapes = alt.Legend(title=None, symbolFillColor=MUTED)
    base = alt.Chart(data).encode(
        y=alt.Y("score:Q", title="score", axis=_PERCENT_AXIS),
        color=colour_by("student", students, symbolType="circle"),
        shape=alt.Shape("task:N", legend=shapes if data["task"].n_unique() > 1 else None),
    )
    dots = _dots(base, alt.X("bleu:Q", title="BLEU against the teacher's text", scale=alt.Scale(zero=True, nice=True)))
    return styled(dots.properties(width=_WIDTH, height=_HEIGHT))


def phases(seconds: pl.DataFrame) -> Chart:
    """Mean seconds a step by phase, a bar a student."""
    names = list(_PHASES)
    chart = (
        alt.Chart(seconds)
        .mark_bar(height=18)
        .encode(
            x=alt.X("seconds:Q", title="mean seconds a step"),
            y=alt.Y("student:N", title=None, axis=alt.Axis(labelLimit=180)),
            color=alt.Color(
                "phase:N", scale=alt.Scale(domain=names, range=list(_PHASES.values())), legend=alt.Legend(title=None)
            ),
            order=alt.Order("rank:Q"),
        )
    )
    ranked = seconds.with_columns(rank=pl.col("phase").replace_strict(names, list(range(len(names))), default=99))
    return styled(chart.properties(data=ranked, width=210, height=alt.Step(30)))
