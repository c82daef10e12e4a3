"""SVAMP: word problems varied so that shallow cues mislead (Patel et al. 2021)."""

from __future__ import annotations

from tutelage.evaluator.scoring.extraction import NUMBER
from tutelage.evaluator.tasks.base import LLM_ADAPTERS, Task

TASK = Task(
    name="SVAMP",
    version=1,
    source=LLM_ADAPTERS + "SVAMP/test.json",
    count=1000,
    chance_level=0.0,
    max_new_tokens=256,
    extraction=NUMBER,
    known_problems=("the rationale in the file is right in 803 of 1000 items; only the answer is used",),
)
