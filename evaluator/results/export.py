"""What the rows say, for other tools: lm-evaluation-harness' files, or one table of the summaries."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl

from tutelage.errors import DataError
from tutelage.evaluator.config import ExportConfig
from tutelage.evaluator.results import lm_eval
from tutelage.evaluator.results.frames import read, summarize

_COLUMNS = ("run", "student", "step", "task", "protocol", "metric", "score", "standard_error", "n", "failed")
_FURTHER = ("unparsable", "cut_off", "join_spanned", "too_long", "score_corrected", "score_normalized")

_SCORES = ("score, %", "corrected, %", "acc_norm, %")
_HEADINGS = ("run", "student", "step", "task", "protocol", "metric", *_SCORES, "n", "failed", "cut off", "left out")


def export(config: ExportConfig) -> list[Path]:
    """Writes the files and returns them.

    Raises:
        DataError: there are no rows.

    """
    rows = read(config.frames)
    rows = rows if config.run is None else rows.filter(run=config.run)
    if rows.head(1).collect().is_empty():
        raise DataError(f"{config.frames} has no rows{f' of run {config.run}' if config.run else ''}", "frames")
    config.out.mkdir(parents=True, exist_ok=True)
    if config.format == "lm-eval":
        return _harness_files(rows, config.out)
    table = summarize(rows).select(*_COLUMNS, *_FURTHER).collect()
    path = config.out / ("scores.csv" if config.format == "csv" else "scores.md")
    path.write_text(table.write_csv() if config.format == "csv" else markdown(table), encoding="utf-8")
    return [path]


def _harness_files(rows: pl.LazyFrame, out: Path) -> list[Path]:
    """`<evaluation>/results.json` and `<evaluation>/samples_<task>.jsonl`."""
    written = []
    evaluations = rows.select("run", "evaluation_id").unique().sort("run", "evaluation_id").collect()
    for run, evaluation_id in evaluations.rows():
        frame = rows.filter(run=run, evaluation_id=evaluation_id).collect()
        folder = out / run / evaluation_id
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "results.json"
        path.write_text(json.dumps(lm_eval.results(frame), indent=2) + "\n", encoding="utf-8")
        written.append(path)
        for (task, protocol), part in frame.group_by("task", "protocol", maintain_order=True):
            path = folder / f"samples_{lm_eval.task_name(str(task), str(protocol))}.jsonl"
            path.write_text(lm_eval.as_json_lines(lm_eval.samples(part)), encoding="utf-8")
            written.append(path)
    return written


def markdown(table: pl.DataFrame) -> str:
    """A table with one line a row; scores in per cent with their standard errors, "–" where there is none."""
    lines = [f"| {' | '.join(_HEADINGS)} |", "|---" * len(_HEADINGS) + "|"]
    for row in table.to_dicts():
        error = row["standard_error"]
        score = _per_cent(row["score"]) + (f" ± {100 * error:.1f}" if error is not None else "")
        cells = [row["run"], row["student"], row["step"], row["task"], row["protocol"], row["metric"], score]
        cells += [_per_cent(row["score_corrected"]), _per_cent(row["score_normalized"]), row["n"], row["failed"]]
        cells += [row["cut_off"], row["join_spanned"] + row["too_long"]]
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _per_cent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"
