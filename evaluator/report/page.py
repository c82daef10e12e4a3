"""The page that every report is: sections of text, figures and tables, as HTML and Markdown, with files beside both.

A table keeps its numbers; each column says how one is written, and that happens where the page is written.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tutelage.evaluator.report.chart_style import Chart
from tutelage.evaluator.report.formats import NONE

_PNG_SCALE = 2  # pixels a point, for screens and printers that have two


@dataclass(frozen=True)
class Column:
    """A column of a table: its head, how a row's value is written, and whether it is a number (set to the right)."""

    head: str
    text: Callable[[Mapping[str, Any]], str]
    numeric: bool = True


def column(head: str, key: str, form: Callable[[Any], str] = str, *, numeric: bool = True) -> Column:
    """A column that writes one value of the row, and a dash where that is None or absent."""
    return Column(head, lambda row: NONE if row.get(key) is None else form(row[key]), numeric)


@dataclass(frozen=True)
class Table:
    """Values and how they are shown. The first column names the row.

    Attributes:
        name: of its CSV file.
        columns: what is shown.
        rows: the values, a mapping a row.
        frame: what the CSV file holds; None for no file.
        caption: n, test, and what to read.

    """

    name: str
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]
    frame: pl.DataFrame | None
    caption: str = ""

    @property
    def cells(self) -> list[list[str]]:
        """The rows as they are written."""
        return [[column.text(row) for column in self.columns] for row in self.rows]


@dataclass(frozen=True)
class Figure:
    """A chart and the sentence under it."""

    name: str
    alt: str
    chart: Chart
    caption: str

    @property
    def svg(self) -> Markup:
        """The chart as inline SVG; ids carry the figure's name, since a page has one space of ids."""
        svg = re.sub(r'(id="|url\(#)', rf"\g<1>{self.name}-", _rendered(self.chart, "svg").decode())
        return Markup(svg)  # noqa: S704 -- made by vl-convert, which escapes the labels


@dataclass(frozen=True)
class Answer:
    """What one model wrote for an item, and whether its answer is right."""

    label: str
    output: str
    right: bool


@dataclass(frozen=True)
class Sample:
    """An item as several models answered it; the question is empty where it is not known."""

    title: str
    question: str
    answers: Sequence[Answer]


@dataclass(frozen=True)
class Tile:
    """A headline of the page: of which student, the figure, what it is."""

    student: str
    value: str
    text: str


@dataclass(frozen=True)
class Section:
    """A heading, what to see there, figures, tables, samples of outputs."""

    title: str
    text: str = ""
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    samples: Sequence[Sample] = ()

    @property
    def anchor(self) -> str:
        """What a link to the section ends in."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True)
class Page:
    """A whole report.

    Attributes:
        kind: which report it is; stands over the title.
        title: of what.
        sections: in their order.
        facts: names and values for the head of the page.
        tiles: its headlines.
        origin: where every number comes from, for the foot of the page.
        contents: whether a list of the sections comes first.

    """

    kind: str
    title: str
    sections: Sequence[Section]
    facts: Sequence[tuple[str, str]] = ()
    tiles: Sequence[Tile] = ()
    origin: str = "Every number is derived from one row an item."
    contents: bool = False

    def html(self) -> str:
        """One file without scripts or references; every text is escaped."""
        environment = Environment(
            loader=PackageLoader("tutelage.evaluator.report"),
            autoescape=True,
            undefined=StrictUndefined,  # a misspelt name in the template is an error, not an empty cell
            trim_blocks=True,
        )
        return environment.get_template("report.html.jinja").render(page=self)

    def markdown(self) -> str:
        """GitHub-flavoured Markdown; figures are references to the files that `write` puts beside it."""
        parts = [
            f"# {self.title}",
            *(["\n".join(f"- {name}: {value}" for name, value in self.facts)] * bool(self.facts)),
        ]
        for section in self.sections:
            parts += [f"## {section.title}", section.text]
            for figure in section.figures:
                parts += [f"![{figure.alt}](figures/{figure.name}.png)", figure.caption]
            for table in section.tables:
                parts += [_markdown_table(table), table.caption]
            for sample in section.samples:
                parts += [f"### {sample.title}", _quoted(sample.question)]
                for answer in sample.answers:
                    parts += [f"{answer.label}, {'right' if answer.right else 'wrong'}:", _quoted(answer.output)]
        return "\n\n".join(part for part in parts if part) + "\n"

    def write(self, out: Path) -> Path:
        """Writes `out` and, beside it, `report.md`, `figures/*.svg`, `figures/*.png` and `tables/*.csv`."""
        folder = out.parent
        folder.mkdir(parents=True, exist_ok=True)
        # The same figure is rendered again for its files: inline it carries its name in every id, beside the page not.
        charts = [figure for section in self.sections for figure in section.figures]
        frames = {table.name: table.frame for section in self.sections for table in section.tables}
        if charts:
            (folder / "figures").mkdir(exist_ok=True)
        for figure in charts:
            for form in ("svg", "png"):
                (folder / "figures" / f"{figure.name}.{form}").write_bytes(_rendered(figure.chart, form))
        (folder / "tables").mkdir(exist_ok=True)
        for name, frame in frames.items():
            if frame is not None:
                frame.write_csv(folder / "tables" / f"{name}.csv")
        out.write_text(self.html(), encoding="utf-8")
        out.with_name("report.md").write_text(self.markdown(), encoding="utf-8")
        return out


def _markdown_table(table: Table) -> str:
    if not table.rows:
        return "None."
    marks = ["---:" if index and column.numeric else "---" for index, column in enumerate(table.columns)]
    lines = [[column.head for column in table.columns], marks, *table.cells]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _quoted(text: str) -> str:
    """A block of code by indentation, which no text can end, whatever a model wrote."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _rendered(chart: Chart, form: str) -> bytes:
    # Altair writes PNG as bytes, and SVG as text in some versions and as bytes in others.
    target = io.BytesIO() if form == "png" else io.StringIO()
    chart.save(target, format=form, **({"scale_factor": _PNG_SCALE} if form == "png" else {}))
    content = target.getvalue()
    return content if isinstance(content, bytes) else content.encode()
