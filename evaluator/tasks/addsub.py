"""AddSub: word problems of one addition or subtraction (Hosseini et al. 2014)."""

from __future__ import annotations

from tutelage.evaluator.scoring.extraction import NUMBER
from tutelage.evaluator.tasks.base import LLM_ADAPTERS, Task

TASK = Task(
    name="AddSub",
    version=1,
    source=LLM_ADAPTERS + "AddSub/test.json",
    count=395,
    chance_level=0.0,
    max_new_tokens=256,
    extraction=NUMBER,
    known_problems=(
        "83 % of its items are in the MAWPS training set, which is part of Math10K",
        "126 answers are not integers",
    ),
)
