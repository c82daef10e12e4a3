"""From what a model wrote to its final answer: LLM-Adapters' rules to the letter, and corrected ones beside them.

Every rule is a function from text to the canonical answer, or to the empty string when there is none. The
`paper_*` rules are those of `evaluate.py` and `commonsense_evaluate.py` in LLM-Adapters (Hu et al. 2023,
arXiv 2304.01933), with their consequences: "16-12" reads as -12, "$3/4" as 4, "Because" as option B, and
"answer10" as answer1. The corrected rules say what a reader would say (`numbers`, `choices`;
`benchmarks/extraction.py` shows how often). All run in time linear in the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from tutelage.evaluator.scoring.choices import corrected_letter, corrected_truth, label_reader
from tutelage.evaluator.scoring.numbers import canonical_number, corrected_number

NUMBER_TOLERANCE = 0.001
RULES_VERSION = 4
"""Rises when a rule reads an output differently, so that rows of older rules are not taken for present ones."""


@dataclass(frozen=True)
class Extraction:
    """How a task's answer is read and compared.

    Attributes:
        paper: LLM-Adapters' rule.
        corrected: the rule that a reader would apply.
        same: whether an extracted answer (not empty) is the target.

    """

    paper: Callable[[str], str]
    corrected: Callable[[str], str]
    same: Callable[[str, str], bool]


def score(extraction: Extraction, extracted: str, target: str) -> float:
    """1.0 for the right answer, 0.0 for a wrong one or none."""
    return float(bool(extracted) and extraction.same(extracted, target))


def same_number(extracted: str, target: str) -> bool:
    """Whether two numbers are at most 0.001 apart, as LLM-Adapters compares them."""
    return abs(float(target) - float(extracted)) <= NUMBER_TOLERANCE


# LLM-Adapters' rules.

_PAPER_NUMBER = re.compile(r"-?\d+\.?\d*")
_PAPER_LETTER = re.compile(r"A|B|C|D|E")


def paper_number(text: str) -> str:
    """The last run of digits (optional minus before, optional dot and digits after), commas deleted."""
    numbers = _PAPER_NUMBER.findall(text.replace(",", ""))
    return canonical_number(float(numbers[-1])) if numbers else ""


def paper_letter(text: str) -> str:
    """The first capital A, B, C, D or E anywhere."""
    found = _PAPER_LETTER.search(text)
    return found.group() if found else ""


def paper_label(text: str, *, labels: tuple[str, ...]) -> str:
    """The first of the labels, anywhere, case-sensitive, also inside words."""
    found = re.search("|".join(labels), text)
    return found.group() if found else ""


def _equal(extracted: str, target: str) -> bool:
    return extracted == target


def labelled(stem: str, count: int) -> Extraction:
    """Answers `<stem>1` … `<stem><count>`, for example `answer1` … `answer5`."""
    return Extraction(
        paper=partial(paper_label, labels=tuple(f"{stem}{index}" for index in range(1, count + 1))),
        corrected=label_reader(stem, count),
        same=_equal,
    )


NUMBER = Extraction(paper_number, corrected_number, same_number)
LETTER = Extraction(paper_letter, corrected_letter, _equal)
TRUTH = Extraction(partial(paper_label, labels=("true", "false")), corrected_truth, _equal)
