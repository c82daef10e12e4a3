"""A page of sections: as one HTML file, as Markdown, and its figures and tables as files beside both."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tutelage.evaluator.report import run_figures as figures
from tutelage.evaluator.report.run_tables import Table

_PNG_SCALE = 2


@dataclass(frozen=True)
class Figure:
    """A chart and the sentence under it."""

    name: str
    alt: str
    chart: figures.Chart
    caption: str

    @property
    def svg(self) -> Markup:
        """The chart as inline SVG; ids carry the figure's name, since a page has one space of ids."""
        svg = re.sub(r'(id="|url\(#)', rf"\g<1>{self.name}-", _rendered(self.chart, "svg").decode())
        return Markup(svg)  # noqa: S704 -- made by vl-convert, which escapes the labels


@dataclass(frozen=True)
class Section:
    """A heading, what to see there, figures, tables with their captions."""

    title: str
    text: str = ""
    figures: Sequence[Figure] = ()
    tables: Sequence[tuple[Table, str]] = ()
    samples: Sequence[dict[str, Any]] = field(default_factory=list)


def html_page(
    title: str, facts: Sequence[tuple[str, str]], tiles: Sequence[dict[str, str]], sections: Sequence[Section]
) -> str:
    """The page as one file without scripts or references; every text is escaped."""
    environment = Environment(
        loader=PackageLoader("tutelage.evaluator.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    template = environment.get_template("report.html.jinja")
    return template.render(run=title, facts=facts, tiles=tiles, sections=sections)


def markdown_page(title: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section]) -> str:
    """The page as GitHub-flavoured Markdown; figures are references to the files of `write_besides`."""
    parts = [f"# {title}", "\n".join(f"- {name}: {value}" for name, value in facts)]
    for section in sections:
        parts += [f"## {section.title}", *([section.text] if section.text else [])]
        for figure in section.figures:
            parts += [f"![{figure.alt}](figures/{figure.name}.png)", figure.caption]
        for table, caption in section.tables:
            parts += [_markdown_table(table), caption]
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Table) -> str:
    rows = [table.columns, ["---"] + ["---:"] * (len(table.columns) - 1), *table.rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def write_besides(sections: Sequence[Section], folder: Path) -> None:
    """Writes `figures/*.svg`, `figures/*.png` and `tables/*.csv` into a folder."""
    (folder / "figures").mkdir(exist_ok=True)
    (folder / "tables").mkdir(exist_ok=True)
    for section in sections:
        for figure in section.figures:
            for form in ("svg", "png"):
                (folder / "figures" / f"{figure.name}.{form}").write_bytes(_rendered(figure.chart, form))
        for table, _ in section.tables:
            table.frame.write_csv(folder / "tables" / f"{table.name}.csv")


def _rendered(chart: figures.Chart, form: str) -> bytes:
    target = io.BytesIO() if form == "png" else io.StringIO()
    chart.save(target, format=form, **({"scale_factor": _PNG_SCALE} if form == "png" else {}))
    content = target.getvalue()
    return content if isinstance(content, bytes) else content.encode()
