"""How long work takes where nothing else is on its core: processor time beside a reference taken in turn with it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

_WORDS = re.compile(r"[0-9]+")
_TEXT = "1 " * 40_000
_REFERENCE_SECONDS = 0.0057  # of `_reference` where the promises were made


def least_seconds(work: Callable[[], object]) -> float:
    """Of three tries, each in seconds of a core that is as quick as the promises mean; never more than what it took.

    A core whose sibling or memory others use takes longer for everything, the reference too.
    """
    taken = []
    for _ in range(3):
        slower = max(1.0, _seconds(_reference) / _REFERENCE_SECONDS)
        taken.append(_seconds(work) / slower)
    return min(taken)


def _reference() -> object:
    return [found.start() for found in _WORDS.finditer(_TEXT)]


def _seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started
