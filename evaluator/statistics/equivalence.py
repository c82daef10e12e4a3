"""Showing that a difference is small, which a large p-value does not."""

from __future__ import annotations

from dataclasses import dataclass

from tutelage.evaluator.statistics.paired import Interval


@dataclass(frozen=True)
class Equivalence:
    """Two one-sided tests: the larger p-value, and the interval that lies within ±margin when p < alpha."""

    difference: float
    margin: float
    p_value: float
    low: float
    high: float
    equivalent: bool


def equivalence_test(interval: Interval, *, margin: float, alpha: float = 0.05) -> Equivalence:
    """Two one-sided t-tests that an estimate lies within ±margin (Schuirmann 1987).

    Ours, not statsmodels' `ttost_paired`: that one starts from two columns of independent observations, and takes
    neither a cluster-robust error nor Satterthwaite's degrees of freedom. Where it applies, both give the same p-value.

    Args:
        interval: the estimated difference with its error, from `paired`.
        margin: the largest difference that counts as none, positive, in the interval's unit; fixed before
            the data are seen.
        alpha: level of each one-sided test.

    Returns:
        The larger p-value (of every tail of the interval), and the interval of confidence 1 - 2·alpha.

    """
    p_value = max(interval.p_at_least(margin), interval.p_at_most(-margin))
    lows, highs = zip(*(tail.bounds(alpha) for tail in interval.tails), strict=True)
    return Equivalence(interval.estimate, margin, p_value, min(lows), max(highs), p_value < alpha)
