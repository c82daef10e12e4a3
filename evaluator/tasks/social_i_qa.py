"""social_i_qa: questions about why people act and what follows (Sap et al. 2019)."""

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
    return shared_context(f"Q: {question}\nA:", options, numbered_labels("answer", len(options)), numbered_gold(item))


TASK = Task(
    name="social_i_qa",
    version=1,
    source=LLM_ADAPTERS + "social_i_qa/test.json",
    count=1954,
    chance_level=0.3333,
    max_new_tokens=32,
    extraction=labelled("answer", 5),
    known_problems=("the validation split: the test split has no public answers",),
    choices=_choices,
)
