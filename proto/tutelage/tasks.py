"""What a checkpoint is scored on, as cohorts and studies write it.

tasks: [gsm8k:paper, {task: arc_easy, protocol: loglik, limit: 100}]
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tutelage.config import Config


class TaskConfig(Config):
    """One task that the evaluator is asked for; also the text TASK:PROTOCOL, or TASK for the task's own protocol."""

    task: str
    """Name of the task, as the evaluator lists it or lm-evaluation-harness calls it, or the YAML file of one's own."""
    protocol: Literal["paper", "loglik", "open"] | None = "paper"
    """How it is scored; null is the task's own way."""
    limit: Annotated[int, Field(ge=0)] = 0
    """Items to score, the first ones; 0 means all."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        task, _, protocol = value.partition(":")
        return {"task": task, "protocol": protocol or None}
