"""What a comparison of this size could have seen."""

from __future__ import annotations

from dataclasses import dataclass

from scipy import stats


@dataclass(frozen=True)
class Sensitivity:
    """The smallest true difference that a two-sided test finds with the stated power."""

    minimum_detectable: float
    power: float
    alpha: float


def minimum_detectable_difference(standard_error: float, *, alpha: float = 0.05, power: float = 0.8) -> Sensitivity:
    """(z_{1-alpha/2} + z_power) · standard error (Bloom 1995; Miller 2024, arXiv 2411.00640, section 5).

    Args:
        standard_error: of the estimated difference; the result has its unit.
        alpha: level of the two-sided test.
        power: probability to find a difference of the returned size.

    """
    reach = stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(power)
    return Sensitivity(float(reach * standard_error), power, alpha)


def power_of(difference: float, standard_error: float, *, alpha: float = 0.05) -> float:
    """Probability that a two-sided z-test at `alpha` finds a true `difference`, either sign counted."""
    reach, shift = stats.norm.ppf(1 - alpha / 2), abs(difference) / standard_error
    return float(stats.norm.sf(reach - shift) + stats.norm.cdf(-reach - shift))


def items_needed(difference: float, standard_deviation: float, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """Independent paired items for `minimum_detectable_difference` to be `difference`.

    Args:
        difference: the true difference that should be found.
        standard_deviation: of the paired differences of single items, same unit.
        alpha: level of the two-sided test.
        power: wished probability.

    """
    reach = stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(power)
    return float((reach * standard_deviation / difference) ** 2)
