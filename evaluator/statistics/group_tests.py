"""More than two methods at once: do any differ, and which.

Kruskal-Wallis is for unrelated groups; Friedman is for the same blocks (pairs, tasks) under each method, and
sees more because what blocks share cancels. Shapes (docs/architecture.md): L blocks, K methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from tutelage.evaluator.statistics.multiple_testing import holm


@dataclass(frozen=True)
class GroupTest:
    """A test over several methods, and the pairwise p-values after it."""

    statistic: float
    p_value: float
    methods: tuple[str, ...]
    effect: float
    pairwise_p_values: NDArray[np.float64]  # K × K


def kruskal_wallis(groups: Mapping[str, ArrayLike]) -> GroupTest:
    """Kruskal-Wallis over unrelated groups, then Dunn's test with Holm's adjustment (Dunn 1964).

    `effect` is epsilon squared, H / (N - 1): 0 none, 1 all (Tomczak & Tomczak 2014).

    Args:
        groups: observations by method, at least two methods.

    """
    samples = [np.asarray(values, dtype=np.float64) for values in groups.values()]
    result = stats.kruskal(*samples)
    total = sum(len(sample) for sample in samples)
    pairwise = _dunn(samples)
    return GroupTest(
        float(result.statistic), float(result.pvalue), tuple(groups), float(result.statistic / (total - 1)), pairwise
    )


def friedman(scores_LK: ArrayLike, methods: tuple[str, ...]) -> GroupTest:
    """Friedman's test over complete blocks, then Nemenyi's pairwise comparison (Demšar 2006, JMLR 7).

    `effect` is Kendall's W, chi² / (L·(K - 1)): 0 no agreement of the blocks, 1 all rank alike.

    Args:
        scores_LK: one row a block, one column a method, at least three methods.
        methods: names of the columns.

    """
    scores = np.asarray(scores_LK, dtype=np.float64)
    result = stats.friedmanchisquare(*scores.T)
    blocks, count = scores.shape
    pairwise = _nemenyi(scores)
    effect = float(result.statistic / (blocks * (count - 1)))
    return GroupTest(float(result.statistic), float(result.pvalue), methods, effect, pairwise)


# As scikit-posthocs has both, which a test holds them against: it brings pandas' and matplotlib's whole imports along.
def _dunn(samples: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """P-values of all pairs: differences of mean ranks of all observations together, corrected for ties; Holm's."""
    ranks = stats.rankdata(np.concatenate(samples))
    counts = np.array([len(sample) for sample in samples])
    means = np.array([part.mean() for part in np.split(ranks, np.cumsum(counts)[:-1])])
    total, ties = len(ranks), np.unique(ranks, return_counts=True)[1].astype(np.float64)
    variance = total * (total + 1) / 12 - (ties**3 - ties).sum() / (12 * (total - 1))
    first, second = np.triu_indices(len(samples), 1)
    z = np.abs(means[first] - means[second]) / np.sqrt(variance * (1 / counts[first] + 1 / counts[second]))
    return _of_pairs(holm(2 * stats.norm.sf(z)).p_values, len(samples))


def _nemenyi(scores_LK: NDArray[np.float64]) -> NDArray[np.float64]:
    """P-values of all pairs: differences of mean ranks within blocks, by the studentized range of all methods."""
    blocks, count = scores_LK.shape
    means = stats.rankdata(scores_LK, axis=1).mean(0)
    first, second = np.triu_indices(count, 1)
    q = np.abs(means[first] - means[second]) / np.sqrt(count * (count + 1) / (6 * blocks))
    return _of_pairs(stats.studentized_range.sf(q * np.sqrt(2), count, np.inf), count)


def _of_pairs(p_values: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Those of the pairs above the diagonal as a whole matrix; 1 of a method and itself."""
    matrix = np.eye(count)
    matrix[np.triu_indices(count, 1)] = p_values
    return np.maximum(matrix, matrix.T)
