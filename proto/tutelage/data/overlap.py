"""Test items that are in training data: word for word, or by 13 words in a row.

An item overlaps with a row if they share 13 words in a row, as in "Language Models are Few-Shot Learners" (Brown et al.
2020, arXiv 2005.14165, appendix C) and lm-evaluation-harness (docs/decontamination.md, `Janitor.normalize_string`):
words are what stands between whitespace, in lower case, without punctuation; numbers are words. Where fewer than 13 are
left, an item can be found word for word only. Such a match is no evidence of the item, and does not count, if

- more than ten rows have those 13 words: phrases of the language (the same appendix);
- more than ten items of the task have them: its template. So are the words that all its items begin or end with (the
  harness compares the bare question, `doc_to_decontamination_query`);
- the text that has them lacks one of the item's numbers: another problem of one template. Such problems share all words
  between two numbers and after the last one, and those may be 13.
"""

from __future__ import annotations

import string
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from tutelage.data.conversations import REASONING, Conversation

WORDS = 13
_COMMON = 10
"""What more rows have, or more items of a task, tells none of them from the others."""
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Overlap:
    """What of a task's items is in some rows."""

    items: int
    """Of the task in all."""
    exact: int
    """Items that are a text of a row, but for whitespace and case."""
    shared: int
    """Further items that share 13 words in a row with a row."""
    example: tuple[int, str] | None
    """Index of the first exact item, else of the first that overlaps, and the first row that has it."""
    short: int
    """Items without 13 words in a row of their own, or of a language without spaces: found word for word only."""


@dataclass(frozen=True)
class _Question:
    """One item: the text that an exact row would be, its 13 words in a row that are its own, and its numbers."""

    text: str
    grams: Sequence[int]
    numbers: Counter[str]


def overlaps(tasks: Mapping[str, Sequence[str]], rows: Iterable[tuple[str, Sequence[str]]]) -> dict[str, Overlap]:
    """What of each task's items is in the rows; in time linear in the words of both, in memory in those of the items.

    Args:
        tasks: what each item of a task asks.
        rows: where each row stands, and its texts (`texts_of`); read once.

    """
    questions = {name: _questions(items) for name, items in tasks.items()}
    every = [question for of_task in questions.values() for question in of_task]
    wanted, wanted_grams = {each.text for each in every}, {gram for each in every for gram in each.grams}
    row_of_text: dict[str, str] = {}
    # By gram and row: the numbers of each text of the row that has the gram.
    found: defaultdict[int, dict[str, list[Counter[str]]]] = defaultdict(dict)
    for where, texts in rows:
        for text in texts:
            if (same := _same(text)) in wanted:
                row_of_text.setdefault(same, where)
            words = _words(text)
            shared = wanted_grams.intersection(_grams(words))
            numbers = _numbers(words) if shared else Counter[str]()
            for gram in shared:
                if len(found[gram]) <= _COMMON:
                    found[gram].setdefault(where, []).append(numbers)

    def row_that_shares(question: _Question) -> str | None:
        for rows_of_gram in (found[gram] for gram in question.grams if gram in found):
            for where, numbers in rows_of_gram.items() if len(rows_of_gram) <= _COMMON else ():
                if any(question.numbers <= of_text for of_text in numbers):
                    return where
        return None

    def overlap(questions: Sequence[_Question]) -> Overlap:
        exact, partly = [], []
        for index, question in enumerate(questions):
            if question.text in row_of_text:
                exact.append((index, row_of_text[question.text]))
            elif (where := row_that_shares(question)) is not None:
                partly.append((index, where))
        short = sum(not question.grams for question in questions)
        return Overlap(len(questions), len(exact), len(partly), next(iter(exact + partly), None), short)

    return {name: overlap(of_task) for name, of_task in questions.items()}


def texts_of(conversation: Conversation) -> list[str]:
    """What is said in a conversation: each message (with the row's `input`), the answer, what was thought."""
    answer = conversation.completion
    said = list(conversation.messages)
    if answer is not None:
        said.append(answer if isinstance(answer, dict) else {"content": answer})
    texts = [str(message["content"]) for message in said]
    if conversation.instruction_input:  # of the instruction format, which has one message
        texts[0] += f"\n{conversation.instruction_input}"
    return texts + [str(message[key]) for message in said for key in REASONING if key in message]


def _questions(items: Sequence[str]) -> list[_Question]:
    """The items of a task, without what is its template; of few items nobody can tell."""
    words = [_words(item) for item in items]
    if len(items) > _COMMON:
        start = _common(words)
        end = _common([each[start:][::-1] for each in words])
        words = [each[start : len(each) - end] for each in words]
    grams = [list(_grams(each)) for each in words]
    count = Counter(gram for each in grams for gram in set(each))
    return [
        _Question(_same(item), [gram for gram in own if count[gram] <= _COMMON], _numbers(each))
        for item, own, each in zip(items, grams, words, strict=True)
    ]


def _common(texts: Sequence[list[str]]) -> int:
    """So many words all texts begin with: those of the first and the last in order."""
    pairs = zip(min(texts), max(texts), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _same(text: str) -> str:
    return " ".join(text.lower().split())


def _words(text: str) -> list[str]:
    return text.lower().translate(_NO_PUNCTUATION).split()


def _numbers(words: Sequence[str]) -> Counter[str]:
    return Counter(word for word in words if word.isdigit())


def _grams(words: Sequence[str]) -> Iterator[int]:
    """Hashes (64 bits) of all 13 words in a row."""
    return map(hash, zip(*(words[start:] for start in range(WORDS)), strict=False))
