"""What a study's report is made of: `study.json` (which cell is what), the frames, the trainers' metrics, counters.

Only cells that are scored are in it; the report says how many of how many.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from tutelage.errors import DataError, NotFound
from tutelage.evaluator.report.run_data import read_metrics, read_preflight
from tutelage.evaluator.results.frames import LEFT_OUT, naming_unreadable, read
from tutelage.evaluator.statistics.planned_comparisons import ITEMS, Comparison, rows_with
from tutelage.evaluator.tasks import task_of_name

_CELL = ["cell", "role", "method", "parameters"]
_MEASURES = {"acc": "accuracy", "rougeL": "ROUGE-L"}
_COLUMNS = {"method": "objective", "teacher": "teacher", "temperature": "temperature", "noise": "noise"}


@dataclass(frozen=True)
class StudyData:
    """A study and its rows.

    Attributes:
        name: of the study.
        left_out: items without a score in any evaluation: without a reference, or left out by their protocol.
        cells: one row a declared cell: what it is, as the study wrote it, and `scored`.
        rows: one row an item of the scored cells: the frames' columns and `cell`, `role`, `method`, `parameters`.
        comparisons: as declared.
        claims: as declared.
        teachers: name to cell id and whether it was fine-tuned; the first is the study's default.
        metrics: one row a training step, with the columns of `cells`; empty if there is none.
        usage: what the teachers counted, one entry a start.
        preflight: what was found of each cell before its first step: student (the cell), topic, state, text.

    """

    name: str
    left_out: int
    cells: pl.DataFrame
    rows: pl.DataFrame
    comparisons: tuple[Comparison, ...]
    claims: tuple[dict[str, Any], ...]
    teachers: dict[str, dict[str, Any]]
    metrics: pl.DataFrame
    usage: tuple[dict[str, Any], ...]
    preflight: tuple[dict[str, str], ...]

    @property
    def main(self) -> pl.DataFrame:
        """Scored students at T = 1 without noise: fine-tuned ones, and those of the default teacher; no controls."""
        of_default = pl.col("teacher").is_in(["", *list(self.teachers)[:1]])
        plain = (pl.col("temperature") == 1.0) & (pl.col("noise") == 0.0)
        return self.cells.filter(
            pl.col("role") == "student", pl.col("scored"), plain, of_default, pl.col("control_of") == ""
        )

    @property
    def students(self) -> list[str]:
        """Students' models, the smallest first."""
        own = self.cells.filter(role="student").unique("model").sort("parameters")
        return own["model"].to_list()

    @property
    def methods(self) -> list[str]:
        """Methods in the order of the study file."""
        return self.cells.filter(role="student")["method"].unique(maintain_order=True).to_list()

    @property
    def fine_tuning(self) -> str:
        """The method that others are compared with: the first that needs no teacher and that none starts from."""
        own = self.main.filter(pl.col("teacher") == "")
        starts = self.cells["start"].unique().to_list()
        first = own.filter(~pl.col("cell").is_in(starts))
        return next(iter((first if len(first) else own)["method"].to_list()), "")

    @property
    def measure(self) -> str:
        """What the mean scores are called, for people: the metric that all rows share, else a score."""
        names = {_MEASURES.get(metric, metric) for metric in self.rows["metric"].unique()}
        return str(names.pop()) if len(names) == 1 else "score"

    def items(self) -> pl.DataFrame:
        """Students' rows as `ITEMS`, each training a `seed` of its own, so that sizes can be pooled.

        An item of two students is one cluster: they answered the same question. An item that was answered several
        times (protocol `open`) is the mean of its answers.
        """
        # A comparison knows one column of runs, and models of different sizes were trained with the same seeds.
        runs = (pl.col("student") + "/" + pl.col("training_seed").cast(pl.String)).rank("dense")
        answers = self.rows.filter(role="student").select(
            pl.when(pl.col("teacher") != "").then(pl.col("teacher")).alias("teacher"),
            "student",
            pl.col("method").alias("objective"),
            "temperature",
            "noise",
            runs.cast(pl.Int64).alias("seed"),
            "task",
            "item_id",
            pl.col("item_hash").alias("cluster"),
            "score",
            "evaluation_id",
        )
        # By evaluation too: two evaluations of one training must not be averaged away, but refused by `pair_items`.
        keys = [name for name in answers.columns if name != "score"]
        means = answers.group_by(keys, maintain_order=True).agg(pl.col("score").mean())
        return means.drop("evaluation_id").match_to_schema(ITEMS)

    def scores(self) -> pl.DataFrame:
        """One row a scored cell and task, and the unweighted mean of the tasks as `Average`; `score` in percent."""
        keys = ["cell", "role", "student", "parameters", "method", "teacher", "temperature", "noise", "training_seed"]
        by_task = self.rows.group_by(*keys, "task", maintain_order=True).agg(score=100 * pl.col("score").mean())
        average = by_task.group_by(keys, maintain_order=True).agg(
            pl.lit("Average").alias("task"), pl.col("score").mean()
        )
        return pl.concat([by_task, average.select(by_task.columns)])


