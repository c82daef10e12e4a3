"""What a report is made of: rows of the frames, the trainers' metrics, the teacher's own counters."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import polars as pl
from google.protobuf import json_format

from tutelage.errors import DataError
from tutelage.evaluator.results.frames import chance_levels, naming_unreadable, read, summarize, without_scores
from tutelage.evaluator.statistics.paired import score_interval
from tutelage.evaluator.tasks import TASKS
from tutelage.evaluator.tasks.base import default_data_dir
from tutelage.rpc.v1 import teacher_pb2

CELL = ["task", "protocol"]


@dataclass(frozen=True)
class RunData:
    """Everything that the sections read.

    Attributes:
        rows: one row an item, of one run.
        summary: one row an evaluation, task and protocol, with `role`, `label`, `outputs`, `outputs_cut_off`, `low`,
            `high` (the 95 % interval of `score`, null where there is none).
        metrics: one row a student and training step; empty without a run folder.
        usage: the teacher's counters, if it left them.
        data: by student what its data's length cost, as its trainer counted it; empty without a run folder.
        preflight: what was found of each student before its first step: student, topic, state, text.
        chance: what guessing scores, by task and protocol; of a task of one's own as its file says.

    """

    run: str
    rows: pl.DataFrame
    summary: pl.DataFrame
    metrics: pl.DataFrame
    usage: teacher_pb2.GetTeacherUsageResponse | None
    data: dict[str, dict[str, int]]
    preflight: tuple[dict[str, str], ...]
    chance: dict[tuple[str, str], float]

    @property
    def students(self) -> list[str]:
        """Names of the students, sorted."""
        evaluated = self.summary.filter(role="teacher")["student"].to_list()
        names = {*self.rows["student"], *(self.metrics["student"] if len(self.metrics) else [])}
        return sorted(names - set(evaluated))


def read_run(frames: Path, run_dir: Path | None, run: str | None) -> RunData:
    """Reads all of it.

    Raises:
        DataError: there are no rows, no score in any, rows of several runs and none is named, or a file of the run that
            cannot be read.

    """
    lazy = read(frames)
    with naming_unreadable(frames):
        runs = lazy.select(pl.col("run").unique().sort()).collect()["run"].to_list()
    if run is None and len(runs) > 1:
        raise DataError(f"{frames} has rows of several runs ({', '.join(runs)}); name one by --run", "run")
    if not runs or (run is not None and run not in runs):
        raise DataError(
            f"{frames} has no rows{' of run ' + run if run else ''}; `tutelage evaluate` writes some", "frames"
        )
    rows = lazy.filter(run=run or runs[0]).collect()
    unscored = without_scores(rows.lazy())
    if len(unscored) == rows.select("evaluation_id", *CELL).n_unique():
        raise DataError(f"{frames} has rows, and no score: {'; '.join(unscored)}", "frames")
    if run_dir and not run_dir.is_dir():
        raise DataError(f"{run_dir} is not a folder; name the one that `tutelage train` wrote its run to", "run_dir")
    usage, path = None, run_dir and run_dir / "teacher_usage.json"
    if path and path.exists():
        try:
            # A teacher of another version may have counted what this one does not know.
            usage = json_format.Parse(
                path.read_text(encoding="utf-8"), teacher_pb2.GetTeacherUsageResponse(), ignore_unknown_fields=True
            )
        except json_format.ParseError as error:
            raise DataError(f"{path} is not a GetTeacherUsageResponse ({error})", "run_dir") from error
    return RunData(
        run=run or runs[0],
        rows=rows,
        summary=with_intervals(with_outputs(with_roles(summarize(rows.lazy()).collect()), rows), rows),
        metrics=read_metrics(run_dir) if run_dir else pl.DataFrame(),
        usage=usage,
        data=read_data_counts(run_dir) if run_dir else {},
        preflight=read_preflight(run_dir) if run_dir else (),
        chance=_known_chance() | chance_levels(frames, run or runs[0]),
    )


def _known_chance() -> dict[tuple[str, str], float]:
    return {(task.name, protocol): task.chance(protocol) for task in TASKS.values() for protocol in task.protocols}


def with_roles(summary: pl.DataFrame) -> pl.DataFrame:
    """Adds `role` (teacher; before, between or after training) and `label`, which names a row for people.

    A teacher's rows name neither a teacher nor an objective; those of a student that no teacher taught, or whose
    evaluation did not name it, have an objective. A student's first step in the frames is "before" if it is 0, its last
    step "after" if it is not 0.
    """
    first, last, step = pl.col("step").min().over("student"), pl.col("step").max().over("student"), pl.col("step")
    role = (
        pl.when((pl.col("teacher") == "") & (pl.col("objective") == ""))
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


def with_outputs(summary: pl.DataFrame, rows: pl.DataFrame) -> pl.DataFrame:
    """Adds `outputs`, how many texts were written, and `outputs_cut_off`, how many reached the limit of new tokens.

    The summary's own `cut_off` counts items: under `open` one with five answers counts if any of them was cut off.
    """
    keys = ["evaluation_id", *CELL]
    written = rows.filter(pl.col("finish_reason").is_in(["stop", "length"])).group_by(keys)
    counts = written.agg(outputs=pl.len(), outputs_cut_off=(pl.col("finish_reason") == "length").sum())
    return summary.join(counts, on=keys, how="left", maintain_order="left").with_columns(
        pl.col("outputs", "outputs_cut_off").fill_null(0)
    )


def with_intervals(summary: pl.DataFrame, rows: pl.DataFrame) -> pl.DataFrame:
    """Adds `low` and `high`, the interval of `paired.score_interval`: items that share a text are one cluster."""
    keys = ["evaluation_id", *CELL]
    scored = rows.filter(error="").drop_nulls("score").drop_nans("score")
    found = [
        dict(zip(keys, key, strict=True))
        | dict(zip(("low", "high"), score_interval(own["score"], own["item_hash"]), strict=True))
        for key, own in scored.group_by(keys)
    ]
    schema = {**dict.fromkeys(keys, pl.String), "low": pl.Float64, "high": pl.Float64}
    return summary.join(pl.DataFrame(found, schema=schema), on=keys, how="left", maintain_order="left")


def read_metrics(run_dir: Path) -> pl.DataFrame:
    """All `students/<student>/metrics.jsonl` of a run, one row a step, with `student`.

    A last line that is not whole (the trainer is writing) is left out.
    """
    rows = []
    for path in sorted(run_dir.glob("students/*/metrics.jsonl")):
        # Not `splitlines`, which also splits at U+2028. The last piece is empty, or what the trainer is writing now.
        try:
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
        except ValueError as error:  # of either kind: no UTF-8, no JSON
            raise DataError(f"{path} has a line that is not JSON in UTF-8 ({error})", "run_dir") from error
        rows += [{**line, "student": path.parent.name} for line in lines]
    return pl.DataFrame(rows, infer_schema_length=None) if rows else pl.DataFrame()


def read_preflight(run_dir: Path) -> tuple[dict[str, str], ...]:
    """What was found of each student before its first step, by its training and of the run's tasks.

    Returns:
        student, topic, state, text, in the order of the students' names.

    """
    found = {
        path.parent.name: json.loads(path.read_text(encoding="utf-8"))
        for path in run_dir.glob("students/*/preflight.json")
    }
    of_tasks = run_dir / "preflight.json"
    if of_tasks.exists():
        for student, findings in json.loads(of_tasks.read_text(encoding="utf-8")).items():
            found.setdefault(student, []).extend(findings)
    keys = ("topic", "state", "text")
    return tuple(
        {"student": student, **{key: finding[key] for key in keys}}
        for student, findings in sorted(found.items())
        for finding in findings
    )


def read_data_counts(run_dir: Path) -> dict[str, dict[str, int]]:
    """All `students/<student>/data.json` of a run, by student.

    Raises:
        DataError: one cannot be read.

    """
    counts = {}
    for path in sorted(run_dir.glob("students/*/data.json")):
        try:
            counts[path.parent.name] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path} is not JSON ({error})", "run_dir") from error
    return counts


def questions(task: str) -> dict[str, str]:
    """Questions of a task by the items' hashes; empty if its data is not here, since rows hold only the hashes."""
    known, data_dir = TASKS.get(task), default_data_dir()
    if known is None or known.missing(data_dir):
        return {}
    return {item.item_hash: item.instruction for item in known.items(data_dir)}
