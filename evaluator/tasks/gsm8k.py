"""gsm8k: grade-school word problems of two to eight steps (Cobbe et al. 2021)."""

from __future__ import annotations

from tutelage.evaluator.scoring.extraction import NUMBER
from tutelage.evaluator.tasks.base import LLM_ADAPTERS, Task

TASK = Task(
    name="gsm8k",
    version=1,
    source=LLM_ADAPTERS + "gsm8k/test.json",
    count=1319,
    chance_level=0.0,
    max_new_tokens=256,
    extraction=NUMBER,
    known_problems=("the rationale in the file is right in 771 of 1319 items; only the answer is used",),
)
