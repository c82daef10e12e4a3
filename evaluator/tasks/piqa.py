"""piqa: two ways to reach a physical goal, one of which works (Bisk et al. 2020)."""

from __future__ import annotations

from tutelage.evaluator.scoring.extraction import labelled
from tutelage.evaluator.tasks.base import (
    LLM_ADAPTERS,
    Choices,
    Item,
    Task,
    labelled_options,
    numbered_gold,
    numbered_labels,
    shared_context,
)


def _choices(item: Item) -> Choices:
    question, options = labelled_options(
        item, lead="Please choose the correct solution to the question: ", label="Solution", separator="\n\n"
    )
    return shared_context(
        f"Question: {question}\nAnswer:", options, numbered_labels("solution", len(options)), numbered_gold(item)
    )


TASK = Task(
    name="piqa",
    version=1,
    source=LLM_ADAPTERS + "piqa/test.json",
    count=1838,
    chance_level=0.5,
    max_new_tokens=32,
    extraction=labelled("solution", 2),
    known_problems=("the validation split: the test split has no public answers",),
    choices=_choices,
)
