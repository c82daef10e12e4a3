"""The choice that an output settles on: an option's letter, a label such as `answer3`, true or false.

All three are read alike: find what is mentioned, leave out what is denied or merely listed, take what is committed to.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from tutelage.evaluator.scoring.reading import JUDGED, answer_text, attempts, without_confirmations, without_reasons

_REACH = 48  # characters after "the answer is" in which the answer must begin
_MARKERS = 50
_NOUN = r"(?:answer|option|choice|solution|ending)"
_ANSWER_IS = re.compile(
    rf"{_NOUN}\s*+(?:is|(?:would|should|must)\s+be)\b(?!{JUDGED})\s*+[:：]?"
    rf"|{_NOUN}\s*+[:=：]|####|\\boxed\{{|<answer>",
    re.IGNORECASE,
)
_OPENING = re.compile(r"(?:[\s(\[*\"'“#]|\\boxed\{|\\text\w*\{)*+")
# After a choice that an output begins with: its end ("B)" and "2:" too), a reason, or that it is right; not "or", nor a
# list of them.
_SETTLED = re.compile(
    r"(?<=\b\w)[)\].:]{1,2}\s|[)\]*\"'”}]*+(?:\s*+(?:[.!;]|\Z|\n)|,(?!\s*(?:and|or)\b)|\s*+(?:because|since|as)\b"
    r"|\s+(?:is|looks|seems|fits|makes)\s+(?:the\s+)?(?:most|correct|right|best|better|answer|true|more|sense)\b)",
    re.IGNORECASE,
)
_LISTING = re.compile(r"[\s)\]*\"'(\[,/]*+(?:and/or|or|and|nor|&)?[\s(\[*\"']*+(?:option|answer)?\s*+")
_OR = re.compile(r"[)\]*\"'”]*+,?\s++(?:and/)?or\s++[(\[*\"'“]*+", re.IGNORECASE)
_DENIAL = (
    r"(?:\b(?:I|we)\s(?:do|did|would|can)(?:\snot|n['’]t)\s(?:think|believe|say|feel|agree)"
    r"|\b(?:not|never|cannot|hardly|no longer|far from|by no means|in no way|I doubt)|n['’]t)\b"
)
# Between a denial and what it denies: "not [always] true", "do not think [that it is] B"; but "not only true".
_BETWEEN = (
    r"(?:be|been|an?|the|to|is|are|was|(?:it|this|that)(?:['’]s)?|seem|appear|look|case"
    r"|statement|claim|sentence|option|answer|always|quite|so|at all|even|ever|(?!only\b)[a-z]{2,16}ly)\b"
)
_DENYING = re.compile(rf"{_DENIAL}|\b(?:rather than|instead of|neither|nor)\b", re.IGNORECASE)
_DENIED_BEFORE = re.compile(rf"(?:{_DENYING.pattern})(?:\s+{_BETWEEN}){{0,8}}+[\s(\[*\"']*+", re.IGNORECASE)
_DENIAL_REACH = 64
_DENIED_AFTER = re.compile(
    r"[)\]*\"']*+\s+(?:is|are|was|would be|seems?|looks?)\s+(?:too\b|wrong|incorrect|false|not\b|impossible)",
    re.IGNORECASE,
)
_CONCLUDES = re.compile(
    r"\b(?:so|therefore|thus|hence|but|choose|chose|pick|take|go with|in fact|conclusion|only|must be)\b"
    r"|;\s*it(?: is|'s)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Mention:
    """A choice that is named in a text, and where."""

    start: int
    end: int
    value: str


@dataclass(frozen=True)
class Choices:
    """What can be chosen.

    Attributes:
        mentions: finds the choices that a text names.
        bare: a shorter name, which counts only where nothing but a choice is expected.
        value_of: the choice that a bare name stands for, or empty.

    """

    mentions: Callable[[str], Sequence[Mention]]
    bare: re.Pattern[str]
    value_of: Callable[[str], str]


def settled(text: str, choices: Choices) -> str:
    """The choice of the last attempt that names one; empty if none does or it names several and settles on none.

    Within an attempt: what follows the last "the answer is", else what it begins with and settles on, else the only
    one named, else the last after a concluding word.
    """
    for attempt in attempts(text):
        named = choices.mentions(attempt)
        kept = _undenied(attempt, named)
        found = (
            _after_marker(attempt, named, kept, choices)
            or _at_start(attempt, kept, choices)
            or _stated(attempt, kept, choices)
        )
        if found or named:
            return found
    return ""


def _after_marker(text: str, named: Sequence[Mention], kept: Sequence[Mention], choices: Choices) -> str:
    for marker in [*_ANSWER_IS.finditer(text)][-_MARKERS:][::-1]:
        if (short := _bare(text, marker.end(), choices)) and (value := choices.value_of(short.group())):
            several = _listed(text, named, short.start()) or _or_another(text, short, choices)
            return "" if several or _denied(text, marker.start(), _denials(text)) else value
        after = [one for one in kept if marker.end() <= one.start < marker.end() + _REACH]
        if after:
            return after[0].value
    return ""


def _at_start(text: str, kept: Sequence[Mention], choices: Choices) -> str:
    short = _bare(text, 0, choices)
    if short and _SETTLED.match(text, short.end()) and (value := choices.value_of(short.group())):
        return value
    begins = kept and _OPENING.fullmatch(text, 0, kept[0].start)
    return kept[0].value if begins and _SETTLED.match(text, kept[0].end) else ""


def _bare(text: str, start: int, choices: Choices) -> re.Match[str] | None:
    opening = _OPENING.match(text, start)
    return choices.bare.match(text, opening.end() if opening else start)


def _stated(text: str, kept: Sequence[Mention], choices: Choices) -> str:
    stated = without_reasons(text)
    short = _undenied(stated, choices.mentions(stated)) if stated != text else []
    for part, mentions in ((stated, short), (text, kept)):
        if len({one.value for one in mentions}) == 1:
            return mentions[0].value
        if mentions:
            concludes = _CONCLUDES.search(part, mentions[-2].end, mentions[-1].start)
            return mentions[-1].value if concludes else ""
    return ""


def _listed(text: str, named: Sequence[Mention], position: int) -> bool:
    """Whether the mention at a position begins a list of different ones."""
    for one, other in pairwise(named):
        if one.start == position:
            return one.value != other.value and _LISTING.fullmatch(text, one.end, other.start) is not None
    return False


def _or_another(text: str, short: re.Match[str], choices: Choices) -> bool:
    """Whether a bare name has another one beside it ("2 or 3")."""
    alternative = _OR.match(text, short.end())
    return alternative is not None and choices.bare.match(text, alternative.end()) is not None


def _undenied(text: str, named: Sequence[Mention]) -> list[Mention]:
    """Without what a text says is not the answer, and without lists of different choices."""
    denials = _denials(text)
    dropped: set[int] = set()
    for index, (one, other) in enumerate(pairwise(named)):
        if one.value != other.value and _LISTING.fullmatch(text, one.end, other.start):
            dropped |= {index, index + 1}
    return [
        one
        for index, one in enumerate(named)
        if index not in dropped and not _denied(text, one.start, denials) and not _DENIED_AFTER.match(text, one.end)
    ]


def _denials(text: str) -> list[int]:
    return [found.start() for found in _DENYING.finditer(text)]


def _denied(text: str, position: int, denials: Sequence[int]) -> bool:
    """Whether the last of the denials before a position denies what begins there."""
    index = bisect_left(denials, position)
    if not index or position - denials[index - 1] > _DENIAL_REACH:
        return False
    return _DENIED_BEFORE.fullmatch(text, denials[index - 1], position) is not None


# Letters. "A" before a lower-case word is the article, unless the word goes on about the option; not a name ("A's").

_OPTION = r"(?:[B-E]|A(?!\s(?!is\b|because\b|as\b|since\b|or\b|and\b|but\b|looks\b|seems\b|fits\b)[a-z]))(?![\w'’])"
_STANDALONE = re.compile(rf"(?<![\w'])({_OPTION})")
_BRACKETED = re.compile(r"\(([A-E])\)")
_BARE_LETTER = re.compile(rf"(?:option\s+)?[(\[*]{{0,3}}({_OPTION})", re.IGNORECASE)
_OPTION_LIST = re.compile(r"(?m)(?:^[^\S\n]*+\(?[A-E][).:][^\n]*+\n*+){3,}")


def corrected_letter(text: str) -> str:
    """The option A to E that an output settles on; letters in brackets go before letters that stand alone."""
    text = _OPTION_LIST.sub("\n", without_confirmations(answer_text(text)))

    def mentions(part: str) -> list[Mention]:
        pattern = _BRACKETED if _BRACKETED.search(part) else _STANDALONE
        return [Mention(found.start(), found.end(), found[1]) for found in pattern.finditer(part)]

    return settled(text, Choices(mentions, _BARE_LETTER, lambda name: name[-1].upper()))


# Labels.

_COUNTED = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth")
_INDEX = {word: index for words in (_COUNTED, _ORDINALS) for index, word in enumerate(words, 1)}
_BARE_LABEL = re.compile(
    rf"(?:\d{{1,3}}|(?:the\s+)?(?:{'|'.join((*_COUNTED, *_ORDINALS))}))\b(?!\.\d|,\d|/)", re.IGNORECASE
)
_ITEM = re.compile(r"(?<!\S)[(\[]?([1-9])[)\].:]\s(?!\s*+(?:is|are|would|does|seems)\b)")


def _without_item_numbers(text: str) -> str:
    """Without the numbers of a list that counts 1, 2, …: options, or steps."""
    numbers = [found[1] for found in _ITEM.finditer(text)]
    return _ITEM.sub(" ", text) if numbers[:2] == ["1", "2"] else text


def label_reader(stem: str, count: int) -> Callable[[str], str]:
    """A rule that reads the labels `<stem>1` … `<stem><count>`, also as "2", "second answer", "Option two"."""
    pattern = re.compile(
        rf"\b(?:{stem}|answer|option|choice|solution|ending)[^\S\n]?#?(\d{{1,3}}(?!\d)|(?:{'|'.join(_COUNTED)})\b)"
        rf"|\b({'|'.join(_ORDINALS)})\s+(?:{stem}|answer|option|choice|solution|ending|one)\b",
        re.IGNORECASE,
    )

    def value_of(name: str) -> str:
        name = name.lower().split()[-1]
        index = int(name) if name.isdigit() else _INDEX[name]
        return f"{stem}{index}" if 1 <= index <= count else ""

    def mentions(text: str) -> list[Mention]:
        found = [(one, value_of(one[1] or one[2])) for one in pattern.finditer(text)]
        return [Mention(one.start(), one.end(), value) for one, value in found if value]

    def read(text: str) -> str:
        text = _without_item_numbers(without_confirmations(answer_text(text)))
        return settled(text, Choices(mentions, _BARE_LABEL, value_of))

    return read


# Truth values.

_TRUE = {"true", "yes", "correct", "right"}
_TRUTH = re.compile(
    rf"(?P<denied>{_DENIAL}(?:\s+{_BETWEEN}){{0,8}}+\s+)?"
    r"(?:\b(?P<word>true|false|untrue)"
    r"|(?(denied)|(?:(?<=is )|(?<=was )))(?P<predicate>correct|incorrect|right|wrong)"
    r"(?!\s+(?:to call|answer|option))"
    r"|\b(?P<answer>yes|no)(?=\s*(?:[.,!;:)\]*\"']|and\b|or\b|\Z)))\b",
    re.IGNORECASE,
)
# What would be true, or whether something is, says neither.
_HYPOTHETICAL = re.compile(
    r"\b(?:(?:would|could|might|may)\s+(?:only\s+|also\s+)?be|(?:might|may)\s+not\s+be"
    rf"|(?:if|whether)(?:\s+{_BETWEEN}){{1,8}}+)\s+(?:true|false)\b",
    re.IGNORECASE,
)
_BARE_TRUTH = re.compile(r"(?:true|false|yes|no)\b", re.IGNORECASE)


def corrected_truth(text: str) -> str:
    """True or false (or yes or no, correct or wrong), turned round where it is denied."""

    def value_of(name: str) -> str:
        return "true" if name.lower() in _TRUE else "false"

    def mentions(part: str) -> list[Mention]:
        return [Mention(one.start(), one.end(), _truth_of(one)) for one in _TRUTH.finditer(part)]

    return settled(_HYPOTHETICAL.sub(" ", answer_text(text)), Choices(mentions, _BARE_TRUTH, value_of))


def _truth_of(found: re.Match[str]) -> str:
    true = (found["word"] or found["predicate"] or found["answer"]).lower() in _TRUE
    return "true" if true != bool(found["denied"]) else "false"
