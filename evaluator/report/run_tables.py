"""The tables of a run: each keeps its numbers, shows them in points with their errors, and says what to read."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import polars as pl

from tutelage.evaluator.report.formats import NONE, decimals, p_value, percent, signed_percent
from tutelage.evaluator.report.page import Column, Table, column
from tutelage.evaluator.report.run_data import CELL, RunData
from tutelage.evaluator.results.frames import LEFT_OUT

_ROLES = ["teacher", "before", "between", "after"]
HELD_OUT_KL, HELD_OUT_TOP1, LOSS = "heldout/forward_kl", "heldout/top1_agreement", "train/loss"


def ordered(summary: pl.DataFrame) -> pl.DataFrame:
    """Teacher first, then each student from before to after."""
    return summary.sort(
        pl.col("role").replace_strict(_ROLES, [0, 1, 1, 1]), "student", "step", *CELL, maintain_order=True
    )


def model_order(summary: pl.DataFrame) -> list[str]:
    """Labels in the order of `ordered`."""
    return ordered(summary)["label"].unique(maintain_order=True).to_list()


def scores(data: RunData) -> Table:
    """Models by tasks: mean score and its interval in points; the number of items is in the head if one for all."""
    summary = ordered(data.summary)
    columns = [column("model", "model")]
    rows: dict[str, dict[Any, Any]] = {name: {"model": name} for name in [*model_order(summary), "chance"]}
    for task, protocol in summary.select(CELL).unique().sort(CELL).rows():
        own = summary.filter(task=task, protocol=protocol)
        counts = own["n"].unique().to_list()
        key = f"{task} · {protocol}"
        head = key + (f" (n = {counts[0]})" if len(counts) == 1 else "")
        columns.append(column(head, key, _score_with_count if len(counts) > 1 else _score))
        for row in own.to_dicts():
            rows[row["label"]][key] = row
        if (task, protocol) in data.chance:
            chance = data.chance[task, protocol]
            rows["chance"][key] = {"score": chance, "low": None, "n": None, "failed": 0}
    caption = (
        "Mean score in points and its 95 % interval over items (exact, Clopper & Pearson, where items are right or "
        "wrong and independent); n is the number of items; chance is uniform guessing; left out: items that the "
        "protocol does not ask. "
        "paper: zero-shot generation, LLM-Adapters' extraction, accuracy. loglik: lm-evaluation-harness' acc."
    )
    return Table("scores", columns, list(rows.values()), summary, caption)


def _score_with_count(row: Mapping[str, Any]) -> str:
    return _score(row, with_count=row["n"] is not None)


def _score(row: Mapping[str, Any], *, with_count: bool = False) -> str:
    if row["score"] is None and row["failed"]:
        return f"{NONE} ({row['failed']} failed)"
    left_out = sum(row.get(reason) or 0 for reason in LEFT_OUT)
    notes = [] if row["low"] is None else [f"{percent(row['low'])} to {percent(row['high'])}"]
    notes += [f"n = {row['n']}"] * with_count + [f"{row['failed']} failed"] * bool(row["failed"])
    notes += [f"{left_out} left out"] * bool(left_out)
    return percent(row["score"]) + (f" ({', '.join(notes)})" if notes else "")


def extraction(data: RunData) -> Table:
    """What the extraction alone is worth: LLM-Adapters' rule against the corrected one, under `paper`."""
    summary = ordered(data.summary.filter(protocol="paper"))
    columns = [
        Column("evaluation", lambda row: f"{row['label']}, {row['task']}"),
        column("LLM-Adapters' rule", "score", percent),
        column("corrected rule", "score_corrected", percent),
        Column("no answer", lambda row: percent(row["unparsable"] / row["n"]) if row["n"] else NONE),
    ]
    caption = (
        "Accuracy in points of the same outputs under LLM-Adapters' extraction and under a corrected one, and the "
        "share of outputs in which LLM-Adapters' rule finds no answer."
    )
    return Table("extraction", columns, summary.to_dicts(), summary, caption)


def normalized(data: RunData) -> Table:
    """`acc` against `acc_norm`, under `loglik`."""
    summary = ordered(data.summary.filter(protocol="loglik"))
    columns = [
        Column("evaluation", lambda row: f"{row['label']}, {row['task']}"),
        column("acc", "score", percent),
        column("acc_norm", "score_normalized", percent),
    ]
    caption = "Accuracy in points by sum of log-probabilities (acc) and by sum per character (acc_norm)."
    return Table("normalized", columns, summary.to_dicts(), summary, caption)


