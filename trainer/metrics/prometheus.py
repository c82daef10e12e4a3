"""What a student's actor shows to Ray's metrics: Prometheus scrapes them from every node, Grafana draws them.

| gauge | tags | value |
|---|---|---|
| `tutelage_student_step` | run, student | optimizer steps done |
| `tutelage_student_steps` | run, student | optimizer steps in all |
| `tutelage_student_last_step_timestamp_seconds` | run, student | when the newest step was done, or this process began |
| `tutelage_student_paused` | run, student | 1 while somebody has it stand still, else 0 |
| `tutelage_student_loss` | run, student | of the newest step |
| `tutelage_student_forward_kl` | run, student | to the teacher on held-out sequences, nats a token |
| `tutelage_student_tokens_per_second` | run, student | scored tokens of the newest step |
| `tutelage_student_phase_seconds` | run, student, phase | of the newest step: sampling, scoring, waiting, stepping |
| `tutelage_student_disk_free_bytes` | run, student | room left where its folder is |
| `tutelage_student_disk_size_bytes` | run, student | size of that file system |
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from ray.util.metrics import Gauge

from tutelage.trainer.metrics.progress import Progress, tokens_per_second

_NAMES = (
    *("step", "steps", "last_step_timestamp_seconds", "paused", "loss", "forward_kl", "tokens_per_second"),
    *("disk_free_bytes", "disk_size_bytes"),
)
_PHASES = ("sampling", "scoring", "waiting", "stepping")


class PrometheusGauges:
    """The gauges of one student; needs a process that Ray started.

    Args:
        run: the cohort's name.
        student: its id.
        folder: the student's.

    """

    def __init__(self, run: str, student: str, folder: Path) -> None:
        def gauge(name: str, *tags: str) -> Gauge:
            made = Gauge(f"tutelage_student_{name}", f"{name} of a student", ("run", "student", *tags))
            made.set_default_tags({"run": run, "student": student})  # Ray refuses a value that lacks a tag.
            return made

        self._gauges = {name: gauge(name) for name in _NAMES}
        self._phase_seconds = gauge("phase_seconds", "phase")
        self._folder, self._step, self._stepped_at, self._paused = folder, -1, 0.0, False

    def paused(self, paused: bool) -> None:
        """Whether it stands still because somebody wants it to."""
        self._paused = paused
        self._gauges["paused"].set(float(paused))

    def update(self, progress: Progress) -> None:
        """Sets all of which there is a value; a gauge that was never set is not exported at all."""
        metrics = progress.metrics
        if progress.step != self._step:
            self._step, self._stepped_at = progress.step, time.time()
        values = {
            "step": progress.step,
            "steps": progress.steps,
            "last_step_timestamp_seconds": self._stepped_at,
            # Each time: what is set before the node's agent is reached does not get there, and Ray sends it once.
            "paused": float(self._paused),
            "loss": metrics.get("train/loss"),
            "forward_kl": metrics.get("heldout/forward_kl"),
            "tokens_per_second": tokens_per_second(metrics),
        }
        if self._folder.exists():
            disk = shutil.disk_usage(self._folder)
            values |= {"disk_free_bytes": disk.free, "disk_size_bytes": disk.total}
        for name, value in values.items():
            if value is not None:
                self._gauges[name].set(value)
        for phase in _PHASES:
            if f"seconds/{phase}" in metrics:
                self._phase_seconds.set(metrics[f"seconds/{phase}"], {"phase": phase})
