"""Showing that a difference is small, which a large p-value does not."""

from __future__ import annotations

from dataclasses import dataclass

from scipy import stats

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
        The larger p-value, and the interval of confidence 1 - 2·alpha.

    """
    estimate, error = interval.estimate, interval.standard_error
    freedom = interval.clusters - 1 if interval.freedom is None else interval.freedom
    if error > 0:
        above, below = (
            stats.t.sf((estimate + margin) / error, freedom),
            stats.t.cdf((estimate - margin) / error, freedom),
        )
        p_value = float(max(above, below))
    else:
        p_value = 0.0 if abs(estimate) < margin else 1.0
    reach = float(stats.t.ppf(1 - alpha, freedom)) * error
    return Equivalence(estimate, margin, p_value, estimate - reach, estimate + reach, p_value < alpha)
