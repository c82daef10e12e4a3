"""arithmetic: generated word problems of one and two steps, disjoint from their training text; needs no data."""

from __future__ import annotations

import random

from tutelage.evaluator.scoring.extraction import NUMBER
from tutelage.evaluator.tasks import arithmetic_generator as arithmetic
from tutelage.evaluator.tasks.base import Choices, Item, Task, items_of_records
from tutelage.evaluator.tasks.multiple_choice import QUESTION_AND_ANSWER, shared_context

_COUNT = 1000


def _choices(item: Item) -> Choices:
    """The answer among three near misses, in an order drawn from the item."""
    options = [int(item.target), *arithmetic.distractors(int(item.target), item.item_hash)]
    # Without a shuffle the answer would always be the first choice, and a tie would count as right.
    random.Random(f"order {item.item_hash}").shuffle(options)  # noqa: S311
    texts = [str(option) for option in options]
    return shared_context(QUESTION_AND_ANSWER.format(question=item.instruction), texts, texts, texts.index(item.target))


TASK = Task(
    name="arithmetic",
    version=1,
    source="generated: evaluator/tasks/arithmetic_generator.py, split test, seed 0",
    count=_COUNT,
    chance_level=0.25,
    max_new_tokens=64,
    extraction=NUMBER,
    known_problems=("ten templates with numbers below 150: easier and narrower than written problems",),
    choices=_choices,
    load=lambda task, data_dir: items_of_records(arithmetic.generate("test", _COUNT, seed=0)),
)
