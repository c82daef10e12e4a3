"""The tables: numbers for people (points, with errors) and, beside the page, the same numbers as CSV."""

from __future__ import annotations

from dataclasses import dataclass, field

import polars as pl

from tutelage.evaluator.report.run_data import CELL, RunData
from tutelage.evaluator.tasks import TASKS

_ROLES = ["teacher", "before", "between", "after"]


@dataclass(frozen=True)
class Table:
    """What the page shows; `frame` is what the CSV holds. The first column names the row."""

    name: str
    columns: list[str]
    rows: list[list[str]]
    frame: pl.DataFrame = field(compare=False)


def percent(value: float | None) -> str:
    """A share as points with one decimal; a dash for none."""
    return "–" if value is None else f"{100 * value:.1f}"


def signed_points(value: float) -> str:
    """A difference of shares as points with its sign (a true minus)."""
    return f"{100 * value:+.1f}".replace("-", "−")


def p_value(value: float) -> str:
    """Two significant digits, never zero."""
    return "< 0.001" if value < 0.001 else f"{value:.2g}"


def ordered(summary: pl.DataFrame) -> pl.DataFrame:
    """Teacher first, then each student from before to after."""
    return summary.sort(
        pl.col("role").replace_strict(_ROLES, [0, 1, 1, 1]), "student", "step", *CELL, maintain_order=True
    )


def model_order(summary: pl.DataFrame) -> list[str]:
    """Labels in the order of `ordered`."""
    return ordered(summary)["label"].unique(maintain_order=True).to_list()


def scores(data: RunData) -> Table:
    """Models by tasks: mean score ± standard error in points; the number of items is in the head if one for all."""
    summary = ordered(data.summary)
    heads, cells = ["model"], summary.select(CELL).unique().sort(CELL).rows()
    columns: list[list[str]] = []
    for task, protocol in cells:
        own = summary.filter(task=task, protocol=protocol)
        counts = own["n"].unique().to_list()
        heads.append(f"{task} · {protocol}" + (f" (n = {counts[0]})" if len(counts) == 1 else ""))
        by_label = {row["label"]: _score(row, with_count=len(counts) > 1) for row in own.to_dicts()}
        chance = percent(TASKS[task].chance(protocol)) if task in TASKS else "–"
        columns.append([*(by_label.get(label, "–") for label in model_order(summary)), chance])
    rows = [list(row) for row in zip([*model_order(summary), "chance"], *columns, strict=True)]
    return Table("scores", heads, rows, summary)


def _score(row: dict[str, float], *, with_count: bool) -> str:
    if row["score"] is None:
        return f"– ({row['failed']} failed)"
    error = "" if row["standard_error"] is None else f" ± {percent(row['standard_error'])}"
    notes = [f"n = {row['n']}"] * with_count + [f"{row['failed']} failed"] * bool(row["failed"])
    return percent(row["score"]) + error + (f" ({', '.join(notes)})" if notes else "")


def extraction(data: RunData) -> Table:
    """What the extraction alone is worth: LLM-Adapters' rule against the corrected one, under `paper`."""
    summary = ordered(data.summary.filter(protocol="paper"))
    rows = [
        [
            f"{row['label']}, {row['task']}",
            percent(row["score"]),
            percent(row["score_corrected"]),
            percent(row["unparsable"] / row["n"]) if row["n"] else "–",
        ]
        for row in summary.to_dicts()
    ]
    return Table("extraction", ["evaluation", "LLM-Adapters' rule", "corrected rule", "no answer"], rows, summary)


def normalized(data: RunData) -> Table:
    """`acc` against `acc_norm`, under `loglik`."""
    summary = ordered(data.summary.filter(protocol="loglik"))
    rows = [
        [f"{row['label']}, {row['task']}", percent(row["score"]), percent(row["score_normalized"])]
        for row in summary.to_dicts()
    ]
    return Table("normalized", ["evaluation", "acc", "acc_norm"], rows, summary)


def changes(frame: pl.DataFrame) -> Table:
    """Before against after with the interval of the change."""
    rows = [
        [
            f"{row['student']}, {row['task']} · {row['protocol']}",
            percent(row["before"]),
            percent(row["after"]),
            signed_points(row["change"]),
            f"{signed_points(row['low'])} to {signed_points(row['high'])}",
            f"{row['gained']} / {row['lost']}",
            p_value(row["p_value"]),
            str(row["items"]),
        ]
        for row in frame.to_dicts()
    ]
    columns = ["student and task", "before", "after", "change", "95 % interval", "gained / lost", "McNemar p", "n"]
    return Table("changes", columns, rows, frame)


