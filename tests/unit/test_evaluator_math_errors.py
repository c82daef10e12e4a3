"""Each rule of the error analysis on outputs made for it."""

from __future__ import annotations

import polars as pl
import pytest

from tutelage.evaluator.scoring.extraction import paper_number
from tutelage.evaluator.scoring.math_errors import count_kinds, kind_of

QUESTION = "Ann has 12 apples, 30 pears and 4 bags. How many more pears than apples does she have?"
CASES = [
    ("30 - 12 = 18. The answer is 18.", "right"),
    ("The answer is 18.0005", "right"),
    ("", "no_answer"),
    ("I cannot say.", "no_answer"),
    ("The answer is 18. She also has 4 bags.", "extraction_failure"),
    ("30 - 12 = 18 pears in 4 bags", "extraction_failure"),
    ("30 - 12 = 17. The answer is 17.", "arithmetic_slip"),
    ("$30 - $12 = $28", "arithmetic_slip"),
    ("30 − 12 = 8", "arithmetic_slip"),
    ("30 + 12 = 42. The answer is 42.", "wrong_operation"),
    ("42", "wrong_operation"),
    ("The answer is 360.", "wrong_operation"),
    ("2.5", "wrong_operation"),
    ("30 - 4 = 26. The answer is 26.", "wrong_operand"),
    ("8", "wrong_operand"),
    ("The answer is 30.", "wrong_operand"),
    ("The answer is 1234.", "other"),
    ("12 + 30 = 43", "other"),
]


@pytest.mark.parametrize(("output", "kind"), CASES)
def test_each_output_is_of_one_kind(output: str, kind: str) -> None:
    assert kind_of(QUESTION, output, paper_number(output), "18.0") == kind


def test_hundreds_of_kilobytes_are_read_in_bounded_time() -> None:
    import time

    for text in ("1 + 1 = 3 " * 10_000, "9" * 100_000, "1 +" * 30_000, "=" * 100_000):
        started = time.process_time()
        kind_of(QUESTION, text, paper_number(text), "18")
        assert time.process_time() - started < 0.5


def test_kinds_are_counted_per_evaluation() -> None:
    outputs = ["The answer is 18.", "42", "", "18"]
    rows = pl.DataFrame(
        {
            "evaluation_id": ["a"] * 4,
            "student": ["s"] * 4,
            "task": ["SVAMP"] * 4,
            "item_hash": ["h", "h", "h", "h"],
            "output": outputs,
            "extracted": [paper_number(output) for output in outputs],
            "target": ["18.0"] * 4,
            "error": ["", "", "", "broken"],
        }
    )
    counted = {row["kind"]: row for row in count_kinds(rows, {"h": QUESTION}).to_dicts()}
    assert {kind: row["items"] for kind, row in counted.items()} == {"right": 1, "wrong_operation": 1, "no_answer": 1}
    assert counted["right"]["share"] == pytest.approx(1 / 3)
    assert count_kinds(rows, {"another": QUESTION}).is_empty()
