"""Puts the page together: sections of a sentence, a figure, a table and a caption, then the files beside it."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import polars as pl

from tutelage import __version__
from tutelage.evaluator.report import run_comparisons as comparisons
from tutelage.evaluator.report import run_figures as figures
from tutelage.evaluator.report import run_tables as tables
from tutelage.evaluator.report.page import Figure, Section, html_page, write_besides
from tutelage.evaluator.report.run_data import RunData, read_run
from tutelage.evaluator.tasks import TASKS
from tutelage.evaluator.tasks.base import default_data_dir

_SAMPLES = 3


def write_report(*, frames: Path, run_dir: Path | None, run: str | None, out: Path) -> Path:
    """Writes `out` and, beside it, `figures/*.svg`, `figures/*.png` and `tables/*.csv`.

    Args:
        frames: folder of the frames.
        run_dir: folder of the run, for learning curves and the teacher's counters.
        run: only rows of this run; needed if the frames hold several.
        out: the HTML file.

    Raises:
        DataError: there are no rows, or the run folder holds something unreadable.

    """
    data = read_run(frames, run_dir, run)
    sections = _sections(data)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_besides(sections, out.parent)
    out.write_text(html_page(data.run, _facts(data), _tiles(data), sections), encoding="utf-8")
    return out


def _facts(data: RunData) -> list[tuple[str, str]]:
    """What the run was, for the head of the page."""
    rows = data.rows
    teachers = data.summary.filter(role="teacher")["student"].unique().sort().to_list()
    seeds = rows["training_seed"].unique().sort().to_list()
    decoding = rows.filter(protocol="paper")["sampling_temperature"].drop_nulls().unique().sort().to_list()
    facts = [
        ("teacher", ", ".join(teachers) or "not evaluated"),
        ("students", ", ".join(_described(data, student) for student in data.students) or "none"),
        ("tasks", ", ".join(f"{task} ({protocol})" for task, protocol in _cells(rows))),
        ("items", f"{len(rows):,} rows, {int((rows['error'] != '').sum())} failed"),
        ("prompts", ", ".join(rows["template"].unique().sort())),
        ("training seeds", ", ".join(map(str, seeds))),
    ]
    if decoding:
        facts.append(("decoding", ", ".join("greedy" if one == 0 else f"sampled at T = {one:g}" for one in decoding)))
    return [*facts, ("written", f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC by tutelage {__version__}")]


def _cells(rows: pl.DataFrame) -> list[tuple[str, str]]:
    return rows.select("task", "protocol").unique().sort("task", "protocol").rows()


def _described(data: RunData, student: str) -> str:
    """The student with its objective, temperature and noise."""
    trained = data.rows.filter((pl.col("student") == student) & (pl.col("objective") != ""))
    if trained.is_empty():
        return student
    row = trained.row(0, named=True)
    noise = f", σ = {row['noise']:g}" if row["noise"] else ""
    return f"{student} ({row['objective']}, T = {row['temperature']:g}{noise})"


def _tiles(data: RunData) -> list[dict[str, str]]:
    """The headline: how far each student's held-out KL fell."""
    if data.metrics.is_empty():
        return []
    tiles = []
    for row in tables.training(data).frame.to_dicts():
        ends = row.get("heldout/forward_kl")
        if ends:
            first, last = (float(one) for one in ends.strip("()").split(","))
            tiles.append(
                {
                    "student": row["student"],
                    "value": f"{tables.signed_points((last - first) / first)[:-2]} %",
                    "text": f"held-out KL to the teacher, {first:.3f} → {last:.3f} nats a token",
                }
            )
    return tiles


def _sections(data: RunData) -> list[Section]:
    changes, likeness = comparisons.changes(data), comparisons.likeness(data)
    sections = [_learning(data), _scores(data), _changes(data, changes), _likeness(data, likeness)]
    sections += [_outputs(data), _speed(data)]
    return [section for section in sections if section is not None]


def _learning(data: RunData) -> Section | None:
    if data.metrics.is_empty():
        return None
    curves = {
        "heldout/forward_kl": ("held-out KL, nats a token", "KL(teacher ‖ student)", False),
        "heldout/top1_agreement": ("held-out top-1 agreement", "share of tokens", True),
        "train/loss": ("training loss", "each objective's own loss", False),
    }
    shown = [
        Figure(
            name=column.replace("/", "_"),
            alt=f"{title} over optimizer steps, a line a student",
            chart=figures.curve(data.metrics, column, data.students, title=title, percent=share),
            caption=f"{title[0].upper()}{title[1:]}: {meaning}, by optimizer step; one run a student.",
        )
        for column, (title, meaning, share) in curves.items()
        if column in data.metrics.columns
    ]
    caption = (
        "First → last value of each measure. Held-out sequences are never trained on; the divergence is exact, at "
        "temperature 1, averaged over their scored tokens. Losses of different objectives are not comparable."
    )
    return Section("Learning", "How near each student came to its teacher.", shown, [(tables.training(data), caption)])