def likeness(frame: pl.DataFrame) -> Table:
    """Agreement and fidelity, evaluation by evaluation."""
    rows = [
        [
            f"{row['student']}, {'before' if row['role'] == 'before' else 'step ' + str(row['step'])}, "
            f"{row['task']} · {row['protocol']}",
            percent(row["agreement"]),
            "–" if row["kappa"] is None else f"{row['kappa']:.2f}",
            percent(row["when_teacher_right"]),
            percent(row["when_teacher_wrong"]),
            percent(row["student_unparsable"]),
            "–" if row["bleu"] is None else f"{row['bleu']:.1f}",
            "–" if row["chrf"] is None else f"{row['chrf']:.1f}",
            str(row["items"]),
        ]
        for row in frame.to_dicts()
    ]
    columns = ["student and task", "agreement", "kappa", "teacher right", "teacher wrong"]
    columns += ["no answer", "BLEU", "chrF", "n"]
    return Table("agreement", columns, rows, frame)


def training(data: RunData) -> Table:
    """First and last held-out measures of each student, and its mean seconds a step."""
    rows, records = [], []
    for (student,), steps in data.metrics.group_by(["student"], maintain_order=True):
        record = {"student": student, "steps": steps["step"].max(), **_ends(steps)}
        record["seconds_a_step"] = _seconds_a_step(steps)
        records.append(record)
        rows.append(
            [
                str(student),
                str(record["steps"]),
                _arrow(record.get("heldout/forward_kl"), "{:.3f}"),
                _arrow(record.get("heldout/top1_agreement"), "{:.1%}").replace("%", " %"),
                _arrow(record.get("train/loss"), "{:.3f}"),
                "–" if record["seconds_a_step"] is None else f"{record['seconds_a_step']:.2f}",
            ]
        )
    columns = [
        "student",
        "steps",
        "held-out KL (nats a token)",
        "held-out top-1 agreement",
        "training loss",
        "s a step",
    ]
    flat = [{key: str(value) if isinstance(value, tuple) else value for key, value in one.items()} for one in records]
    return Table("training", columns, rows, pl.DataFrame(flat, infer_schema_length=None))


def _ends(steps: pl.DataFrame) -> dict[str, tuple[float, float]]:
    """First and last value of the measures that the trainer wrote."""
    names = [name for name in ("heldout/forward_kl", "heldout/top1_agreement", "train/loss") if name in steps.columns]
    values = {name: steps.sort("step")[name].drop_nulls() for name in names}
    return {name: (float(one[0]), float(one[-1])) for name, one in values.items() if len(one)}


def _arrow(ends: tuple[float, float] | None, form: str) -> str:
    return "–" if ends is None else f"{form.format(ends[0])} → {form.format(ends[1])}"


def seconds_by_phase(metrics: pl.DataFrame) -> pl.DataFrame:
    """Mean seconds a step: `student`, `phase`, `seconds`; empty if the trainers did not time phases."""
    columns = [name for name in metrics.columns if name.startswith("seconds/")]
    if not columns:
        return pl.DataFrame(schema={"student": pl.String, "phase": pl.String, "seconds": pl.Float64})
    long = metrics.group_by("student", maintain_order=True).agg(pl.col(columns).mean()).unpivot(index="student")
    return long.select(
        "student", phase=pl.col("variable").str.strip_prefix("seconds/"), seconds=pl.col("value")
    ).drop_nulls()


def _seconds_a_step(steps: pl.DataFrame) -> float | None:
    by_phase = seconds_by_phase(steps)
    return float(by_phase["seconds"].sum()) if len(by_phase) else None


def evaluation_speed(data: RunData) -> Table:
    """How fast items were evaluated."""
    frame = ordered(data.summary).with_columns(
        items_per_second=(pl.col("n") + pl.col("failed")) / pl.col("seconds"),
        tokens_per_second=pl.col("output_tokens") / pl.col("seconds"),
    )
    rows = [
        [
            f"{row['label']}, {row['task']} · {row['protocol']}",
            f"{row['seconds']:.1f}",
            f"{row['items_per_second']:.2f}",
            f"{row['tokens_per_second']:.0f}" if row["protocol"] == "paper" else "–",
        ]
        for row in frame.to_dicts()
    ]
    return Table(
        "evaluation_speed", ["evaluation", "seconds", "items a second", "written tokens a second"], rows, frame
    )


def usage(data: RunData) -> Table:
    """What the teacher itself counted for each student."""
    assert data.usage is not None
    students = data.usage.students
    rows = [
        [one.student_id, f"{one.sequences:,}", f"{one.tokens:,}", f"{one.rows:,}", f"{one.bytes / 2**20:,.1f}"]
        for one in students
    ]
    frame = pl.DataFrame(
        {
            "student": [one.student_id for one in students],
            "sequences": [one.sequences for one in students],
            "tokens": [one.tokens for one in students],
            "rows": [one.rows for one in students],
            "bytes": [one.bytes for one in students],
        }
    )
    return Table("teacher_usage", ["student", "sequences", "tokens", "scored positions", "MiB sent"], rows, frame)
