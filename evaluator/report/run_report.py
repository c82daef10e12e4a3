"""The report of a run: what it was, its headlines, and its sections."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl

from tutelage import __version__
from tutelage.evaluator.report import run_comparisons as comparisons
from tutelage.evaluator.report import run_tables as tables
from tutelage.evaluator.report.formats import p_value, percent, signed_percent
from tutelage.evaluator.report.page import Page, Tile
from tutelage.evaluator.report.run_data import CELL, RunData, read_run
from tutelage.evaluator.report.run_sections import SECTIONS
from tutelage.evaluator.results.frames import LEFT_OUT
from tutelage.evaluator.statistics.paired import score_interval


def write_report(*, frames: Path, run_dir: Path | None, run: str | None, out: Path) -> Path:
    """Writes `out` and, beside it, `report.md`, `figures/*.svg`, `figures/*.png` and `tables/*.csv`.

    Args:
        frames: folder of the frames.
        run_dir: folder of the run, for learning curves and the teacher's counters.
        run: only rows of this run; needed if the frames hold several.
        out: the HTML file.

    Raises:
        DataError: there are no rows, or the run folder holds something unreadable.

    """
    data = read_run(frames, run_dir, run)
    sections = [section for build in SECTIONS if (section := build(data)) is not None]
    return Page("Distillation report", data.run, sections, facts(data), tiles(data)).write(out)


def facts(data: RunData) -> list[tuple[str, str]]:
    """What the run was, for the head of the page."""
    rows = data.rows
    teachers = data.summary.filter(role="teacher")["student"].unique().sort().to_list()
    decoding = rows.filter(protocol="paper")["sampling_temperature"].drop_nulls().unique().sort().to_list()
    # Rows of a teacher, or of a model whose training nobody knows, have 0 as their seed.
    trained = rows.filter(pl.col("objective") != "")
    seeds = trained["training_seed"].unique().sort()
    described = []
    for student in data.students:
        own = trained.filter(student=student)
        row = own.row(0, named=True) if len(own) else None
        noise = f", σ = {row['noise']:g}" if row and row["noise"] else ""
        described.append(f"{student} ({row['objective']}, T = {row['temperature']:g}{noise})" if row else student)
    left_out = rows["finish_reason"].is_in(LEFT_OUT).fill_null(value=False)
    counted = [f"{len(rows):,} rows", f"{int(((rows['error'] != '') & ~left_out).sum())} failed"]
    counted += [f"{int(left_out.sum())} left out by their protocol"] * bool(left_out.any())
    known = [
        ("teacher", ", ".join(teachers) or "not evaluated"),
        ("students", ", ".join(described) or "none"),
        ("tasks", ", ".join(f"{task} ({protocol})" for task, protocol in rows.select(CELL).unique().sort(CELL).rows())),
        ("items", ", ".join(counted)),
        ("prompts", ", ".join(rows["template"].unique().sort())),
        ("training seeds", ", ".join(map(str, seeds)) or "none"),
    ]
    if data.data:
        known.append(("training data", _training_data(data)))
    if decoding:
        known.append(("decoding", ", ".join("greedy" if one == 0 else f"sampled at T = {one:g}" for one in decoding)))
    return [*known, ("written", f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC by tutelage {__version__}")]


def _training_data(data: RunData) -> str:
    """How many rows each student had, how many of them were left out, and what was cut; once where all are alike."""
    texts = {}
    for student, counts in data.data.items():
        parts = [f"{counts['rows']:,} rows"]
        if counts["dropped_prompts"]:
            parts.append(f"{counts['dropped_prompts']:,} of them left out, as their prompt alone is too long")
        if counts["truncated_completions"]:
            cut, tokens = counts["truncated_completions"], counts["tokens_cut"]
            parts.append(f"{cut:,} completions cut, by {tokens:,} tokens together")
        texts[student] = ", ".join(parts)
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return "; ".join(f"{student}: {text}" for student, text in texts.items())


def tiles(data: RunData) -> list[Tile]:
    """The headlines: what each student gained on the run's one task, or else how far its held-out KL fell."""
    return _gains(data) or _distances(data)


def _gains(data: RunData) -> list[Tile]:
    """Before, after and teacher with their intervals; none if there are several tasks, or scores are no decisions."""
    changes = comparisons.changes(data)
    if data.rows.select(CELL).n_unique() > 1 or changes["gained"].null_count():
        return []
    likeness = comparisons.likeness(data)
    teachers = [f"teacher {_share(data, cell)}" for cell in data.summary.filter(role="teacher").to_dicts()]
    shown = []
    for row in changes.to_dicts():
        own = data.summary.filter(student=row["student"]).sort("evaluation_id")
        ends = [f"{role} {_share(data, own.filter(role=role).row(-1, named=True))}" for role in ("before", "after")]
        gain = f"{signed_percent(row['change'])} points ({signed_percent(row['low'])} to {signed_percent(row['high'])})"
        p = p_value(row["p_value"])
        test = f"{row['test']}, p {p if p.startswith('<') else f'= {p}'}"
        like = [f"same answer as the teacher {_agreement(likeness, row['student'])}"] * bool(teachers)
        value = f"{percent(row['before'])} → {percent(row['after'])} %"
        text = "; ".join([*ends, *teachers, f"{gain}, {test}", *like])
        shown.append(Tile(f"{row['student']}, {row['task']}, {row['items']} items", value, text))
    return shown


def _agreement(likeness: pl.DataFrame, student: str) -> str:
    """Of a student with its teacher, before → after."""
    by_role = dict(likeness.filter(student=student).select("role", "agreement").rows())
    return f"{percent(by_role.get('before'))} → {percent(by_role.get('after'))} %"


def _share(data: RunData, cell: Mapping[str, Any]) -> str:
    """An evaluation's share of right answers and its 95 % interval."""
    rows = data.rows.filter(evaluation_id=cell["evaluation_id"], task=cell["task"], protocol=cell["protocol"])
    scored = rows.drop_nulls("score").drop_nans("score")
    low, high = score_interval(scored["score"], scored["item_hash"])
    return f"{percent(float(scored['score'].to_numpy().mean()))} % ({percent(low)} to {percent(high)})"


def _distances(data: RunData) -> list[Tile]:
    if data.metrics.is_empty():
        return []
    ends = [
        (str(row["student"]), float(row[f"{tables.HELD_OUT_KL}/first"]), float(row[f"{tables.HELD_OUT_KL}/last"]))
        for row in tables.training(data).rows
        if f"{tables.HELD_OUT_KL}/first" in row
    ]
    return [
        Tile(
            student,
            f"{signed_percent((last - first) / first)[:-2]} %",
            f"held-out KL to the teacher, {first:.3f} → {last:.3f} nats a token",
        )
        for student, first, last in ends
    ]
