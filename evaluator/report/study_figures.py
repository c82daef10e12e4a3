"""The figures of a study, each a function from a table to a chart that is legible 360 pixels wide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import polars as pl

from tutelage.evaluator.report.chart_style import MUTED, Chart, colour_by, styled, told_apart

_WIDTH, _HEIGHT = 290, 210


def _zero() -> alt.Chart:
    return alt.Chart(pl.DataFrame({"zero": [0.0]})).mark_rule(color=MUTED, strokeDash=[4, 3])


def improvement_by_size(measures: pl.DataFrame, methods: Sequence[str]) -> Chart:
    """Points gained over fine-tuning against the student's size: a dot a training, a line the mean of the seeds."""
    x = alt.X("size:Q", title="parameters of the student", scale=alt.Scale(type="log", nice=False, padding=16))
    x.axis = alt.Axis(values=measures["size"].unique().sort().to_list(), format=".2~s", grid=False)
    y = alt.Y("improvement:Q", title="points over fine-tuning")
    base = alt.Chart(measures).encode(x=x, color=colour_by("method", methods))
    dots = base.mark_point(filled=True, size=22, opacity=0.45).encode(y=y, **told_apart("method", methods, "shape"))
    lines = base.mark_line(strokeWidth=2).encode(y=alt.Y("mean(improvement):Q", title="points over fine-tuning"))
    return styled((_zero().encode(y="zero:Q") + lines + dots).properties(width=_WIDTH, height=_HEIGHT))


def forest(averages: pl.DataFrame) -> Chart:
    """Paired differences with their 95 % intervals: thick over items, thin over items and training runs."""
    base = alt.Chart(averages).encode(
        y=alt.Y("comparison:N", sort=averages["comparison"].to_list(), title=None, axis=alt.Axis(labelLimit=280)),
        color=colour_by("family", averages["family"].unique(maintain_order=True).to_list()),
    )
    x = alt.X("difference:Q", title="points, first minus second")
    thin = base.mark_rule(strokeWidth=1).encode(x=alt.X("seeds_low:Q"), x2="seeds_high:Q")
    thick = base.mark_rule(strokeWidth=4).encode(x=alt.X("low:Q"), x2="high:Q")
    dots = base.mark_point(filled=True, size=70, opacity=1).encode(x=x)
    chart = _zero().encode(x="zero:Q") + thin + thick + dots
    return styled(chart.properties(width=190, height=alt.Step(24)))


def response(scores: pl.DataFrame, column: str, title: str, series: Sequence[str], measure: str) -> Chart:
    """Mean score over the values of one setting, a line a series, dots the single trainings."""
    x = alt.X(f"{column}:O", title=title, axis=alt.Axis(labelAngle=0))
    base = alt.Chart(scores).encode(x=x, color=colour_by("series", series))
    lines = base.mark_line(strokeWidth=2).encode(y=alt.Y("mean(score):Q", title=f"{measure}, %"))
    dots = base.mark_point(filled=True, size=26, opacity=0.5).encode(
        y=alt.Y("score:Q", title=f"{measure}, %", scale=alt.Scale(zero=True)), **told_apart("series", series, "shape")
    )
    return styled((lines + dots).properties(width=_WIDTH, height=_HEIGHT))


def heat_map(likeness: pl.DataFrame, methods: Sequence[str], students: Sequence[str]) -> Chart:
    """Mean agreement with the teacher by method and student."""
    base = alt.Chart(likeness).encode(
        x=alt.X("student:N", sort=list(students), title="student, smallest first", axis=alt.Axis(labelAngle=0)),
        y=alt.Y("method:N", sort=list(methods), title=None),
    )
    scale = alt.Scale(scheme="blues", domain=[0, 100])
    cells = base.mark_rect().encode(color=alt.Color("agreement:Q", scale=scale, legend=None))
    dark = alt.condition("datum.agreement > 55", alt.value("white"), alt.value("#24292f"))
    text = base.mark_text(fontSize=13).encode(text=alt.Text("agreement:Q", format=".1f"), color=dark)
    return styled((cells + text).properties(width=52 * len(students), height=30 * len(methods)))


def score_against_fidelity(
    measures: pl.DataFrame, methods: Sequence[str], students: Sequence[str], measure: str
) -> Chart:
    """Score against BLEU with the teacher's text, a dot a training."""
    # A shape can say one thing: the student, if there are several.
    channels: dict[str, Any] = told_apart("method", methods, "shape")
    if len(students) > 1:
        legend = alt.Legend(title=None, symbolFillColor=MUTED)
        channels["shape"] = alt.Shape("student:N", sort=list(students), legend=legend)
    chart = (
        alt.Chart(measures)
        .mark_point(filled=True, size=55, opacity=0.8)
        .encode(
            x=alt.X("fidelity:Q", title="BLEU with the teacher's text", scale=alt.Scale(zero=False, nice=True)),
            y=alt.Y("score:Q", title=f"{measure}, %", scale=alt.Scale(zero=False, nice=True)),
            **channels,
        )
    )
    return styled(chart.properties(width=_WIDTH, height=_HEIGHT))


def learning(metrics: pl.DataFrame, methods: Sequence[str]) -> Chart:
    """Held-out KL from the teacher over the steps, mean of the seeds."""
    chart: Any = (
        alt.Chart(metrics)
        .mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=30, filled=True))
        .encode(
            x=alt.X("step:Q", title="optimizer step", axis=alt.Axis(tickMinStep=1, tickCount=6, format="d")),
            y=alt.Y("value:Q", title="held-out KL, nats a token", scale=alt.Scale(zero=True, nice=True)),
            **told_apart("method", methods, "strokeDash", symbolType="stroke"),
        )
    )
    return styled(chart.properties(width=_WIDTH, height=_HEIGHT))


def rates(speeds: pl.DataFrame, methods: Sequence[str], students: Sequence[str]) -> Chart:
    """Trained tokens a second by method, a dot a student."""
    chart = (
        alt.Chart(speeds)
        .mark_point(filled=True, size=70, opacity=0.9)
        .encode(
            x=alt.X("tokens_per_second:Q", title="trained tokens a second", axis=alt.Axis(format="~s")),
            y=alt.Y("method:N", sort=list(methods), title=None),
            color=colour_by("student", students),
        )
    )
    return styled(chart.properties(width=210, height=alt.Step(30)))
