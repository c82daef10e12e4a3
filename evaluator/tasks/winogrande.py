"""winogrande: which of two names fills the blank (Sakaguchi et al. 2020)."""

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
)

_LEAD = "Please choose the correct answer to fill in the blank to complete the given sentence: "


def _choices(item: Item) -> Choices:
    """The rest of the sentence after each filled-in name (Trinh and Le 2018, "partial evaluation")."""
    sentence, options = labelled_options(item, lead=_LEAD, label="Option", end=" ")
    before, _, after = sentence.partition("_")
    rest = after.strip()
    return Choices(
        contexts=tuple(before + option for option in options),
        continuations=(f" {rest}",) * len(options),
        lengths=(len(rest),) * len(options),
        labels=tuple(numbered_labels("option", len(options))),
        gold=numbered_gold(item),
    )


TASK = Task(
    name="winogrande",
    version=1,
    source=LLM_ADAPTERS + "winogrande/test.json",
    count=1267,
    chance_level=0.5,
    max_new_tokens=32,
    extraction=labelled("option", 2),
    known_problems=("the validation split of winogrande_xl: the test split has no public answers",),
    choices=_choices,
)
