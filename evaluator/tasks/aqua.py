"""AQuA: algebra word problems with five options (Ling et al. 2017)."""

from __future__ import annotations

from tutelage.evaluator.scoring.extraction import LETTER
from tutelage.evaluator.tasks.base import LLM_ADAPTERS, Choices, Item, Task, shared_context


def _choices(item: Item) -> Choices:
    """Options' texts after "Question: …⏎Answer:"; lm-evaluation-harness has AQuA only in AGIEval's own prompt."""
    question, _, rest = item.instruction.partition(" Answer Choices: (A) ")
    options = []
    for letter in "BCDE":
        option, _, rest = rest.partition(f" ({letter}) ")
        options.append(option.strip())
    context = f"Question: {question}\nAnswer:"
    return shared_context(context, [*options, rest.strip()], list("ABCDE"), "ABCDE".index(item.target))


TASK = Task(
    name="AQuA",
    version=1,
    source=LLM_ADAPTERS + "AQuA/test.json",
    count=254,
    chance_level=0.2,
    max_new_tokens=256,
    extraction=LETTER,
    known_problems=(
        "the paper's extraction takes the first capital A to E anywhere, so 'Because …' is option B",
        "254 items: the standard error near chance is 2.5 points",
    ),
    choices=_choices,
)