def _scores(data: RunData) -> Section:
    summary, shown = data.summary, []
    for task, protocol in _cells(summary):
        own = summary.filter(task=task, protocol=protocol)
        shown.append(
            Figure(
                name=f"scores_{task}_{protocol}",
                alt=f"mean score with standard error of every model on {task}",
                chart=figures.scores(own, tables.model_order(summary), data.students),
                caption=f"{task}, {protocol}: mean ± one standard error over items (n = {_range(own['n'])}). "
                "Dark: the teacher. Hollow: before training.",
            )
        )
    listed = [
        (
            tables.scores(data),
            "Mean score in points ± standard error over items; n is the number of items; chance is uniform guessing. "
            "paper: zero-shot generation, LLM-Adapters' extraction, accuracy. loglik: lm-evaluation-harness' acc.",
        )
    ]
    if len(summary.filter(protocol="paper")):
        caption = (
            "Accuracy in points of the same outputs under LLM-Adapters' extraction and under a corrected one, and the "
            "share of outputs in which LLM-Adapters' rule finds no answer."
        )
        listed.append((tables.extraction(data), caption))
    if len(summary.filter(protocol="loglik")):
        caption = "Accuracy in points by sum of log-probabilities (acc) and by sum per character (acc_norm)."
        listed.append((tables.normalized(data), caption))
    return Section("Scores", "What every model gets right.", shown, listed)


def _range(values: pl.Series) -> str:
    low, *_, high = [*sorted(values.to_list())] * 2
    return str(low) if low == high else f"{low} to {high}"


def _changes(data: RunData, frame: pl.DataFrame) -> Section | None:
    if frame.is_empty():
        return None
    figure = Figure(
        name="changes",
        alt="change of every student's score by training with its interval",
        chart=figures.forest(frame, data.students),
        caption="After minus before on the same items. An interval across the dashed line fits no change.",
    )
    caption = (
        "Points. The interval is a bias-corrected accelerated bootstrap over items (2,000 resamples; items with the "
        "same text are drawn together). Gained and lost count items right only after and only before; p is McNemar's "
        "exact two-sided test, not adjusted for several comparisons. One training seed a student: the interval says "
        "nothing about other seeds."
    )
    return Section(
        "Before and after", "What training changed, item by item.", [figure], [(tables.changes(frame), caption)]
    )


def _likeness(data: RunData, frame: pl.DataFrame) -> Section | None:
    if frame.is_empty():
        return None
    shown = [
        Figure(
            name="agreement",
            alt="agreement with the teacher before and after training",
            chart=figures.agreement(frame, data.students),
            caption="Share of items with the teacher's answer, right or wrong. Hollow: before. Filled: after training.",
        )
    ]
    texts = frame.drop_nulls("bleu")
    if len(texts):
        shown.append(
            Figure(
                name="accuracy_fidelity",
                alt="accuracy against BLEU fidelity",
                chart=figures.accuracy_against_fidelity(frame, data.students),
                caption="Being right against sounding like the teacher. Hollow: before training.",
            )
        )
    signature = f" BLEU: sacreBLEU, {texts['signature'][0]}." if len(texts) else ""
    caption = (
        "Points. Teacher right and wrong: agreement among the items that the teacher gets right and the others. An "
        "output without an answer agrees with nothing; the student's share of them is given. Kappa is Cohen's, among "
        "items where both answered. BLEU and chrF compare the student's text with the teacher's, from 0 to 100."
        + signature
    )
    text = "Whether a student says what its teacher says, and in the same words."
    return Section("Agreement and fidelity", text, shown, [(tables.likeness(frame), caption)])


def _outputs(data: RunData) -> Section | None:
    """The first items of one task, of those whose questions are here if any, as every model answered them."""
    summary = tables.ordered(data.summary.filter(protocol="paper"))
    if summary.is_empty():
        return None
    questions_of = {task: _questions(task) for task in summary["task"].unique().sort()}
    task = max(questions_of, key=lambda name: bool(questions_of[name]))
    labels = {row["evaluation_id"]: row["label"] for row in summary.filter(task=task).to_dicts()}
    rows = data.rows.filter(task=task, protocol="paper").sort(pl.col("item_id").cast(pl.UInt32))
    samples = []
    for item in rows["item_id"].unique(maintain_order=True)[:_SAMPLES]:
        answers = {row["evaluation_id"]: row for row in rows.filter(item_id=item).to_dicts()}
        samples.append(
            {
                "title": f"{task}, item {item}; right answer: {next(iter(answers.values()))['target']}",
                "question": questions_of[task].get(next(iter(answers.values()))["item_hash"], ""),
                "answers": [
                    {"label": label, "output": answers[one]["output"] or "", "right": answers[one]["score"] == 1.0}
                    for one, label in labels.items()
                    if one in answers
                ],
            }
        )
    return Section("In their own words", "The first items of a task, not chosen.", samples=samples)


def _questions(task: str) -> dict[str, str]:
    """Questions by hash, if the task's data is here; the rows hold only their hashes."""
    known, data_dir = TASKS.get(task), default_data_dir()
    if known is None or known.missing(data_dir):
        return {}
    return {item.item_hash: item.instruction for item in known.items(data_dir)}


def _speed(data: RunData) -> Section:
    shown: list[Figure] = []
    seconds = tables.seconds_by_phase(data.metrics) if len(data.metrics) else pl.DataFrame()
    if len(seconds):
        shown.append(
            Figure(
                name="phases",
                alt="mean seconds a step by phase",
                chart=figures.phases(seconds),
                caption="Where a training step's time goes; waiting is for a teacher that was away.",
            )
        )
    listed = [(tables.evaluation_speed(data), "Wall-clock seconds of the evaluator, its model's loading not counted.")]
    if data.usage is not None:
        started = datetime.fromtimestamp(data.usage.started_at_seconds, UTC)
        caption = (
            f"The teacher's own counters: {len(data.usage.students)} students attached to one process "
            f"(instance {data.usage.instance_id}), started {started:%Y-%m-%d %H:%M:%S} UTC."
        )
        listed.insert(0, (tables.usage(data), caption))
    return Section("Throughput", "What it cost.", shown, listed)
