"""What a training says about itself while it runs and at its end; plain values that travel between processes."""

from __future__ import annotations

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
class Status:
    """What a student's actor answers about itself."""

    progress: Progress
    paused: bool
    process_id: int
    updated_at_seconds: float
    """When the progress was reported, seconds since 1970-01-01 UTC."""


def tokens_per_second(metrics: dict[str, float]) -> float | None:
    """Scored tokens of the newest step by its seconds; None before the first."""
    phases = [metrics.get(f"seconds/{name}", 0.0) for name in ("sampling", "scoring", "stepping", "waiting")]
    return metrics["train/tokens"] / sum(phases) if sum(phases) > 0 else None
