"""What the demonstration's students learn and are scored on: questions whose answer stands in the sentence before.

    python deploy/studies/demo_inputs.py build/data/numbers

writes `train.jsonl`, and `numbers.yaml` with its items. No number of a training row occurs in an item.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

TRAIN_ROWS, ITEMS = 800, 100
_NAMES = ("Tom", "Anna", "Ben", "Lucy", "Sam", "Mia", "Jack", "Emma", "Paul", "Rosa")
_THINGS = ("apples", "books", "coins", "pens", "eggs", "cards", "shells", "stamps")
_SENTENCES = (
    ("{name} has {number} {things}.", "How many {things} does {name} have?"),
    ("There are {number} {things} in the box.", "How many {things} are in the box?"),
    ("{name} is {number} years old.", "How old is {name}?"),
    ("{name} bought {number} {things} today.", "How many {things} did {name} buy?"),
    ("The ticket costs {number} dollars.", "How much does the ticket cost?"),
    ("{name} saw {number} {things} on the table.", "How many {things} did {name} see?"),
)
_SMALLEST, _LARGEST, _NEW = 3, 99, 4  # multiples of _NEW are in items only


def rows(count: int, *, new: bool, seed: int) -> list[dict[str, str]]:
    """Different rows of `question`, `answer` (the sentence again) and `number`.

    Args:
        count: how many.
        new: whether numbers are those of items, or those of training rows.
        seed: of the draw.

    """
    rng, found = random.Random(seed), dict[str, dict[str, str]]()
    numbers = [number for number in range(_SMALLEST, _LARGEST + 1) if (number % _NEW == 0) == new]
    while len(found) < count:
        words = {"name": rng.choice(_NAMES), "things": rng.choice(_THINGS), "number": rng.choice(numbers)}
        sentence, question = (text.format(**words) for text in rng.choice(_SENTENCES))
        asked = f"{sentence} {question}"
        found[asked] = {"question": asked, "answer": sentence, "number": str(words["number"])}
    return list(found.values())


def write_inputs(out: Path) -> None:
    """Training rows, and the task with its items."""
    train, items = rows(TRAIN_ROWS, new=False, seed=0), rows(ITEMS, new=True, seed=1)
    _write_lines(out / "train.jsonl", [{"question": row["question"], "answer": row["answer"]} for row in train])
    _write_lines(out / "numbers.jsonl", items)
    task = {"name": "numbers", "data": "numbers.jsonl", "question": "{question}", "answer": "{number}"}
    (out / "numbers.yaml").write_text(json.dumps(task | {"extraction": "number", "max_new_tokens": 24}) + "\n")


def _write_lines(path: Path, lines: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    write_inputs(folder)
