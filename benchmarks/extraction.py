"""How often extraction reads what a careful reader reads, and what it costs: `python benchmarks/extraction.py`.

Outputs and readings are in `tests/extraction_cases.jsonl`. They were written for this; those held back before the
corrected rules were looked at, and never used to mend them. With `pip install math-verify` its parser is a third
column, for the outputs whose answer is a number.
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

from tutelage.evaluator.scoring.extraction import NUMBER, Extraction
from tutelage.evaluator.tasks import TASKS

CASES = Path(__file__).parents[1] / "tests" / "extraction_cases.jsonl"


def is_read(extraction: Extraction, extracted: str, reading: str | None) -> bool:
    """Whether what a rule extracts is the reading; no answer is one too."""
    if reading is None or not extracted:
        return extracted == (reading or "")
    return extraction.same(extracted, str(float(Fraction(reading))) if extraction is NUMBER else reading)


def cases(*, held_back: bool) -> list[dict[str, Any]]:
    """Outputs with their readings: `task`, `output`, `reading` (null: no answer)."""
    every = [json.loads(line) for line in CASES.read_text("utf-8").splitlines()]
    return [case for case in every if case["held_back"] == held_back]


def share_read(chosen: list[dict[str, Any]], rule: Callable[[Extraction], Callable[[str], str]]) -> tuple[int, float]:
    """How many of the outputs a rule reads right, and microseconds an output (once each: math-verify has a cache)."""
    extractions = [extraction for case in chosen if (extraction := TASKS[case["task"]].extraction)]
    for extraction in extractions:
        rule(extraction)("The answer is $2$.")
    started = time.process_time()
    extracted = [rule(one)(case["output"]) for one, case in zip(extractions, chosen, strict=True)]
    seconds = time.process_time() - started
    readings = zip(extractions, extracted, chosen, strict=True)
    return sum(is_read(one, text, case["reading"]) for one, text, case in readings), seconds / len(chosen) * 1e6


def math_verify_number(text: str) -> str:
    """What math-verify parses, as a number; empty if that is none."""
    from math_verify import parse  # type: ignore[import-not-found]

    try:
        return str(float(parse(text, parsing_timeout=None)[0]))
    except (IndexError, TypeError, ValueError):
        return ""


def main() -> None:
    """Prints the table."""
    rules: dict[str, Callable[[Extraction], Callable[[str], str]]] = {
        "LLM-Adapters": lambda extraction: extraction.paper,
        "corrected": lambda extraction: extraction.corrected,
    }
    if importlib.util.find_spec("math_verify"):
        rules["math-verify"] = lambda extraction: math_verify_number
    print("| outputs | rule | read right | share | µs an output |\n|---|---|---|---|---|")
    for held_back in (False, True):
        every = cases(held_back=held_back)
        numbers = [case for case in every if TASKS[case["task"]].extraction is NUMBER]
        for kind, chosen in (("all", every), ("numbers", numbers)):
            for name, rule in rules.items():
                if kind == "numbers" or name != "math-verify":
                    read, microseconds = share_read(chosen, rule)
                    half = "held back" if held_back else "mended by"
                    share = read / len(chosen)
                    print(f"| {half}, {kind} | {name} | {read} of {len(chosen)} | {share:.3f} | {microseconds:.0f} |")


if __name__ == "__main__":
    main()
