"""Why an answer to a word problem of one operation (SVAMP and its like) is wrong: one kind an output, by these rules.

Taken in this order, the first that holds is the kind:

1. `right`: the paper's extraction has the target.
2. `no_answer`: there is no number in the output.
3. `extraction_failure`: the corrected extraction has the target, or the output states "= target"; only the reading
   was wrong.
4. `arithmetic_slip`: an equation `a ∘ b = c` of the output is false, and with its true result the target is reached.
5. `wrong_operation`: the answer is a ∘ b of two numbers of the question whose target is another operation on the
   same two.
6. `wrong_operand`: the answer is a ∘ b of two numbers of the question, while the target is the same operation on
   another pair of them, or is an operation at all and the answer is a number of the question itself.
7. `other`.

∘ is one of + - * /. Numbers are equal within 0.001, as the score has it. Only the rules that a rationale states are
read off it (3 and 4); 5 and 6 need the answer alone, so they also hold for a model that writes no rationale.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice, permutations
from typing import Literal, get_args

import polars as pl

from tutelage.evaluator.scoring.extraction import NUMBER_TOLERANCE
from tutelage.evaluator.scoring.numbers import corrected_number

Kind = Literal[
    "right", "no_answer", "extraction_failure", "arithmetic_slip", "wrong_operation", "wrong_operand", "other"
]
KINDS: tuple[Kind, ...] = get_args(Kind)
ONE_OPERATION_TASKS = ("SVAMP",)  # the others' problems take several steps, of which these rules know nothing
# A model that repeats itself writes megabytes: what is read of it is bounded, so that its reading is.
_READ = 10_000  # characters
_EQUATIONS = 200
_QUESTION_NUMBERS = 12
_VALUE = r"-?\$?\d++(?:\.\d++)?"
_EQUATION = re.compile(rf"({_VALUE})[ ]?([-+*/x×÷−])[ ]?({_VALUE})[ ]?=[ ]?({_VALUE})")
_RESULT = re.compile(rf"=[ ]?({_VALUE})")
_QUESTION_NUMBER = re.compile(r"\d++(?:\.\d++)?")
_SIGNS = {"x": "*", "×": "*", "÷": "/", "−": "-"}


def kind_of(question: str, output: str, extracted: str, target: str) -> Kind:
    """The kind of one output.

    Args:
        question: as it was asked.
        output: what the model wrote.
        extracted: the paper's extraction of it; may be empty.
        target: a number.

    """
    wanted, text = float(target), output.replace(",", "")[:_READ]
    if extracted and _same(float(extracted), wanted):
        return "right"
    if not extracted:
        return "no_answer"
    corrected = corrected_number(output)
    states = any(_same(_float(found.group(1)), wanted) for found in islice(_RESULT.finditer(text), _EQUATIONS))
    if states or (corrected and _same(float(corrected), wanted)):
        return "extraction_failure"
    for found in islice(_EQUATION.finditer(text), _EQUATIONS):
        left, sign, right, stated = found.groups()
        true = _apply(_SIGNS.get(sign, sign), _float(left), _float(right))
        if true is not None and _same(true, wanted) and not _same(_float(stated), true):
            return "arithmetic_slip"
    # What no rationale states is read off the numbers of the question.
    found_numbers = _QUESTION_NUMBER.findall(question.replace(",", ""))
    numbers, answer = [float(one) for one in dict.fromkeys(found_numbers)][:_QUESTION_NUMBERS], float(extracted)
    ways, right_ways = list(_ways(numbers, answer)), list(_ways(numbers, wanted))
    if any({a, b} == {c, d} and sign != other for sign, a, b in ways for other, c, d in right_ways):
        return "wrong_operation"
    if any(sign == other for sign, _, _ in ways for other, _, _ in right_ways):
        return "wrong_operand"
    return "wrong_operand" if right_ways and any(_same(answer, number) for number in numbers) else "other"


def _same(one: float, other: float) -> bool:
    return abs(one - other) <= NUMBER_TOLERANCE


def _float(text: str) -> float:
    return float(text.replace("$", ""))


def _apply(sign: str, left: float, right: float) -> float | None:
    if sign == "/":
        return left / right if right else None
    return left + right if sign == "+" else left - right if sign == "-" else left * right


def _ways(numbers: list[float], value: float) -> Iterator[tuple[str, float, float]]:
    """Operations on two of the numbers that give the value."""
    for left, right in permutations(numbers, 2):
        for sign in "+-*/":
            result = _apply(sign, left, right)
            if result is not None and _same(result, value):
                yield sign, left, right


def count_kinds(rows: pl.DataFrame, questions: dict[str, str]) -> pl.DataFrame:
    """How many outputs of each evaluation are of each kind.

    Args:
        rows: of a task with numbers as answers, under `paper`; failed items are left out.
        questions: by item hash; items whose question is not among them are left out.

    Returns:
        evaluation_id, student, task, kind, items, share; the share is of the items of that evaluation and task.

    """
    keys = ["evaluation_id", "student", "task"]
    kept = rows.filter(pl.col("error") == "", pl.col("item_hash").is_in(list(questions)))
    kinds = [
        kind_of(questions[row["item_hash"]], row["output"], row["extracted"], row["target"])
        for row in kept.select("item_hash", "output", "extracted", "target").to_dicts()
    ]
    counted = kept.select(keys).with_columns(pl.Series("kind", kinds, pl.String)).group_by(*keys, "kind").len("items")
    return counted.with_columns(share=pl.col("items") / pl.col("items").sum().over(keys)).sort(*keys, "kind")