def read_study(folder: Path, frames: Path) -> StudyData:
    """Reads a study.

    Args:
        folder: the study's, with `study.json`, `students/` and `usage/`.
        frames: folder of the frames.

    Raises:
        DataError: there is no description, nothing is scored yet, or an item failed.

    """
    try:
        declared = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} is not the folder of a study ({error}); run it first", "study") from error
    absent = {"name", "cells", "comparisons", "claims", "teachers"} - set(declared)
    if absent or not declared["cells"]:
        lacks = ", ".join(sorted(absent)) or "cells"
        raise DataError(f"{folder / 'study.json'} lacks {lacks}; `tutelage study run` writes it", "study")
    # An earlier version wrote neither what a cell starts from nor of what it is a control.
    described = [{"start": "", "control_of": "", **cell} for cell in declared["cells"]]
    cells = pl.DataFrame(described).rename({"id": "cell"})
    with naming_unreadable(frames):
        rows = read(frames).filter(pl.col("evaluation_id").is_in(cells["evaluation_id"].to_list())).collect()
    if rows.is_empty():
        raise DataError(f"{frames} has no row of the study in {folder} yet; let a cell be finished", "frames")
    # What a protocol leaves out of one evaluation, and an open question without a reference, has no score to compare.
    without = rows.filter(pl.col("finish_reason").is_in(LEFT_OUT) | (pl.col("error") == "") & pl.col("score").is_null())
    rows = rows.join(without.select("task", "item_id").unique(), on=["task", "item_id"], how="anti")
    failed = rows.filter(pl.col("error") != "")
    if len(failed):
        raise DataError(f"{len(failed)} items failed, the first with {failed['error'][0]}; score them again", "frames")
    if rows.is_empty():
        raise DataError(f"no item in {frames} has a score, so nothing of the study can be compared", "frames")
    scored = rows["evaluation_id"].unique().to_list()

    def side(declared: dict[str, Any], name: str) -> dict[str, Any]:
        tasks = declared.get("tasks")  # a version that knew none may have run it
        columns: dict[str, Any] = {_COLUMNS[key]: value for key, value in declared[name].items()}
        columns |= {"student": declared["students"]} if declared["students"] else {}
        return columns | ({"task": [_as_in_rows(one) for one in tasks]} if tasks else {})

    metrics = read_metrics(folder)
    if len(metrics):
        metrics = metrics.rename({"student": "cell"}).join(cells, on="cell")
    return StudyData(
        name=declared["name"],
        left_out=without.select("task", "item_id").n_unique(),
        cells=cells.with_columns(scored=pl.col("evaluation_id").is_in(scored)),
        rows=rows.join(cells.select("evaluation_id", *_CELL), on="evaluation_id"),
        comparisons=tuple(
            Comparison(one["name"], one["family"], side(one, "first"), side(one, "second"), one["margin"])
            for one in declared["comparisons"]
        ),
        claims=tuple(declared["claims"]),
        teachers=declared["teachers"],
        metrics=metrics,
        usage=tuple(json.loads(path.read_text()) for path in sorted((folder / "usage").glob("*.json"))),
        preflight=tuple(found for found in read_preflight(folder) if found["student"] in set(cells["cell"])),
    )


def _as_in_rows(task: str) -> str:
    """What rows call a task that a study may name in any case, or as lm-evaluation-harness does."""
    try:
        return task_of_name(task).name
    except NotFound:
        return task  # one's own


def complete(data: StudyData, comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Comparisons of which both sides are scored; the others have to wait."""
    items = data.items()

    def runs(chosen: Mapping[str, Any]) -> set[tuple[Any, ...]]:
        return set(rows_with(items, chosen).select("seed", "task").unique().rows())

    return [one for one in comparisons if (first := runs(one.first)) and first == runs(one.second)]
