"""What a student's actor shows to Ray's metrics: Prometheus scrapes them from every node, Grafana draws them.

| gauge | tags | value |
|---|---|---|
| `tutelage_student_step` | run, student | optimizer steps done |
| `tutelage_student_loss` | run, student | of the newest step |
| `tutelage_student_forward_kl` | run, student | to the teacher on held-out sequences, nats a token |
| `tutelage_student_tokens_per_second` | run, student | scored tokens of the newest step |
| `tutelage_student_phase_seconds` | run, student, phase | of the newest step: sampling, scoring, waiting, stepping |
"""

from __future__ import annotations

from collections.abc import Mapping

from ray.util.metrics import Gauge

from tutelage.trainer.metrics.progress import Progress, tokens_per_second

_TAGS = ("run", "student")
_PHASES = ("sampling", "scoring", "waiting", "stepping")
_OF_METRIC = {"loss": "train/loss", "forward_kl": "heldout/forward_kl"}


class PrometheusGauges:
    """The gauges of one student; needs a process that Ray started.

    Args:
        run: the cohort's name.
        student: its id.

    """

    def __init__(self, run: str, student: str) -> None:
        self._gauges = {
            name: _gauge(name, run, student) for name in ("step", "loss", "forward_kl", "tokens_per_second")
        }
        self._phase_seconds = _gauge("phase_seconds", run, student, "phase")

    def show(self, progress: Progress) -> None:
        """Sets all of which there is a value."""
        for name, value in _values(progress).items():
            self._gauges[name].set(value)
        for phase in _PHASES:
            if f"seconds/{phase}" in progress.metrics:
                self._phase_seconds.set(progress.metrics[f"seconds/{phase}"], {"phase": phase})


def _gauge(name: str, run: str, student: str, *tags: str) -> Gauge:
    gauge = Gauge(f"tutelage_student_{name}", f"{name} of a student", (*_TAGS, *tags))
    gauge.set_default_tags({"run": run, "student": student})
    return gauge


def _values(progress: Progress) -> Mapping[str, float]:
    metrics = progress.metrics
    known = {name: metrics[key] for name, key in _OF_METRIC.items() if key in metrics}
    speed = tokens_per_second(metrics)
    return {"step": progress.step, **known, **({} if speed is None else {"tokens_per_second": speed})}
