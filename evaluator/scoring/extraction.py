"""From what a model wrote to its final answer: LLM-Adapters' rules to the letter, and corrected ones beside them.

Every rule is a function from text to the canonical answer, or to the empty string when there is none. The
`paper_*` rules are those of `evaluate.py` and `commonsense_evaluate.py` in LLM-Adapters (Hu et al. 2023,
arXiv 2304.01933), with their consequences: "16-12" reads as -12, "$3/4" as 4, "Because" as option B, and
"answer10" as answer1. The corrected rules say what a reader would say. All run in time linear in the text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

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

RULES_VERSION = 2
"""Rises when a rule here reads an output differently, so that rows of older rules are not taken for present ones."""

_READ = 10_000  # characters at the end of an answer that are looked at, so that no text takes long
_MARKERS = 50
_REACH = 48  # characters after "the answer is" in which the answer must begin
_EQUATION_REACH = 400
_NEXT_TURNS = ("### Instruction", "### Response", "### Input", "\nQuestion:", "\nQ:")
_ANSWER_IS = re.compile(
    r"(?:answer|option|choice)(?:\s+(?:is|(?:would|should|must)\s+be)\b|\s*[:=])|####|\\boxed\{", re.IGNORECASE
)
# What reasoning models think, between tags of their own: DeepSeek-R1 and Qwen3, Magistral, Kimi. A chat template may
# have opened them already, so the closing one alone counts.
_THOUGHTS = (("<think>", "</think>"), ("<thinking>", "</thinking>"), ("[THINK]", "[/THINK]"), ("◁think▷", "◁/think▷"))
_NUMBER = re.compile(
    r"(?P<sign>(?<![\d)])[-−])?(?:\$(?P<sign_after>-)?)?"
    r"(?P<value>(?>\d{1,3}(?:,\d{3})++(?!\d)|\d++)(?:\.\d++)?|\.\d++)(?P<denominator>/\d++)?"
)
# What may stand between two numbers of a calculation, all on one line (a list goes on with "- 3"), and that it is one.
_CALCULATION = re.compile(r"(?>[^\S\n]|[$€£%()]|\\[a-z]++|[-+*/·×÷−x^])*+(?=[\d$.])")
_OPERATOR = re.compile(r"[-+*/·×÷−^]|\bx\b|\\(?:times|cdot|div)")
_EQUALS = re.compile(r"(?>[^\S\n]|[$€£%)}])*+=[^\S\n]*+(?=[-−$€£.\d])[€£]?")


def _answer(text: str) -> str:
    """What a model answers: without its thoughts, up to where it asks itself the next question; the end of that.

    Thoughts that do not end (an output that was cut off) leave no answer.
    """
    for opening, closing in _THOUGHTS:
        _, closed, after = text.rpartition(closing)
        text = after if closed else text.partition(opening)[0]
    ends = [position for turn in _NEXT_TURNS if (position := text.find(turn)) >= 0]
    return (text[: min(ends)] if ends else text)[-_READ:]


def _after_markers(text: str) -> list[int]:
    """Where "the answer is", "answer:", "####" and boxed answers end, the last first: who thinks again means that."""
    return [marker.end() for marker in _ANSWER_IS.finditer(text)][-_MARKERS:][::-1]


def _value(number: re.Match[str]) -> float:
    value = float(number["value"].replace(",", ""))
    if number["denominator"] and float(number["denominator"][1:]) != 0:
        value /= float(number["denominator"][1:])
    return -value if number["sign"] or number["sign_after"] else value


def _calculated(text: str, first: re.Match[str]) -> re.Match[str] | None:
    """The result of the calculation that begins with a number ("6 * 7 = 42"), or the number itself if none does.

    None for a calculation without a result, which is no number yet.
    """
    text = text[: first.start() + _EQUATION_REACH]
    number, calculates = first, False
    while True:
        equals = _EQUALS.match(text, number.end())
        between = None if equals else _CALCULATION.match(text, number.end())
        if between and not _OPERATOR.search(between.group()):
            between = None
        step = equals or between
        following = _NUMBER.match(text, step.end()) if step else None
        if following is None:
            return None if calculates else number
        number, calculates = following, equals is None


def corrected_number(text: str) -> str:
    """The number after the last "the answer is" that has one, else the last number.

    Reads thousands commas, currency signs, fractions and ".5"; a minus after a digit is a subtraction. Of a
    calculation the result counts.
    """
    text = _answer(text)
    for start in _after_markers(text):
        found = _NUMBER.search(text, start, start + _REACH)
        if found:
            # Again without the end of the reach, which may have cut it.
            result = _calculated(text, _NUMBER.match(text, found.start()) or found)
            return "" if result is None else canonical_number(_value(result))
    numbers = list(_NUMBER.finditer(text))
    return canonical_number(_value(numbers[-1])) if numbers else ""


# "A" before a lower-case word is the article, unless the word goes on about the option.
_OPTION = r"(?:[B-E]|A(?!\s(?!is\b|because\b|as\b|since\b)[a-z]))(?![\w'])"
_OPTION_AT_START = re.compile(rf"\s*(?:option\s+)?[(\[*]{{0,3}}({_OPTION})", re.IGNORECASE)
_BRACKETED = re.compile(r"\(([A-E])\)")
_STANDALONE = re.compile(rf"(?<![\w'])({_OPTION})")


def corrected_letter(text: str) -> str:
    """The option after the last "the answer is", else at the start, else the only one in brackets or standing alone."""
    text = _answer(text)
    for candidate in [*(text[start : start + _REACH] for start in _after_markers(text)), text]:
        found = _OPTION_AT_START.match(candidate)
        if found:
            return found.group(1).upper()
    for pattern in (_BRACKETED, _STANDALONE):
        letters = set(pattern.findall(text))
        if letters:
            return letters.pop() if len(letters) == 1 else ""
    return ""


# After a label that an output begins with: its end, a reason, or that it is right; not "or", nor a list of them.
_SETTLED = re.compile(
    r"[)\]*\"'”]*(?:\s*(?:[.!]|\Z|\n)|\s*,?\s*(?:because|since|as)\b|\s+is\s+(?:the\s+)?(?:correct|right|best|better|answer)\b)",
    re.IGNORECASE,
)
_OPENING = re.compile(r"[\s(\[*\"'“]*")


def corrected_label(text: str, *, pattern: re.Pattern[str], spelled: Mapping[str, str] = MappingProxyType({})) -> str:
    """The label after the last "the answer is", else the one at the start that is settled on, else the only one.

    Args:
        text: an output.
        pattern: of a label.
        spelled: what some labels stand for.

    """
    text = _answer(text)

    def labels_in(start: int, end: int) -> list[str]:
        found = ("".join(match.group().lower().split()) for match in pattern.finditer(text, start, end))
        return [spelled.get(label, label) for label in found]

    for start in _after_markers(text):
        if labels := labels_in(start, start + _REACH):
            return labels[0]
    labels = labels_in(0, len(text))
    if len(set(labels)) == 1:
        return labels[0]
    opening = _OPENING.match(text)
    first = pattern.match(text, opening.end() if opening else 0)
    return labels[0] if first and _SETTLED.match(text, first.end()) else ""


_TRUTH = re.compile(r"\b(?:true|false|yes|no)\b", re.IGNORECASE)
_SPELLED_OUT = MappingProxyType({"yes": "true", "no": "false"})


def corrected_truth(text: str) -> str:
    """True or false (or yes or no) as a whole word, in either case, by the rule of `corrected_label`."""
    return corrected_label(text, pattern=_TRUTH, spelled=_SPELLED_OUT)


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
