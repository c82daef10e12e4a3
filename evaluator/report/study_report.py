"""The report of a study: what each claim looks like at this size, and everything that the verdicts are read from."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import polars as pl

from tutelage import __version__
from tutelage.evaluator.report.page import Page
from tutelage.evaluator.report.study_data import StudyData, read_study
from tutelage.evaluator.report.study_sections import SECTIONS, results_of


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
    found = results_of(data)
    sections = [section for build in SECTIONS if (section := build(data, found)) is not None]
    return Page("Distillation study", data.name, sections, facts(data)).write(out)


def facts(data: StudyData) -> list[tuple[str, str]]:
    """What the study was, for the head of the page."""
    rows, cells = data.rows, data.cells
    seeds = sorted(cells.filter(role="student")["seed"].unique().to_list())
    decoding = rows["sampling_temperature"].drop_nulls().unique().sort().to_list()
    items = rows.group_by("task").agg(pl.col("item_id").n_unique()).sort("task")
    sizes = {row["model"]: row["parameters"] for row in cells.to_dicts()}
    return [
        ("models", ", ".join(f"{name} ({size:,} parameters)" for name, size in sizes.items())),
        ("cells", f"{int(cells['scored'].sum())} of {len(cells)} scored"),
        ("seeds", ", ".join(map(str, seeds))),
        ("tasks", ", ".join(f"{task} ({count} items)" for task, count in items.rows())),
        ("protocol", ", prompt ".join(", ".join(rows[name].unique().sort()) for name in ("protocol", "template"))),
        ("decoding", ", ".join("greedy" if one == 0 else f"sampled at T = {one:g}" for one in decoding)),
        (
            "rows",
            f"{len(rows):,}, one an item and evaluation"
            + (f"; {data.left_out} items have no score and are left out" if data.left_out else ""),
        ),
        ("written", f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC by tutelage {__version__}"),
    ]
