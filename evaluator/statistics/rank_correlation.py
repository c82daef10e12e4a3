"""Correlations over teacher-student pairs: one value a pair, and intervals that resample whole pairs.

Shapes (docs/architecture.md): G pairs, which are the clusters here, K methods, R resamples.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np
import polars as pl
from numpy.typing import ArrayLike
from scipy import stats

from tutelage.errors import DataError
from tutelage.evaluator.statistics.paired import Floats

_EXACT_ROWS = 7  # 5,040 orders
_FEWEST_PAIRS = 5
_FEW_PAIRS = 20


@dataclass(frozen=True)
class Correlation:
    """Spearman's rho over `n` rows, its p-value for independent rows, and a bootstrap interval over pairs.

    All null where one side is constant, as the fine-tuned score of a single student is; the interval alone where there
    are fewer than five pairs.
    """

    rho: float | None
    p_value: float | None
    low: float | None
    high: float | None
    n: int


def spearman_over_pairs(
    first_GK: ArrayLike,
    second_GK: ArrayLike,
    generator: np.random.Generator,
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
) -> Correlation:
    """Spearman's rho of all G·K values, with a percentile interval that resamples the G pairs.

    The rows of one pair move together, so values that are repeated for each of K methods count once in
    the interval, however often they enter rho. Resamples in which one side is constant are left out.

    Of up to 20 pairs with one value each (K = 1) the interval also holds that of `_by_fisher`: pairs that are all in
    order resample to nothing but order, and the bootstrap alone covers 74 to 89 % of 5 or 6 strongly correlated pairs.

    The p-value is Student's approximation as scipy has it, and exact (every order of the rows) up to seven rows, where
    the approximation calls two rows in order impossible by chance. There is no interval of fewer than five pairs.

    Raises:
        DataError: a value is no number.

    """
    first, second = np.asarray(first_GK, dtype=np.float64), np.asarray(second_GK, dtype=np.float64)
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise DataError("a value to correlate is no number; leave its pair out")
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return Correlation(None, None, None, None, first.size)
    rho, p_value = stats.spearmanr(first.ravel(), second.ravel())
    if first.size <= _EXACT_ROWS:
        orders = np.array(list(permutations(range(first.size))))
        rho_all = _spearman_rows(np.tile(first.ravel(), (len(orders), 1)), second.ravel()[orders])
        p_value = np.mean(np.abs(rho_all) >= abs(rho) - 1e-12)
    if len(first) < _FEWEST_PAIRS:
        return Correlation(float(rho), float(p_value), None, None, first.size)
    chosen_RG = generator.integers(0, len(first), size=(resamples, len(first)))
    rho_R = _spearman_rows(first[chosen_RG].reshape(resamples, -1), second[chosen_RG].reshape(resamples, -1))
    low, high = np.nanquantile(rho_R, [(1 - confidence) / 2, (1 + confidence) / 2])
    if len(first) == first.size <= _FEW_PAIRS:
        wider = _by_fisher(float(rho), len(first), confidence)
        low, high = min(low, wider[0]), max(high, wider[1])
    return Correlation(float(rho), float(p_value), float(low), float(high), first.size)


def _by_fisher(rho: float, pairs: int, confidence: float) -> tuple[float, float]:
    """Fisher's interval with the variance of Bonett & Wright (2000, Psychometrika 65), (1 + rho²/2) / (n - 3).

    By Student's t on n - 3 degrees of freedom in the place of the normal, since n is small. Where all pairs are in
    order it starts from the nearest other order, rho = 1 - 12 / (n³ - n), and ends at 1; its own variance is zero.
    """
    nearest = 1 - 12 / (pairs**3 - pairs)
    center = float(np.clip(rho, -nearest, nearest))
    reach = stats.t.isf((1 - confidence) / 2, pairs - 3) * np.sqrt((1 + center**2 / 2) / (pairs - 3))
    low, high = np.tanh(np.arctanh(center) + np.array([-reach, reach]))
    return (-1.0 if rho < -nearest else float(low)), (1.0 if rho > nearest else float(high))


def _spearman_rows(first_RN: Floats, second_RN: Floats) -> Floats:
    first_ranks, second_ranks = (stats.rankdata(values, axis=1) for values in (first_RN, second_RN))
    first_ranks -= first_ranks.mean(axis=1, keepdims=True)
    second_ranks -= second_ranks.mean(axis=1, keepdims=True)
    spread_R = np.sqrt((first_ranks**2).sum(1) * (second_ranks**2).sum(1))
    spread_R[spread_R == 0] = np.nan
    rho_R: Floats = (first_ranks * second_ranks).sum(1) / spread_R
    return rho_R


def by_pair(rows: pl.DataFrame, column: str) -> Floats:
    """A column of one task's improvements as G × K: pairs in rows, methods in columns, both sorted.

    Args:
        rows: one row a teacher, student and method, every pair under every method.
        column: which.

    """
    wide = rows.sort("teacher", "student", "method").group_by("teacher", "student", maintain_order=True)
    return np.stack([np.asarray(values) for values in wide.agg(column)[column].to_list()])
