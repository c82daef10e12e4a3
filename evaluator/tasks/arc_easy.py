"""ARC-Easy: grade-school science questions, the easier part (Clark et al. 2018)."""

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
        item, lead="Please choose the correct answer to the question: ", label="Answer"
    )
    return shared_context(
        f"Question: {question}\nAnswer:", options, numbered_labels("answer", len(options)), numbered_gold(item)
    )


TASK = Task(
    name="ARC-Easy",
    version=1,
    source=LLM_ADAPTERS + "ARC-Easy/test.json",
    count=2376,
    chance_level=0.25,
    max_new_tokens=32,
    extraction=labelled("answer", 5),
    known_problems=("eleven items have three or five options instead of four",),
    choices=_choices,
)
