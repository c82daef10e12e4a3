"""Tables with a heading and a caption, and their rendering as Markdown and as one HTML file."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl


@dataclass(frozen=True)
class Section:
    """One table of a report: `name` is its file name, `caption` says n, test and what to read."""

    name: str
    title: str
    caption: str
    table: pl.DataFrame


def render_markdown(title: str, sections: Sequence[Section]) -> str:
    """The sections as GitHub-flavoured Markdown."""
    parts = [f"# {title}"]
    for section in sections:
        parts += [f"## {section.title}", section.caption, _markdown_table(section.table)]
    return "\n\n".join(parts) + "\n"


def render_html(title: str, sections: Sequence[Section]) -> str:
    """The sections as one HTML file without scripts or references; every text is escaped."""
    contents = "".join(f'<li><a href="#{s.name}">{html.escape(s.title)}</a></li>' for s in sections)
    body = "".join(
        f'<section id="{section.name}"><h2>{html.escape(section.title)}</h2><p>{html.escape(section.caption)}</p>'
        f'<div class="scroll">{_html_table(section.table)}</div></section>'
        for section in sections
    )
    heading = html.escape(title)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{heading}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
        f"<body><h1>{heading}</h1><nav><ol>{contents}</ol></nav>{body}</body></html>\n"
    )


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 1rem; color: #1a1a1a }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .85rem }
th, td { padding: .25rem .6rem; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top }
th { border-bottom: 2px solid #555 }
td.number { text-align: right; font-variant-numeric: tabular-nums }
section { break-inside: avoid }
@media print { nav { display: none } body { max-width: none } }
"""


def _cell(column: str, value: object) -> str:
    if value is None:
        return "–"
    if not isinstance(value, float):
        return str(value)
    if column.startswith("p_"):
        return f"{value:.3g}"
    return f"{value:g}" if column == "temperature" else f"{value:.4f}" if "rho" in column else f"{value:.2f}"


def _markdown_table(table: pl.DataFrame) -> str:
    if table.is_empty():
        return "None."
    lines = ["| " + " | ".join(table.columns) + " |", "|" + "---|" * table.width]
    for row in table.iter_rows():
        cells = [_cell(*pair).replace("|", "\\|") for pair in zip(table.columns, row, strict=True)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _html_table(table: pl.DataFrame) -> str:
    if table.is_empty():
        return "<p>None.</p>"
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    numbers = {column for column, kind in table.schema.items() if kind.is_numeric()}
    rows = (
        "".join(
            f"<td{' class=number' if column in numbers else ''}>{html.escape(_cell(column, value))}</td>"
            for column, value in zip(table.columns, row, strict=True)
        )
        for row in table.iter_rows()
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(f'<tr>{row}</tr>' for row in rows)}</tbody></table>"
