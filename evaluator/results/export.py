"""What the rows say, for other tools: lm-evaluation-harness' files, or one table of the summaries."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from tutelage.errors import DataError
from tutelage.evaluator.config import ExportConfig
from tutelage.evaluator.results import lm_eval
from tutelage.evaluator.results.frames import frame_path, naming_unreadable, read, summarize
from tutelage.evaluator.tasks import TASKS, task_of_name
from tutelage.evaluator.tasks.base import default_data_dir

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
    with naming_unreadable(config.frames):
        empty = rows.select("run").collect().is_empty()
    if empty:
        raise DataError(f"{config.frames} has no rows{f' of run {config.run}' if config.run else ''}", "frames")
    config.out.mkdir(parents=True, exist_ok=True)
    if config.format == "lm-eval":
        return _harness_files(rows, config)
    table = summarize(rows).select(*_COLUMNS, *_FURTHER).collect()
    path = config.out / ("scores.csv" if config.format == "csv" else "scores.md")
    path.write_text(table.write_csv() if config.format == "csv" else markdown(table), encoding="utf-8")
    return [path]


def _harness_files(rows: pl.LazyFrame, config: ExportConfig) -> list[Path]:
    """As the harness lays out the files of each evaluation."""
    own = [task_of_name(name.strip()) for name in config.tasks.split(",") if name.strip()]
    tasks = {**TASKS, **{task.name: task for task in own}}
    data_dir = config.data_dir or default_data_dir()
    keys = ["run", "evaluation_id"]
    evaluations = rows.select(*keys, "task", "protocol").unique().sort(pl.all()).collect()
    written = []
    for (run, evaluation_id), part in evaluations.group_by(keys, maintain_order=True):
        files = [
            frame_path(config.frames, str(run), task, str(evaluation_id), protocol)
            for task, protocol in part.select("task", "protocol").rows()
        ]
        written += lm_eval.write(files, config.out, tasks, data_dir)
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
