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
class ActorStatus:
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


def in_words(progress: Progress) -> str:
    """One line for people: the step, what is known of it, what it does now."""
    metrics, speed = progress.metrics, tokens_per_second(progress.metrics)
    values = {
        "loss": f"{metrics['train/loss']:.3f}" if "train/loss" in metrics else "",
        "held-out KL": f"{metrics['heldout/forward_kl']:.3f}" if "heldout/forward_kl" in metrics else "",
        "tokens/s": f"{speed:,.0f}" if speed is not None else "",
    }
    known = [f"{name} {value}" for name, value in values.items() if value]
    return ", ".join([f"step {progress.step}/{progress.steps}", *known, progress.phase])
