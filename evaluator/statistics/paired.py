"""Two models on the same items: the difference of their scores, its error, and whether it is zero.

Items can come in clusters (several seeds of one item, several questions on one text, duplicates); whatever
shares a cluster is not independent. Shapes: N paired observations, G clusters, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """An estimate with a confidence interval, in the unit of what was estimated."""

    estimate: float
    standard_error: float
    low: float
    high: float
    confidence: float
    observations: int
    clusters: int
    freedom: float | None = None  # of Student's t, where it is not clusters - 1


@dataclass(frozen=True)
class SignificanceTest:
    """A statistic and the two-sided probability of one as extreme if there is no difference."""

    statistic: float
    p_value: float
    observations: int
    clusters: int


@dataclass(frozen=True)
class McNemar:
    """Discordant items of two binary scores, and the exact two-sided p-value."""

    only_first: int
    only_second: int
    p_value: float


@dataclass(frozen=True)
class EffectSize:
    """How large a paired difference is, apart from how certain.

    `standardised` is Cohen's d_z (mean over standard deviation of the differences); `cohens_h` the
    difference of the two arcsine-transformed proportions, for scores in 0 … 1.
    """

    difference: float
    standardised: float
    cohens_h: float


def cluster_totals(differences_N: ArrayLike, clusters_N: ArrayLike) -> tuple[Floats, Floats]:
    """Sum of the differences and number of observations by cluster, both of shape G."""
    _, index_N = np.unique(np.asarray(clusters_N), return_inverse=True)
    sums_G: Floats = np.bincount(index_N, weights=np.asarray(differences_N, dtype=np.float64)).astype(np.float64)
    return sums_G, np.bincount(index_N).astype(np.float64)


def cluster_robust_interval(differences_N: ArrayLike, clusters_N: ArrayLike, *, confidence: float = 0.95) -> Interval:
    """Mean difference with the cluster-robust standard error and Student's t on G - 1 degrees of freedom.

    The variance is G/(G-1) · Σ_g (Σ_{i∈g} (d_i - mean))² / N²: Liang & Zeger (1986) with the usual
    small-sample factor; Miller, "Adding Error Bars to Evals" (2024, arXiv 2411.00640), section 2.2. With every
    item its own cluster this is the ordinary paired standard error.

    Args:
        differences_N: score of the first model minus score of the second, an observation each.
        clusters_N: label of each observation's cluster, at least two different ones.
        confidence: of the interval, in (0, 1).

    """
    sums_G, sizes_G = cluster_totals(differences_N, clusters_N)
    total, count = sizes_G.sum(), len(sizes_G)
    mean = sums_G.sum() / total
    residuals_G = sums_G - sizes_G * mean
    error = float(np.sqrt(count / (count - 1) * np.sum(residuals_G**2)) / total)
    reach = stats.t.ppf((1 + confidence) / 2, count - 1) * error
    return Interval(float(mean), error, float(mean - reach), float(mean + reach), confidence, int(total), count)


def two_way_interval(
    differences_N: ArrayLike, first_N: ArrayLike, second_N: ArrayLike, *, confidence: float = 0.95
) -> Interval:
    """Mean difference with errors clustered two ways at once, by item and by training seed say.

    The variance is V_first + V_second - V_both (Cameron, Gelbach & Miller 2011, JBES 29), each with its own
    small-sample factor, and never below the larger of the first two, since that sum can even be negative.
    Student's t has the degrees of freedom of the smaller number of clusters: few seeds give a wide interval.

    Args:
        differences_N: paired differences.
        first_N: labels of the one clustering.
        second_N: labels of the other.
        confidence: of the interval, in (0, 1).

    """
    both_N = np.unique(np.stack([_codes(first_N), _codes(second_N)]), axis=1, return_inverse=True)[1]
    by = [cluster_robust_interval(differences_N, labels_N) for labels_N in (first_N, second_N, both_N)]
    variances = [interval.standard_error**2 for interval in by]
    error = float(np.sqrt(max(variances[0] + variances[1] - variances[2], variances[0], variances[1])))
    count, mean = min(by[0].clusters, by[1].clusters), by[0].estimate
    reach = float(stats.t.ppf((1 + confidence) / 2, count - 1)) * error
    return Interval(mean, error, mean - reach, mean + reach, confidence, by[0].observations, count)


def _codes(labels_N: ArrayLike) -> NDArray[np.int64]:
    return np.unique(np.asarray(labels_N), return_inverse=True)[1].astype(np.int64)


def mean_of_intervals(intervals: Sequence[Interval]) -> Interval:
    """The unweighted mean of independent estimates, tasks say, with its error.

    Student's t has Satterthwaite's degrees of freedom (Satterthwaite 1946, Biometrics Bulletin 2).
    """
    confidence = intervals[0].confidence
    estimate = float(np.mean([interval.estimate for interval in intervals]))
    variances = np.array([interval.standard_error**2 for interval in intervals]) / len(intervals) ** 2
    total = float(variances.sum())
    freedoms = np.array([interval.clusters - 1 for interval in intervals])
    freedom = total**2 / np.sum(variances**2 / freedoms) if total else float(freedoms.sum())
    reach = float(stats.t.ppf((1 + confidence) / 2, freedom)) * total**0.5
    return Interval(
        estimate,
        total**0.5,
        estimate - reach,
        estimate + reach,
        confidence,
        sum(interval.observations for interval in intervals),
        sum(interval.clusters for interval in intervals),
        float(freedom),
    )


def cluster_bootstrap_interval(
    differences_N: ArrayLike,
    clusters_N: ArrayLike,
    generator: np.random.Generator,
    *,
    method: Literal["bca", "percentile"] = "bca",
    resamples: int = 2000,
    confidence: float = 0.95,
) -> Interval:
    """Mean difference with a bootstrap interval over whole clusters.

    `bca` corrects for bias and skewness (Efron 1987, JASA 82, "Better bootstrap confidence intervals"), its
    acceleration from the jackknife over clusters. If all resamples are equal, so is the interval.

    Args:
        differences_N: as in `cluster_robust_interval`.
        clusters_N: as in `cluster_robust_interval`.
        generator: draws the resamples.
        method: which interval.
        resamples: how many.
        confidence: of the interval, in (0, 1).

    """
    sums_G, sizes_G = cluster_totals(differences_N, clusters_N)
    count, total = len(sums_G), sizes_G.sum()
    mean = sums_G.sum() / total
    weights_RG = generator.multinomial(count, np.full(count, 1 / count), size=resamples)
    means_R = (weights_RG @ sums_G) / (weights_RG @ sizes_G)
    tails = np.array([(1 - confidence) / 2, (1 + confidence) / 2])
    if method == "bca":
        jackknife_G = (sums_G.sum() - sums_G) / (total - sizes_G)
        tails = _bca_tails(tails, means_R, mean, jackknife_G)
    low, high = np.quantile(means_R, tails)
    error = float(np.std(means_R, ddof=1))
    return Interval(float(mean), error, float(low), float(high), confidence, int(total), count)


def _bca_tails(tails: Floats, means_R: Floats, mean: float, jackknife_G: Floats) -> Floats:
    below = np.mean(means_R < mean) + np.mean(means_R == mean) / 2  # ties are common with binary scores
    if not 0 < below < 1:
        return tails
    bias = stats.norm.ppf(below)
    deviations_G = jackknife_G.mean() - jackknife_G
    spread = np.sum(deviations_G**2)
    acceleration = np.sum(deviations_G**3) / (6 * spread**1.5) if spread > 0 else 0.0
    z = bias + stats.norm.ppf(tails)
    corrected: Floats = stats.norm.cdf(bias + z / (1 - acceleration * z))
    return corrected


def t_test(interval: Interval) -> SignificanceTest:
    """Two-sided test that what the interval estimates is zero, with the interval's own error and t.

    An estimate without error (the same difference in every cluster) has p = 1 if it is zero, else 0.
    """
    estimate, error = interval.estimate, interval.standard_error
    freedom = interval.clusters - 1 if interval.freedom is None else interval.freedom
    statistic = estimate / error if error else (np.copysign(np.inf, estimate) if estimate else 0.0)
    p_value = float(2 * stats.t.sf(abs(statistic), freedom))
    return SignificanceTest(float(statistic), p_value, interval.observations, interval.clusters)


def sign_flip_test(
    differences_N: ArrayLike, clusters_N: ArrayLike, generator: np.random.Generator, *, resamples: int = 9999
) -> SignificanceTest:
    """Permutation test of paired data: swaps the two models' scores, whole clusters at a time.

    Exact (every one of the 2^G sign patterns) where that takes no more than `resamples`; otherwise
    (b + 1)/(R + 1), which never calls an observed pattern impossible (Phipson & Smyth 2010).
    """
    sums_G, sizes_G = cluster_totals(differences_N, clusters_N)
    result = stats.permutation_test(
        (sums_G,),
        np.sum,
        permutation_type="samples",
        n_resamples=resamples,
        batch=512,
        vectorized=True,
        rng=generator,
    )
    mean = float(sums_G.sum() / sizes_G.sum())
    return SignificanceTest(mean, float(result.pvalue), int(sizes_G.sum()), len(sums_G))


def mcnemar_exact(first_correct_N: ArrayLike, second_correct_N: ArrayLike) -> McNemar:
    """Exact McNemar test of two binary scores on the same independent items.

    Binomial test of the discordant items at one half (McNemar 1947, Psychometrika 12; the exact form of
    Mosteller 1952), by statsmodels. Conservative, since the counts are discrete. It knows no clusters.
    """
    first_N, second_N = np.asarray(first_correct_N, dtype=bool), np.asarray(second_correct_N, dtype=bool)
    only_first, only_second = int(np.sum(first_N & ~second_N)), int(np.sum(~first_N & second_N))
    # The concordant cells do not enter the exact test. Without a discordant item the p-value is 1.
    result = mcnemar([[0, only_first], [only_second, 0]], exact=True)
    return McNemar(only_first, only_second, float(result.pvalue))


def effect_size(first_N: ArrayLike, second_N: ArrayLike) -> EffectSize:
    """Mean paired difference, Cohen's d_z and Cohen's h (Cohen 1988, chapters 2 and 6).

    Args:
        first_N: scores of the first model, in 0 … 1.
        second_N: scores of the second on the same items.

    Returns:
        d_z is zero where there is no difference, and infinite where every item has the same one.

    """
    first, second = np.asarray(first_N, dtype=np.float64), np.asarray(second_N, dtype=np.float64)
    differences = first - second
    mean, spread = float(differences.mean()), float(differences.std(ddof=1))
    standardised = mean / spread if spread else (np.copysign(np.inf, mean) if mean else 0.0)
    h = 2 * np.arcsin(np.sqrt(first.mean())) - 2 * np.arcsin(np.sqrt(second.mean()))
    return EffectSize(mean, float(standardised), float(h))
