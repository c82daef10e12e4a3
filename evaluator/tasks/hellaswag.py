"""hellaswag: which of four endings follows (Zellers et al. 2019)."""

from __future__ import annotations

import re

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

_LEAD = "Please choose the correct ending to complete the given sentence: "
_OPENING = re.compile(r"(?<=[.!?]) (?=[^.!?]*\Z)")


def _clean(text: str) -> str:
    """Without WikiHow's section tags, as lm-evaluation-harness cleans it."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[[^\]\n]*\]", "", text).replace("  ", " ")


def _capitalized_opening(context: str) -> str:
    """The unfinished last sentence starts with a capital and goes on in lower case (Python's `capitalize`)."""
    finished, _, opening = _OPENING.sub("\n", context).rpartition("\n")
    return f"{finished} {opening.capitalize()}" if finished else context


def _choices(item: Item) -> Choices:
    context, endings = labelled_options(item, lead=_LEAD, label="Ending")
    endings = [_clean(ending) for ending in endings]
    labels = numbered_labels("ending", len(endings))
    return shared_context(_clean(_capitalized_opening(context)), endings, labels, numbered_gold(item))


TASK = Task(
    name="hellaswag",
    version=1,
    source=LLM_ADAPTERS + "hellaswag/test.json (the public validation split)",
    count=10042,
    chance_level=0.25,
    max_new_tokens=32,
    extraction=labelled("ending", 4),
    known_problems=(
        "the paper's prompt keeps WikiHow's tags such as [header]; loglik removes them",
        "where the unfinished sentence begins is read off the punctuation, which the file does not mark",
    ),
    choices=_choices,
)
