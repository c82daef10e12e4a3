"""The sections of a run's report, each from the run's data; None where there is nothing to show."""

from __future__ import annotations

import polars as pl

from tutelage.evaluator.report import error_kinds
from tutelage.evaluator.report import run_comparisons as comparisons
from tutelage.evaluator.report import run_figures as figures
from tutelage.evaluator.report import run_tables as tables
from tutelage.evaluator.report.page import Answer, Figure, Sample, Section
from tutelage.evaluator.report.preflight import preflight
from tutelage.evaluator.report.run_data import CELL, RunData, questions
from tutelage.evaluator.report.run_tables import HELD_OUT_KL, HELD_OUT_TOP1, LOSS

_SAMPLES = 3


def learning(data: RunData) -> Section | None:
    """How near each student came to its teacher: curves and first and last values, if the trainers wrote metrics."""
    if data.metrics.is_empty():
        return None
    curves = {
        HELD_OUT_KL: ("held-out KL, nats a token", "KL(teacher ‖ student)", False),
        HELD_OUT_TOP1: ("held-out top-1 agreement", "share of tokens", True),
        LOSS: ("training loss", "each objective's own loss", False),
    }
    shown = [
        Figure(
            name=measure.replace("/", "_"),
            alt=f"{title} over optimizer steps, a line a student",
            chart=figures.curve(data.metrics, measure, data.students, title=title, percent=share),
            caption=f"{title[0].upper()}{title[1:]}: {meaning}, by optimizer step; one run a student.",
        )
        for measure, (title, meaning, share) in curves.items()
        if measure in data.metrics.columns
    ]
    return Section("Learning", "How near each student came to its teacher.", shown, [tables.training(data)])


def scores(data: RunData) -> Section:
    """What every model gets right, a figure a task and protocol."""
    summary, shown = data.summary, []
    for task, protocol in summary.select(CELL).unique().sort(CELL).rows():
        own = summary.filter(task=task, protocol=protocol)
        counts = sorted({int(n) for n in own["n"]})
        shown.append(
            Figure(
                name=f"scores_{task}_{protocol}",
                alt=f"mean score with its interval of every model on {task}",
                chart=figures.scores(own, tables.model_order(summary), data.students),
                caption=f"{task}, {protocol}: mean and 95 % interval over items (n = "
                f"{' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))}). "
                "Dark: the teacher. Hollow: before training.",
            )
        )
    listed = [tables.scores(data)]
    if len(summary.filter(protocol="paper")):
        listed.append(tables.extraction(data))
    if len(summary.filter(pl.col("protocol") != "loglik")):
        listed.append(tables.cut_off(data))
    if len(summary.filter(protocol="loglik")):
        listed.append(tables.normalized(data))
    return Section("Scores", "What every model gets right.", shown, listed)


def changes(data: RunData) -> Section | None:
    """What training changed, item by item, for students that were evaluated before and after it."""
    frame = comparisons.changes(data)
    if frame.is_empty():
        return None
    figure = Figure(
        name="changes",
        alt="change of every student's score by training with its interval",
        chart=figures.forest(frame, data.students),
        caption="After minus before on the same items. An interval across the dashed line fits no change.",
    )
    return Section("Before and after", "What training changed, item by item.", [figure], [tables.changes(frame)])


def likeness(data: RunData) -> Section | None:
    """Whether a student says what its teacher says, and in the same words."""
    frame = comparisons.likeness(data)
    if frame.is_empty():
        return None
    shown, listed = [], []
    decided = frame.drop_nulls("agreement")
    if len(decided):
        caption = "Share of items with the teacher's answer, right or wrong. Hollow: before. Filled: after training."
        shown.append(
            Figure(
                name="agreement",
                alt="agreement with the teacher before and after training",
                chart=figures.agreement(decided, data.students),
                caption=caption,
            )
        )
        listed.append(tables.likeness(frame))
    if len(frame.drop_nulls("difference")):
        listed.append(tables.score_gaps(frame))
    if len(frame.drop_nulls("bleu")):
        shown.append(
            Figure(
                name="accuracy_fidelity",
                alt="score against BLEU fidelity",
                chart=figures.score_against_fidelity(frame, data.students),
                caption="Being right against sounding like the teacher. Hollow: before training.",
            )
        )
    text = "Whether a student says what its teacher says, and in the same words."
    return Section("Agreement and fidelity", text, shown, listed)


def errors(data: RunData) -> Section | None:
    """Why answers to word problems of one operation are wrong, before and after training."""
    written = tables.ordered(data.summary.filter(protocol="paper"))
    return error_kinds.errors(data.rows, written.select("evaluation_id", "label").unique(maintain_order=True))


def outputs(data: RunData) -> Section | None:
    """The first items of one task, of those whose questions are here if any, as every model answered them."""
    summary = tables.ordered(data.summary.filter(protocol="paper"))
    if summary.is_empty():
        return None
    questions_of = {task: questions(task) for task in summary["task"].unique().sort()}
    task = max(questions_of, key=lambda name: bool(questions_of[name]))
    labels = {row["evaluation_id"]: row["label"] for row in summary.filter(task=task).to_dicts()}
    rows = data.rows.filter(task=task, protocol="paper").sort(pl.col("item_id").cast(pl.UInt32))
    samples = []
    for item in rows["item_id"].unique(maintain_order=True)[:_SAMPLES]:
        answers = {row["evaluation_id"]: row for row in rows.filter(item_id=item).to_dicts()}
        first = next(iter(answers.values()))
        samples.append(
            Sample(
                title=f"{task}, item {item}; right answer: {first['target']}",
                question=questions_of[task].get(first["item_hash"], ""),
                answers=[
                    Answer(label, answers[one]["output"] or "", answers[one]["score"] == 1.0)
                    for one, label in labels.items()
                    if one in answers
                ],
            )
        )
    return Section("In their own words", "The first items of a task, not chosen.", samples=samples)


def throughput(data: RunData) -> Section:
    """What it cost: where a training step's time went, what the teacher served, how fast items were evaluated."""
    seconds = tables.seconds_by_phase(data.metrics) if len(data.metrics) else pl.DataFrame()
    figure = (
        Figure(
            name="phases",
            alt="mean seconds a step by phase",
            chart=figures.phases(seconds),
            caption="Where a training step's time goes; waiting is for a teacher that was away.",
        )
        if len(seconds)
        else None
    )
    served = [] if data.usage is None else [tables.usage(data)]
    return Section("Throughput", "What it cost.", [figure] if figure else [], [*served, tables.evaluation_speed(data)])


SECTIONS = (learning, scores, changes, likeness, errors, outputs, throughput, preflight)
