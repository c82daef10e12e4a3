"""More than two methods at once: do any differ, and which.

Kruskal-Wallis is for unrelated groups; Friedman is for the same blocks (pairs, tasks) under each method, and
sees more because what blocks share cancels. Shapes (docs/architecture.md): L blocks, K methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats


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
    import scikit_posthocs  # pandas and matplotlib come with it: two seconds, for few reports

    samples = [np.asarray(values, dtype=np.float64) for values in groups.values()]
    result = stats.kruskal(*samples)
    pairwise = scikit_posthocs.posthoc_dunn(samples, p_adjust="holm").to_numpy()
    total = sum(len(sample) for sample in samples)
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
    import scikit_posthocs

    scores = np.asarray(scores_LK, dtype=np.float64)
    result = stats.friedmanchisquare(*scores.T)
    pairwise = scikit_posthocs.posthoc_nemenyi_friedman(scores).to_numpy()
    blocks, count = scores.shape
    effect = float(result.statistic / (blocks * (count - 1)))
    return GroupTest(float(result.statistic), float(result.pvalue), methods, effect, pairwise)
