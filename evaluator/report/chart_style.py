"""What every figure shares: colours that all eyes tell apart, fonts, and how the two kinds of points look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import altair as alt

# Okabe & Ito (2008), "Color Universal Design": distinguishable under every common colour blindness.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_SHAPES = ("circle", "square", "triangle-up", "diamond", "cross")
_DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3])
TEACHER_COLOUR = "#3a3f47"
MUTED = "#57606a"
_INK, _GRID = "#24292f", "#e7eaee"
_FONT = "Helvetica, Arial, sans-serif"
Chart: TypeAlias = alt.TopLevelMixin


def colours(names: Sequence[str]) -> list[str]:
    """A colour a name, in turn."""
    return [PALETTE[index % len(PALETTE)] for index in range(len(names))]


def colour_by(column: str, names: Sequence[str], **legend: str) -> alt.Color:
    """Colours by a column; further settings are those of `alt.Legend`."""
    scale = alt.Scale(domain=list(names), range=colours(names))
    return alt.Color(f"{column}:N", scale=scale, legend=alt.Legend(title=None, symbolStrokeWidth=3, **legend))


def told_apart(
    column: str, names: Sequence[str], by: Literal["shape", "strokeDash"], **legend: str
) -> dict[str, alt.Color | alt.Shape | alt.StrokeDash]:
    """Encodings: colours by a column and, where there are more names than colours, shapes or dashes as well."""
    channels: dict[str, Any] = {"color": colour_by(column, names, **legend)}
    if len(names) > len(PALETTE):
        channel, looks = (alt.Shape, _SHAPES) if by == "shape" else (alt.StrokeDash, _DASHES)
        given = [looks[index // len(PALETTE) % len(looks)] for index in range(len(names))]
        scale = alt.Scale(domain=list(names), range=given)
        channels[by] = channel(f"{column}:N", scale=scale, legend=channels["color"]["legend"])
    return channels


def styled(chart: alt.Chart | alt.LayerChart | alt.FacetChart) -> Chart:
    """The chart in the report's fonts and colours."""
    axis = {
        "labelColor": MUTED,
        "titleColor": MUTED,
        "titleFontWeight": "normal",
        "titleFontSize": 12,
        "labelFontSize": 12,
        "gridColor": _GRID,
        "domainColor": _GRID,
        "tickColor": _GRID,
    }
    legend = {"orient": "bottom", "columns": 2, "labelFontSize": 12, "labelColor": _INK}
    styled = chart.configure(font=_FONT, background="white", padding=6).configure_view(stroke=None)
    return styled.configure_axis(**axis).configure_legend(**legend)
