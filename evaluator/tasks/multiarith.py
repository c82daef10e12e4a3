"""MultiArith: word problems of several steps (Roy and Roth 2015)."""

from __future__ import annotations

from tutelage.evaluator.scoring.extraction import NUMBER
from tutelage.evaluator.tasks.base import LLM_ADAPTERS, Task

TASK = Task(
    name="MultiArith",
    version=1,
    source=LLM_ADAPTERS + "MultiArith/test.json",
    count=600,
    chance_level=0.0,
    max_new_tokens=256,
    extraction=NUMBER,
    known_problems=(
        "82 % of its items are in the MAWPS training set, which is part of Math10K",
        "20 questions appear twice",
    ),
)
