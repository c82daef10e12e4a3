"""What the harness's gsm8k filters read, as its own run of them gave (benchmarks/evaluator_parity.py compares more)."""

from __future__ import annotations

import time

import pytest

from tutelage.evaluator.results.lm_eval import INVALID, gsm8k_exact_match, gsm8k_flexible, gsm8k_strict

CASES = [
    ("so #### 42", "42", "42"),
    ("The answer is $1,234.", INVALID, "$1,234."),
    ("none", INVALID, INVALID),
    ("#### -3.5. then 7", "-3.5.", "7"),
]


@pytest.mark.parametrize(("output", "strict", "flexible"), CASES)
def test_the_filters(output: str, strict: str, flexible: str) -> None:
    assert (gsm8k_strict(output), gsm8k_flexible(output)) == (strict, flexible)


def test_matches_ignore_commas_dollars_and_a_last_dot() -> None:
    assert gsm8k_exact_match("$1,234.", "1234") == 1.0
    assert gsm8k_exact_match("-3.5.", "-3.5") == 1.0
    assert gsm8k_exact_match("18.0", "18") == 0.0
    assert gsm8k_exact_match(INVALID, "18") == 0.0


@pytest.mark.parametrize("text", ["1" * 100_000, "#### " * 20_000, "-" * 100_000, "$,." * 33_000, "- 1" * 33_000])
def test_a_hundred_kilobytes_take_at_most_fifty_milliseconds(text: str) -> None:
    def seconds() -> float:
        started = time.process_time()
        gsm8k_strict(text)
        gsm8k_flexible(text)
        return time.process_time() - started

    assert min(seconds() for _ in range(3)) <= 0.05