def cut_off(data: RunData) -> Table:
    """How many outputs ended at the limit of new tokens, and so perhaps before their answer."""
    summary = ordered(data.summary.filter(pl.col("protocol") != "loglik"))
    columns = [
        Column("evaluation", lambda row: f"{row['label']}, {row['task']}"),
        Column("cut off", lambda row: percent(row["outputs_cut_off"] / row["outputs"]) if row["outputs"] else NONE),
        column("outputs", "outputs"),
    ]
    caption = "Percent of the outputs that reached the limit of new tokens before the model ended them."
    return Table("cut_off", columns, summary.to_dicts(), summary, caption)


def changes(frame: pl.DataFrame) -> Table:
    """Before against after with the interval of the change, from `run_comparisons.changes`."""

    def gained_and_lost(row: Mapping[str, Any]) -> str:
        return NONE if row["gained"] is None else f"{row['gained']} / {row['lost']}"

    columns = [
        Column("student and task", lambda row: f"{row['student']}, {row['task']} · {row['protocol']}"),
        column("before", "before", percent),
        column("after", "after", percent),
        column("change", "change", signed_percent),
        Column("95 % interval", lambda row: f"{signed_percent(row['low'])} to {signed_percent(row['high'])}"),
        Column("gained / lost", gained_and_lost),
        Column("p", lambda row: p_value(row["p_value"]) + (" (t)" if row["test"] == "t" else "")),
        column("n", "items"),
    ]
    caption = (
        "Points. The interval is Student's t over items (those with the same text are one cluster), widened as Bonett "
        "& Price do for few or rare differences; where all items change alike it is exact. Gained and lost count items "
        "right only after and only before; p is McNemar's exact two-sided test, or (t) the t-test where scores are not "
        "right or wrong; not adjusted for several comparisons. One training seed a student: the interval says nothing "
        "about other seeds."
    )
    return Table("changes", columns, frame.to_dicts(), frame, caption)


def likeness(frame: pl.DataFrame) -> Table:
    """Agreement and fidelity, evaluation by evaluation, from `run_comparisons.likeness`."""

    def label(row: Mapping[str, Any]) -> str:
        when = "before" if row["role"] == "before" else f"step {row['step']}"
        return f"{row['student']}, {when}, {row['task']} · {row['protocol']}"

    columns = [
        Column("student and task", label),
        column("agreement", "agreement", percent),
        column("kappa", "kappa", decimals(2)),
        column("teacher right", "when_teacher_right", percent),
        column("teacher wrong", "when_teacher_wrong", percent),
        column("no answer", "student_unparsable", percent),
        column("BLEU", "bleu", decimals(1)),
        column("chrF", "chrf", decimals(1)),
        column("n", "items"),
    ]
    frame = frame.drop_nulls("agreement")
    texts = frame.drop_nulls("bleu")
    signature = f" BLEU: sacreBLEU, {texts['signature'][0]}." if len(texts) else ""
    caption = (
        "Points. Teacher right and wrong: agreement among the items that the teacher gets right and the others. An "
        "output without an answer agrees with nothing; the student's share of them is given. Kappa is Cohen's, among "
        "items where both answered. BLEU and chrF compare the student's text with the teacher's, from 0 to 100."
        + signature
    )
    return Table("agreement", columns, frame.to_dicts(), frame, caption)


def score_gaps(frame: pl.DataFrame) -> Table:
    """Students' scores against their teachers' where these are no decisions, from `run_comparisons.likeness`."""
    frame = frame.drop_nulls("difference").drop("agreement", "kappa", pl.selectors.starts_with("when_"))
    columns = [
        Column(
            "student and task",
            lambda row: (
                f"{row['student']}, {'before' if row['role'] == 'before' else 'step ' + str(row['step'])}, "
                f"{row['task']} · {row['protocol']}"
            ),
        ),
        column("score", "score", percent),
        column("minus the teacher's", "difference", signed_percent),
        Column("95 % interval", lambda row: f"{signed_percent(row['low'])} to {signed_percent(row['high'])}"),
        column("n", "items"),
    ]
    caption = (
        "Points of ROUGE-L, paired item by item; the answers to one item are one cluster. Such scores are not right or "
        "wrong, so there is no agreement and no McNemar test."
    )
    return Table("score_gaps", columns, frame.to_dicts(), frame, caption)


