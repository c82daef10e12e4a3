"""What is compared item by item: a student after training with itself before, and with its teacher."""

from __future__ import annotations

import polars as pl

from tutelage.evaluator.report.run_data import CELL, RunData
from tutelage.evaluator.scoring.agreement import agreement, fidelity, pair
from tutelage.evaluator.statistics.paired import are_decisions, cluster_robust_interval, mcnemar_exact, t_test

CHANGES = pl.Schema(
    {
        "student": pl.String,
        "task": pl.String,
        "protocol": pl.String,
        "items": pl.Int64,
        "before": pl.Float64,
        "after": pl.Float64,
        "change": pl.Float64,
        "low": pl.Float64,  # of the 95 % interval of the change
        "high": pl.Float64,
        "gained": pl.Int64,  # items right only after; this and the next are null where scores are no decisions
        "lost": pl.Int64,  # items right only before
        "p_value": pl.Float64,
        "test": pl.String,  # McNemar, or t where scores are no decisions or items share a text
    }
)
LIKENESS = pl.Schema(
    {
        "student": pl.String,
        "role": pl.String,
        "step": pl.UInt64,
        "task": pl.String,
        "protocol": pl.String,
        "items": pl.Int64,
        "score": pl.Float64,
        "agreement": pl.Float64,  # this and the next five are null where scores are no decisions
        "kappa": pl.Float64,
        "when_teacher_right": pl.Float64,
        "when_teacher_wrong": pl.Float64,
        "teacher_unparsable": pl.Float64,
        "student_unparsable": pl.Float64,
        "difference": pl.Float64,  # student's score minus the teacher's, only where scores are no decisions
        "low": pl.Float64,  # of the 95 % interval of the difference
        "high": pl.Float64,
        "bleu": pl.Float64,
        "sentence_bleu": pl.Float64,
        "chrf": pl.Float64,
        "signature": pl.String,
    }
)


def changes(data: RunData) -> pl.DataFrame:
    """Before against after training, a row a student, task and protocol.

    The interval is `cluster_robust_interval`'s over items, where items with the same text and the answers to one item
    are one cluster. The p-value is McNemar's exact test where items are right or wrong and independent, else the t-test
    that belongs to the interval. Items without a score in either evaluation are left out.
    """
    rows = []
    for (student, task, protocol), cells in data.summary.group_by(["student", *CELL], maintain_order=True):
        before, after = (_only(cells.filter(role=role)) for role in ("before", "after"))
        if before is None or after is None:
            continue
        both = _scored(pair(_rows_of(data, before), _rows_of(data, after)))
        if both.is_empty():
            continue
        was, is_now = both["score"].to_numpy(), both["score_student"].to_numpy()
        interval = cluster_robust_interval(is_now - was, both["item_hash"], bound=1.0)
        decisions = are_decisions(was, is_now)
        test = mcnemar_exact(is_now == 1.0, was == 1.0) if decisions else None
        exact = test is not None and interval.clusters == len(both)
        rows.append(
            {
                **{"student": student, "task": task, "protocol": protocol, "items": both["item_id"].n_unique()},
                "before": float(was.mean()),
                "after": float(is_now.mean()),
                "change": interval.estimate,
                "low": interval.low,
                "high": interval.high,
                "gained": test.only_first if test else None,
                "lost": test.only_second if test else None,
                "p_value": test.p_value if test and exact else t_test(interval).p_value,
                "test": "McNemar" if exact else "t",
            }
        )
    return pl.DataFrame(rows, schema=CHANGES)


def likeness(data: RunData) -> pl.DataFrame:
    """Every evaluation of a student against its teacher's of the same task.

    Agreement where items are right or wrong, the paired difference of the scores where they are not (ROUGE-L), and BLEU
    of what both wrote under `paper`.
    """
    teachers = data.summary.filter(role="teacher")
    rows = []
    for cell in data.summary.filter(pl.col("role") != "teacher").to_dicts():
        own = {"task": cell["task"], "protocol": cell["protocol"], "template": cell["template"]}
        teacher = _only(teachers.filter(student=cell["teacher"], **own))
        if teacher is None:
            continue
        both = pair(_rows_of(data, teacher), _rows_of(data, cell))
        if both.is_empty():
            continue
        measured: dict[str, object] = {"items": both["item_id"].n_unique()}
        scored = _scored(both)
        if are_decisions(scored["score"], scored["score_student"]) and both["extracted"].null_count() < len(both):
            measured |= vars(agreement(both))
        elif len(scored):
            gap = cluster_robust_interval(scored["score_student"] - scored["score"], scored["item_hash"], bound=1.0)
            measured |= {"difference": gap.estimate, "low": gap.low, "high": gap.high}
        if cell["protocol"] == "paper":
            measured = {**vars(fidelity(both)), **measured}
        rows.append({name: measured.get(name, cell.get(name)) for name in LIKENESS})
    return pl.DataFrame(rows, schema=LIKENESS)


def _scored(both: pl.DataFrame) -> pl.DataFrame:
    """Pairs in which both have a score: an open question without a reference has none."""
    return both.drop_nulls(["score", "score_student"]).drop_nans(["score", "score_student"])


def _only(cells: pl.DataFrame) -> dict[str, str] | None:
    """The evaluation of a cell; of several, the last by id."""
    return cells.sort("evaluation_id").row(-1, named=True) if len(cells) else None


def _rows_of(data: RunData, cell: dict[str, str]) -> pl.DataFrame:
    return data.rows.filter(evaluation_id=cell["evaluation_id"], task=cell["task"], protocol=cell["protocol"])
