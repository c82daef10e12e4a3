"""Arithmetic word problems from a seed, with worked rationales: training text and a test set that share nothing.

A problem belongs to the training or to the test split by a checksum of its sorted operands, so that no two
problems of different splits have the same numbers, whatever their story, names or things are.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from tutelage.errors import ConfigurationError

Split = Literal["train", "test"]
MAX_COUNT = 50_000
_TEST_SHARE = 5  # one set of operands in five

_NAMES = (
    "Ann", "Ben", "Carla", "Dev", "Elena", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kavya", "Liam", "Mona", "Nils",
    "Olga", "Pablo", "Quinn", "Rosa", "Samir", "Tess",
)  # fmt: skip
_THINGS = (
    "apples", "books", "buttons", "cards", "coins", "cookies", "eggs", "marbles", "pears", "pencils", "plums",
    "shells", "stamps", "stickers", "stones", "tickets",
)  # fmt: skip
_CONTAINERS = ("bags", "baskets", "boxes", "crates", "jars", "trays")


@dataclass(frozen=True)
class _Story:
    """A template.

    Attributes:
        draw: its operands, two or three; every intermediate result is a positive whole number.
        operators: applied from left to right.
        question: with {a}, {b}, {c} for the operands, and the names and things.

    """

    draw: Callable[[random.Random], tuple[int, ...]]
    operators: str
    question: str

    def work(self, operands: Sequence[int]) -> tuple[str, int]:
        """The worked steps, and what comes out."""
        result, steps = operands[0], []
        for operator, operand in zip(self.operators, operands[1:], strict=True):
            before, result = result, _APPLY[operator](result, operand)
            steps.append(f"{before} {operator} {operand} = {result}.")
        return (steps[0] if len(steps) == 1 else f"First {steps[0]} Then {steps[1]}"), result


_APPLY = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}


def _sum(rng: random.Random) -> tuple[int, ...]:
    return rng.randint(2, 60), rng.randint(2, 60)


def _larger_first(rng: random.Random) -> tuple[int, ...]:
    small, large = sorted(rng.sample(range(2, 60), 2))
    return large, small


def _quotient(rng: random.Random) -> tuple[int, ...]:
    divisor, result = rng.randint(2, 12), rng.randint(2, 12)
    return divisor * result, divisor


def _gain_then_loss(rng: random.Random) -> tuple[int, ...]:
    first, second = rng.randint(2, 40), rng.randint(2, 40)
    return first, second, rng.randint(1, first + second - 1)


def _boxes_less_some(rng: random.Random) -> tuple[int, ...]:
    boxes, each = rng.randint(2, 10), rng.randint(2, 10)
    return boxes, each, rng.randint(1, boxes * each - 1)


def _shared_sum(rng: random.Random) -> tuple[int, ...]:
    sharers, each = rng.randint(2, 9), rng.randint(2, 10)
    first = rng.randint(1, sharers * each - 1)
    return first, sharers * each - first, sharers


# The order of the stories and of the draws in each decides the published test set; a new story changes all of it.
_STORIES = (
    _Story(_sum, "+", "{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?"),
    _Story(
        _sum,
        "+",
        "{name} found {a} {things} in the morning and {b} {things} in the evening. How many {things} is that in all?",
    ),
    _Story(_larger_first, "-", "{name} had {a} {things} and gave {b} of them to {other}. How many {things} are left?"),
    _Story(
        _larger_first,
        "-",
        "{name} has {a} {things} and {other} has {b}. How many more {things} does {name} have than {other}?",
    ),
    _Story(
        lambda rng: (rng.randint(2, 12), rng.randint(2, 12)),
        "*",
        "{name} has {a} {containers} with {b} {things} in each. How many {things} are there altogether?",
    ),
    _Story(
        _quotient,
        "/",
        "{name} puts {a} {things} into {b} {containers}, the same number in each. How many {things} are in each?",
    ),
    _Story(
        _gain_then_loss,
        "+-",
        "{name} has {a} {things}, gets {b} more from {other}, and then loses {c}. How many {things} are left?",
    ),
    _Story(
        lambda rng: (rng.randint(2, 10), rng.randint(2, 10), rng.randint(2, 30)),
        "*+",
        "{name} fills {a} {containers} with {b} {things} each and keeps {c} {things} in a pocket. "
        "How many {things} does {name} have?",
    ),
    _Story(
        _boxes_less_some,
        "*-",
        "{name} bought {a} {containers} of {b} {things} each and sold {c} {things}. How many {things} are left?",
    ),
    _Story(
        _shared_sum,
        "+/",
        "{name} has {a} {things} and {other} has {b}. They share all of them equally among {c} friends. "
        "How many {things} does each friend get?",
    ),
)


def split_of(operands: tuple[int, ...]) -> Split:
    """The split to which every problem with these numbers, in whatever order, belongs."""
    checksum = zlib.crc32(repr(tuple(sorted(operands))).encode())
    return "test" if checksum % _TEST_SHARE == 0 else "train"


def generate(split: Split, count: int, seed: int) -> list[dict[str, str]]:
    """Problems of one split, no question twice.

    Args:
        split: "train" or "test".
        count: how many, 1 … 50,000.
        seed: the same seed gives the same problems; a longer list begins with the shorter one.

    Returns:
        records of `instruction`, `input` (empty), `output` (worked steps that end "The answer is N.") and
        `answer` (an integer as text), the form of LLM-Adapters' files.

    Raises:
        ConfigurationError: another split or count.

    """
    if split not in ("train", "test"):
        raise ConfigurationError(f"{split!r} is not a split; choose train or test", "split")
    if not 1 <= count <= MAX_COUNT:
        raise ConfigurationError(f"cannot generate {count} problems; choose 1 to {MAX_COUNT}", "count")
    rng = random.Random(f"arithmetic {split} {seed}")  # noqa: S311
    records: dict[str, dict[str, str]] = {}
    while len(records) < count:
        story = rng.choice(_STORIES)
        operands = story.draw(rng)
        while split_of(operands) != split:
            operands = story.draw(rng)
        name, other = rng.sample(_NAMES, 2)
        question = story.question.format(
            **dict(zip("abc", operands, strict=False)),
            name=name,
            other=other,
            things=rng.choice(_THINGS),
            containers=rng.choice(_CONTAINERS),
        )
        steps, answer = story.work(operands)
        output = f"{steps} The answer is {answer}."
        record = {"instruction": question, "input": "", "output": output, "answer": str(answer)}
        records.setdefault(question, record)
    return list(records.values())


def distractors(answer: int, key: str, count: int = 3) -> list[int]:
    """Wrong answers near the right one: distinct, not negative, the same for the same key."""
    rng = random.Random(f"distractors {key}")  # noqa: S311
    near = [answer + offset for offset in (-10, -3, -2, -1, 1, 2, 3, 10, 11, 20) if answer + offset >= 0]
    return rng.sample(near, count)