def training(data: RunData) -> Table:
    """First and last held-out measures of each student, and its mean seconds a step."""
    rows = []
    for (student,), steps in data.metrics.group_by(["student"], maintain_order=True):
        by_phase = seconds_by_phase(steps)
        row = {"student": student, "steps": steps["step"].max()}
        row["seconds_a_step"] = float(by_phase["seconds"].sum()) if len(by_phase) else None
        for measure in (HELD_OUT_KL, HELD_OUT_TOP1, LOSS):
            if measure in steps.columns and len(values := steps.sort("step")[measure].drop_nulls()):
                row |= {f"{measure}/first": float(values[0]), f"{measure}/last": float(values[-1])}
        rows.append(row)

    def arrow(head: str, measure: str, form: str) -> Column:
        def text(row: Mapping[str, Any]) -> str:
            ends = [row.get(f"{measure}/{end}") for end in ("first", "last")]
            return NONE if None in ends else f"{form.format(ends[0])} → {form.format(ends[1])}".replace("%", " %")

        return Column(head, text)

    columns = [
        column("student", "student"),
        column("steps", "steps"),
        arrow("held-out KL (nats a token)", HELD_OUT_KL, "{:.3f}"),
        arrow("held-out top-1 agreement", HELD_OUT_TOP1, "{:.1%}"),
        arrow("training loss", LOSS, "{:.3f}"),
        column("s a step", "seconds_a_step", decimals(2)),
    ]
    caption = (
        "First → last value of each measure. Held-out sequences are never trained on; the divergence is exact, at "
        "temperature 1, averaged over their scored tokens. Losses of different objectives are not comparable."
    )
    return Table("training", columns, rows, pl.DataFrame(rows, infer_schema_length=None), caption)


def seconds_by_phase(metrics: pl.DataFrame) -> pl.DataFrame:
    """Mean seconds a step: `student`, `phase`, `seconds`; empty if the trainers did not time phases."""
    columns = [name for name in metrics.columns if name.startswith("seconds/")]
    if not columns:
        return pl.DataFrame(schema={"student": pl.String, "phase": pl.String, "seconds": pl.Float64})
    long = metrics.group_by("student", maintain_order=True).agg(pl.col(columns).mean()).unpivot(index="student")
    return long.select(
        "student", phase=pl.col("variable").str.strip_prefix("seconds/"), seconds=pl.col("value")
    ).drop_nulls()


def evaluation_speed(data: RunData) -> Table:
    """How fast items were evaluated."""
    frame = ordered(data.summary).with_columns(
        items_per_second=(pl.col("n") + pl.col("failed")) / pl.col("seconds"),
        tokens_per_second=pl.col("output_tokens") / pl.col("seconds"),
    )
    columns = [
        Column("evaluation", lambda row: f"{row['label']}, {row['task']} · {row['protocol']}"),
        column("seconds", "seconds", decimals(1)),
        column("items a second", "items_per_second", decimals(2)),
        Column(
            "written tokens a second",
            lambda row: NONE if row["protocol"] == "loglik" else f"{row['tokens_per_second']:.0f}",
        ),
    ]
    caption = "Wall-clock seconds of the evaluator, its model's loading not counted."
    return Table("evaluation_speed", columns, frame.to_dicts(), frame, caption)


def usage(data: RunData) -> Table:
    """What the teacher itself counted for each student; `data.usage` must be there."""
    assert data.usage is not None
    students = data.usage.students
    counters = ("sequences", "tokens", "rows", "bytes")
    frame = pl.DataFrame(
        {"student": [one.student_id for one in students]}
        | {name: [getattr(one, name) for one in students] for name in counters}
    )
    whole = decimals(0, thousands=True)
    columns = [
        column("student", "student"),
        column("sequences", "sequences", whole),
        column("tokens", "tokens", whole),
        column("scored positions", "rows", whole),
        Column("MiB sent", lambda row: f"{row['bytes'] / 2**20:,.1f}"),
    ]
    started = datetime.fromtimestamp(data.usage.started_at_seconds, UTC)
    caption = (
        f"The teacher's own counters: {len(students)} students attached to one process (instance "
        f"{data.usage.instance_id}), started {started:%Y-%m-%d %H:%M:%S} UTC."
    )
    return Table("teacher_usage", columns, frame.to_dicts(), frame, caption)
