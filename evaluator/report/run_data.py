"""What a report is made of: rows of the frames, the trainers' metrics, the teacher's own counters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import polars as pl
from google.protobuf import json_format

from tutelage.errors import DataError
from tutelage.evaluator.results.frames import read, summarize
from tutelage.rpc.v1 import teacher_pb2

CELL = ["task", "protocol"]


@dataclass(frozen=True)
class RunData:
    """Everything that the sections read.

    Attributes:
        rows: one row an item, of one run.
        summary: one row an evaluation, task and protocol, with `model`, `role`, `label`.
        metrics: one row a student and training step; empty without a run folder.
        usage: the teacher's counters, if it left them.

    """

    run: str
    rows: pl.DataFrame
    summary: pl.DataFrame
    metrics: pl.DataFrame
    usage: teacher_pb2.GetTeacherUsageResponse | None

    @property
    def students(self) -> list[str]:
        """Names of the students, sorted."""
        evaluated = self.summary.filter(role="teacher")["student"].to_list()
        names = {*self.rows["student"], *(self.metrics["student"] if len(self.metrics) else [])}
        return sorted(names - set(evaluated))

    def evaluation(self, **filters: object) -> pl.DataFrame:
        """The rows of one task under one protocol of one model; empty if there are none."""
        return self.rows.filter(**filters)


def read_run(frames: Path, run_dir: Path | None, run: str | None) -> RunData:
    """Reads all of it.

    Raises:
        DataError: there are no rows, or rows of several runs and none is named.

    """
    lazy = read(frames)
    runs = lazy.select(pl.col("run").unique().sort()).collect()["run"].to_list()
    if run is None and len(runs) > 1:
        raise DataError(f"{frames} has rows of several runs ({', '.join(runs)}); name one by --run", "run")
    if not runs or (run is not None and run not in runs):
        raise DataError(f"{frames} has no rows{' of run ' + run if run else ''}; evaluate something first", "frames")
    rows = lazy.filter(run=run or runs[0]).collect()
    return RunData(
        run=run or runs[0],
        rows=rows,
        summary=_with_roles(summarize(rows.lazy()).collect()),
        metrics=read_metrics(run_dir) if run_dir else pl.DataFrame(),
        usage=_read_usage(run_dir / "teacher_usage.json") if run_dir else None,
    )


def _with_roles(summary: pl.DataFrame) -> pl.DataFrame:
    """Adds `role` (teacher; before, between or after training) and `label`, which names a row for people.

    A teacher's rows name no teacher. A student's first step in the frames is "before" if it is 0, its last
    step "after" if it is not 0.
    """
    first, last, step = pl.col("step").min().over("student"), pl.col("step").max().over("student"), pl.col("step")
    role = (
        pl.when(pl.col("teacher") == "")
        .then(pl.lit("teacher"))
        .when((step == first) & (step == 0))
        .then(pl.lit("before"))
        .when(step == last)
        .then(pl.lit("after"))
        .otherwise(pl.lit("between"))
    )
    label = (
        pl.when(pl.col("role") == "teacher")
        .then(pl.format("{} (teacher)", "student"))
        .when(pl.col("role") == "before")
        .then(pl.format("{}, before", "student"))
        .otherwise(pl.format("{}, step {}", "student", "step"))
    )
    return summary.with_columns(role=role).with_columns(label=label)


def read_metrics(run_dir: Path) -> pl.DataFrame:
    """All `students/<student>/metrics.jsonl` of a run, one row a step, with `student`.

    A last line that is not whole (the trainer is writing) is left out.
    """
    rows = []
    for path in sorted(run_dir.glob("students/*/metrics.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                rows.append({**_parsed(line, path), "student": path.parent.name})
    return pl.DataFrame(rows, infer_schema_length=None) if rows else pl.DataFrame()


def _parsed(line: str, path: Path) -> Mapping[str, float | int | str]:
    try:
        row: Mapping[str, float | int | str] = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path} has a line that is not JSON ({error})", "run_dir") from error
    return row


def _read_usage(path: Path) -> teacher_pb2.GetTeacherUsageResponse | None:
    """The answer of `GetTeacherUsage` as JSON, if the file is there."""
    if not path.exists():
        return None
    try:
        return json_format.Parse(path.read_text(encoding="utf-8"), teacher_pb2.GetTeacherUsageResponse())
    except json_format.ParseError as error:
        raise DataError(f"{path} is not a GetTeacherUsageResponse ({error})", "run_dir") from error
