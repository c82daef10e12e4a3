"""SingleEq: word problems of one equation (Koncel-Kedziorski et al. 2015)."""

from __future__ import annotations

from tutelage.evaluator.scoring.extraction import NUMBER
from tutelage.evaluator.tasks.base import LLM_ADAPTERS, Task

TASK = Task(
    name="SingleEq",
    version=1,
    source=LLM_ADAPTERS + "SingleEq/test.json",
    count=508,
    chance_level=0.0,
    max_new_tokens=256,
    extraction=NUMBER,
    known_problems=(
        "86 % of its items are in the MAWPS training set, which is part of Math10K",
        "134 answers are not integers",
    ),
)
