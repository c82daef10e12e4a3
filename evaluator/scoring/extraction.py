"""From what a model wrote to its final answer: LLM-Adapters' rules to the letter, and corrected ones beside them.

Every rule is a function from text to the canonical answer, or to the empty string when there is none. The
`paper_*` rules are those of `evaluate.py` and `commonsense_evaluate.py` in LLM-Adapters (Hu et al. 2023,
arXiv 2304.01933), with their consequences: "16-12" reads as -12, "$3/4" as 4, "Because" as option B, and
"answer10" as answer1. The corrected rules say what a reader would say. All run in time linear in the text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice

NUMBER_TOLERANCE = 0.001


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


def canonical_number(value: float) -> str:
    """One spelling a value ("4", "4.0" and "4." agree); empty for what is not finite."""
    if not math.isfinite(value):
        return ""
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)


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


# Corrected rules. `++` and `(?>…)` do not backtrack.

_READ = 10_000  # characters; no protocol here lets a model write as many
_MARKERS = 50
_REACH = 48  # characters after "the answer is" in which the answer must begin
_NEXT_TURNS = ("### Instruction", "### Response", "### Input", "\nQuestion:", "\nQ:")
_ANSWER_IS = re.compile(r"(?:answer|option|choice)(?:\s+is|\s*[:=])|####|\\boxed\{", re.IGNORECASE)
_NUMBER = re.compile(
    r"(?P<sign>(?<![\d)])[-−])?(?:\$(?P<sign_after>-)?)?"
    r"(?P<value>(?>\d{1,3}(?:,\d{3})++(?!\d)|\d++)(?:\.\d++)?|\.\d++)(?P<denominator>/\d++)?"
)


def _first_turn(text: str) -> str:
    """The text up to where the model starts to ask itself the next question."""
    text = text[:_READ]
    ends = [position for turn in _NEXT_TURNS if (position := text.find(turn)) >= 0]
    return text[: min(ends)] if ends else text


def _after_markers(text: str) -> list[str]:
    """What follows the first few "the answer is", "answer:", "####" or boxed answers, in order."""
    markers = islice(_ANSWER_IS.finditer(text), _MARKERS)
    return [text[marker.end() : marker.end() + _REACH] for marker in markers]


def _value(number: re.Match[str]) -> float:
    value = float(number["value"].replace(",", ""))
    if number["denominator"] and float(number["denominator"][1:]) != 0:
        value /= float(number["denominator"][1:])
    return -value if number["sign"] or number["sign_after"] else value


def corrected_number(text: str) -> str:
    """The number after the first "the answer is" that has one, else the last number.

    Reads thousands commas, currency signs, fractions and ".5"; a minus after a digit is a subtraction.
    """
    text = _first_turn(text)
    for tail in _after_markers(text):
        found = _NUMBER.search(tail)
        if found:
            return canonical_number(_value(found))
    numbers = list(_NUMBER.finditer(text))
    return canonical_number(_value(numbers[-1])) if numbers else ""


# "A" before a lower-case word is the article, unless the word goes on about the option.
_OPTION = r"(?:[B-E]|A(?!\s(?!is\b|because\b|as\b|since\b)[a-z]))(?![\w'])"
_OPTION_AT_START = re.compile(rf"\s*(?:option\s+)?[(\[*]{{0,3}}({_OPTION})", re.IGNORECASE)
_BRACKETED = re.compile(r"\(([A-E])\)")
_STANDALONE = re.compile(rf"(?<![\w'])({_OPTION})")


def corrected_letter(text: str) -> str:
    """The option after "the answer is", else at the start, else the only one in brackets or standing alone."""
    text = _first_turn(text)
    for candidate in [*_after_markers(text), text]:
        found = _OPTION_AT_START.match(candidate)
        if found:
            return found.group(1).upper()
    for pattern in (_BRACKETED, _STANDALONE):
        letters = set(pattern.findall(text))
        if letters:
            return letters.pop() if len(letters) == 1 else ""
    return ""


def _labels_in(text: str, pattern: re.Pattern[str]) -> list[str]:
    return ["".join(found.group().lower().split()) for found in pattern.finditer(text)]


def corrected_label(text: str, *, pattern: re.Pattern[str]) -> str:
    """The label after "the answer is", else the only label of the text; several different ones are no answer."""
    text = _first_turn(text)
    for tail in _after_markers(text):
        labels = _labels_in(tail, pattern)
        if labels:
            return labels[0]
    labels = _labels_in(text, pattern)
    return labels[0] if len(set(labels)) == 1 else ""


_TRUTH = re.compile(r"\b(?:true|false|yes|no)\b", re.IGNORECASE)
_SPELLED_OUT = {"yes": "true", "no": "false"}


def corrected_truth(text: str) -> str:
    """True or false (or yes or no) as a whole word, in either case, by the rule of `corrected_label`."""
    label = corrected_label(text, pattern=_TRUTH)
    return _SPELLED_OUT.get(label, label)


def _equal(extracted: str, target: str) -> bool:
    return extracted == target


def labelled(stem: str, count: int) -> Extraction:
    """Answers `<stem>1` … `<stem><count>`, for example `answer1` … `answer5`."""
    return Extraction(
        paper=partial(paper_label, labels=tuple(f"{stem}{index}" for index in range(1, count + 1))),
        corrected=partial(corrected_label, pattern=re.compile(rf"\b{stem}[^\S\n]?[1-{count}](?!\d)", re.IGNORECASE)),
        same=_equal,
    )


NUMBER = Extraction(paper_number, corrected_number, same_number)
LETTER = Extraction(paper_letter, corrected_letter, _equal)
TRUTH = Extraction(partial(paper_label, labels=("true", "false")), corrected_truth, _equal)
