"""Which of a student's measured steps was the best, and how long ago."""

from __future__ import annotations

import math
from dataclasses import dataclass

_HIGHER_IS_BETTER = {"heldout/top1_agreement"}


@dataclass(frozen=True)
class Best:
    """The best measurement so far; a checkpoint keeps it."""

    step: int = 0
    """Its step; 0 means that there is none yet."""
    value: float | None = None
    """The metric there."""
    measurements_since: int = 0
    """Measurements after it, none of them better."""

    def after(self, step: int, metric: str, value: float) -> Best:
        """With one more measurement; an equal one is not better, and one that is NaN is never the best."""
        sign = -1.0 if metric in _HIGHER_IS_BETTER else 1.0
        # NaN compares as false: taken as the first best, it would stay that whatever came after it.
        if not math.isnan(value) and (self.value is None or sign * value < sign * self.value):
            return Best(step, value)
        return Best(self.step, self.value, self.measurements_since + 1)
