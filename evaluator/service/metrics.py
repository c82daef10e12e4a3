"""Prometheus metrics of the evaluator: its queue, what runs, and the newest scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import get_args

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tutelage.evaluator.service.queue import Entry, Score, State
from tutelage.rpc.metrics import disk_metrics

_OF_A_STUDENT = ("run", "student")
_OF_A_SCORE = (*_OF_A_STUDENT, "task", "protocol", "metric")


class EvaluatorCollector(Collector):
    """What the service says of itself whenever Prometheus asks.

    Args:
        entries: all evaluations, oldest first.
        working: whether every worker is alive.
        folders: whose file systems fill up, by name.

    """

    def __init__(
        self, entries: Callable[[], list[Entry]], working: Callable[[], bool], folders: Mapping[str, Path]
    ) -> None:
        self._entries, self._working, self._folders = entries, working, folders

    def collect(self) -> Iterator[Metric]:
        """As prometheus_client defines it."""
        entries = self._entries()
        yield GaugeMetricFamily(
            "tutelage_evaluator_serving", "Whether it works: no worker has ended.", value=self._working()
        )
        states = GaugeMetricFamily(
            "tutelage_evaluator_evaluations", "Evaluations of the queue by state.", labels=["state"]
        )
        counted = Counter(entry.state for entry in entries)
        for state in get_args(State):
            states.add_metric([state], counted[state])
        yield states
        yield from _running([entry for entry in entries if entry.state == "running"])
        yield from _scores(entries)
        yield from disk_metrics("evaluator", self._folders)


def _running(entries: list[Entry]) -> Iterator[Metric]:
    values = {
        "done_items": ("Items done of what runs now.", lambda entry: entry.items_done),
        "all_items": ("Items in all of what runs now.", lambda entry: entry.items_total),
        "failed_items": ("Items without an answer of what runs now.", lambda entry: entry.items_failed),
        "items_per_second": (
            "Items a second of what runs now, since it was begun.",
            lambda entry: entry.items_per_second,
        ),
    }
    for name, (text, value) in values.items():
        gauge = GaugeMetricFamily(f"tutelage_evaluator_{name}", text, labels=_OF_A_STUDENT)
        # A student's checkpoints may run beside each other: Prometheus takes each series once.
        summed: Counter[tuple[str, str]] = Counter()
        for entry in entries:
            summed[entry.evaluation.labels.run, entry.evaluation.labels.student] += value(entry)
        for labels, total in summed.items():
            gauge.add_metric(labels, total)
        yield gauge


def _scores(entries: list[Entry]) -> Iterator[Metric]:
    """Of each student the newest of each task: by step, and of equal steps what was asked for last."""
    newest: dict[tuple[str, str, str, str, str], tuple[Entry, Score]] = {}
    for entry in entries:
        labels = entry.evaluation.labels
        for score in entry.scores:
            key = (labels.run, labels.student, score.task, score.protocol, score.metric)
            if key not in newest or newest[key][0].evaluation.labels.step <= labels.step:
                newest[key] = (entry, score)
    shown = GaugeMetricFamily("tutelage_evaluator_score", "Mean score of the newest checkpoint.", labels=_OF_A_SCORE)
    error = GaugeMetricFamily("tutelage_evaluator_score_standard_error", "Its standard error.", labels=_OF_A_SCORE)
    step = GaugeMetricFamily(
        "tutelage_evaluator_scored_step", "Optimizer steps of that checkpoint.", labels=_OF_A_SCORE
    )
    for key, (entry, score) in newest.items():
        shown.add_metric(key, score.score)
        error.add_metric(key, score.standard_error)
        step.add_metric(key, entry.evaluation.labels.step)
    yield from (shown, error, step)
