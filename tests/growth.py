"""Whether work takes as long as its input is, and no longer, on whatever machine."""

from __future__ import annotations

import time
from collections.abc import Callable

_PROMISED_SECONDS = 0.05  # for a hundred kilobytes, on the machine that this was written on


def assert_linear(work: Callable[[str], object], text: str) -> None:
    """A slower machine may take longer than promised, but at most twice what a quarter of the text says.

    What is quadratic takes four times that.
    """
    whole, eighth = _seconds(work, text), len(text) // 8
    if whole > _PROMISED_SECONDS:
        quarter = _seconds(work, text[:eighth] + text[-eighth:])
        assert whole <= 2 * 4 * quarter, f"{whole:.3f} s, a quarter {quarter:.3f} s"


def _seconds(work: Callable[[str], object], text: str) -> float:
    """Processor time, the least of three: the machine is shared."""
    taken = []
    for _ in range(3):
        started = time.process_time()
        work(text)
        taken.append(time.process_time() - started)
    return min(taken)
