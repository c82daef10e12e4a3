"""openbookqa: science questions that combine a fact with common knowledge (Mihaylov et al. 2018)."""

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
    return shared_context(question, options, numbered_labels("answer", len(options)), numbered_gold(item))


TASK = Task(
    name="openbookqa",
    version=1,
    source=LLM_ADAPTERS + "openbookqa/test.json",
    count=500,
    chance_level=0.25,
    max_new_tokens=32,
    extraction=labelled("answer", 5),
    known_problems=("500 items: the standard error near chance is 1.9 points",),
    choices=_choices,
)
