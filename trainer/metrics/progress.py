"""What a training says about itself while it runs and at its end; plain values that travel between processes.

Everything that is shown comes from these: a person reads the terminal's table or the lines of a log
(`cluster.console`), Prometheus scrapes the gauges (`metrics.prometheus`), and a program reads a row a step in
`metrics.jsonl` (`metrics.log`) or where the whole run is now in `students.json` (`cluster.run_control`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Progress:
    """Where a training is."""

    student: str
    step: int
    """Steps done."""
    steps: int
    """Steps in all."""
    phase: str
    """What it is doing, for people."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The newest value of each metric."""
    notes: tuple[str, ...] = ()
    """What people have to know of it: rows that were left out, completions that were cut."""


@dataclass(frozen=True)
class Outcome:
    """How a training ended."""

    student: str
    step: int
    """Steps done."""
    finished: bool
    """False if it was asked to stop before."""
    checkpoint: Path | None
    """Its newest checkpoint."""


@dataclass(frozen=True)
class ActorStatus:
    """What a student's actor answers about itself."""

    progress: Progress
    paused: bool
    process_id: int
    updated_at_seconds: float
    """When the progress was reported, seconds since 1970-01-01 UTC."""


def tokens_per_second(metrics: Mapping[str, float]) -> float | None:
    """Scored tokens of the newest step by its seconds; None before the first."""
    phases = [metrics.get(f"seconds/{name}", 0.0) for name in ("sampling", "scoring", "stepping", "waiting")]
    return metrics["train/tokens"] / sum(phases) if sum(phases) > 0 else None


def metric_texts(metrics: Mapping[str, float], *, first_forward_kl: float | None = None) -> dict[str, str]:
    """What people are shown of the newest metrics, by heading; empty where nothing is known yet.

    Args:
        metrics: the newest value of each.
        first_forward_kl: of the first measurement, to be shown beside the newest.

    """
    loss, kl, speed = metrics.get("train/loss"), metrics.get("heldout/forward_kl"), tokens_per_second(metrics)
    kl_before = "" if first_forward_kl is None else f"{first_forward_kl:.3f} → "
    return {
        "loss": "" if loss is None else f"{loss:.3f}",
        "held-out KL": "" if kl is None else f"{kl_before}{kl:.3f}",
        "tokens/s": "" if speed is None else f"{speed:,.0f}",
    }


def progress_line(step: int, steps: int, texts: Mapping[str, str], now: str) -> str:
    """One line for a log: the step, what is known by heading, and what the student does now."""
    known = [f"{heading} {text}" for heading, text in texts.items() if text]
    return ", ".join([f"step {step}/{steps}", *known, now])
