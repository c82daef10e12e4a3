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

from ray.util.metrics import Gauge

from tutelage.trainer.metrics.progress import Progress, tokens_per_second

_PHASES = ("sampling", "scoring", "waiting", "stepping")


class PrometheusGauges:
    """The gauges of one student; needs a process that Ray started.

    Args:
        run: the cohort's name.
        student: its id.

    """

    def __init__(self, run: str, student: str) -> None:
        def gauge(name: str, *tags: str) -> Gauge:
            made = Gauge(f"tutelage_student_{name}", f"{name} of a student", ("run", "student", *tags))
            made.set_default_tags({"run": run, "student": student})  # Ray refuses a value that lacks a tag.
            return made

        self._gauges = {name: gauge(name) for name in ("step", "loss", "forward_kl", "tokens_per_second")}
        self._phase_seconds = gauge("phase_seconds", "phase")

    def update(self, progress: Progress) -> None:
        """Sets all of which there is a value; a gauge that was never set is not exported at all."""
        metrics = progress.metrics
        values = {
            "step": progress.step,
            "loss": metrics.get("train/loss"),
            "forward_kl": metrics.get("heldout/forward_kl"),
            "tokens_per_second": tokens_per_second(metrics),
        }
        for name, value in values.items():
            if value is not None:
                self._gauges[name].set(value)
        for phase in _PHASES:
            if f"seconds/{phase}" in metrics:
                self._phase_seconds.set(metrics[f"seconds/{phase}"], {"phase": phase})
