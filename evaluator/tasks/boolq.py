"""boolq: yes-or-no questions that people asked a search engine, without the passage (Clark et al. 2019)."""

from __future__ import annotations

from tutelage.evaluator.scoring.extraction import TRUTH
from tutelage.evaluator.tasks.base import LLM_ADAPTERS, Choices, Item, Task, shared_context

_LEAD = "Please answer the following question with true or false, question: "


def _choices(item: Item) -> Choices:
    """No or yes, as lm-evaluation-harness, but without the passage that it gives."""
    question = item.instruction.removeprefix(_LEAD).partition("\n\nAnswer format: ")[0]
    context = f"Question: {question.removesuffix('?')}?\nAnswer:"
    return shared_context(context, ["no", "yes"], ["false", "true"], ["false", "true"].index(item.target))


TASK = Task(
    name="boolq",
    version=1,
    source=LLM_ADAPTERS + "boolq/test.json",
    count=3270,
    chance_level=0.5,
    max_new_tokens=32,
    extraction=TRUTH,
    known_problems=(
        "closed-book: the passage is not given",
        "62.2 % of the answers are true, so always saying true scores 62.2 %",
    ),
    choices=_choices,
)
