"""Two models on the same items: the difference of their scores, its error, and whether it is zero.

Items can come in clusters (several seeds of one item, several questions on one text, duplicates); whatever
shares a cluster is not independent. Shapes (docs/architecture.md): N paired observations, G clusters, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from tutelage.errors import DataError

Floats = NDArray[np.float64]


FEW_CLUSTERS = 30
_ALIKE = (
    1e-9  # differences that are this close to each other, relative to the largest, are one difference with rounding
)


@dataclass(frozen=True)
class StudentTail:
    """What is known of a mean by Student's t: bounds at any level, and the p-values of one-sided hypotheses."""

    center: float
    error: float
    freedom: float

    def bounds(self, level: float) -> tuple[float, float]:
        """One-sided bounds, each missed with probability `level`."""
        reach = float(stats.t.isf(level, self.freedom)) * self.error
        return self.center - reach, self.center + reach

    def p_at_most(self, value: float) -> float:
        """P-value of: the mean is at most `value`."""
        return float(stats.t.sf((self.center - value) / self.error, self.freedom))

    def p_at_least(self, value: float) -> float:
        """P-value of: the mean is at least `value`."""
        return float(stats.t.cdf((self.center - value) / self.error, self.freedom))


@dataclass(frozen=True)
class SameTail:
    """What is known of a mean from G clusters that all had the same difference, `value`, none beyond ±`bound`.

    If a share q of all clusters were otherwise, G of them would show none with probability (1 - q)^G; so with
    confidence 1 - level at most q = 1 - level^(1/G) are otherwise (Clopper & Pearson 1934, for no event), and those are
    at worst at the bound. Without a bound nothing can be said: every p-value is 1.
    """

    value: float
    bound: float
    clusters: int

    def bounds(self, level: float) -> tuple[float, float]:
        """One-sided bounds, each missed with probability of at most `level`."""
        if np.isinf(self.bound):
            return -np.inf, np.inf
        otherwise = 1 - level ** (1 / self.clusters)
        return self.value - (self.bound + self.value) * otherwise, self.value + (self.bound - self.value) * otherwise

    def p_at_most(self, value: float) -> float:
        """P-value of: the mean is at most `value`."""
        if value >= self.value or np.isinf(self.bound):
            return 1.0
        if value <= -self.bound:
            return 0.0
        return float((self.bound + value) / (self.bound + self.value)) ** self.clusters

    def p_at_least(self, value: float) -> float:
        """P-value of: the mean is at least `value`."""
        return SameTail(-self.value, self.bound, self.clusters).p_at_most(-value)


@dataclass(frozen=True)
class Interval:
    """An estimate with a confidence interval, in the unit of what was estimated.

    Attributes:
        estimate: of the mean.
        standard_error: of the estimate; 0 where all clusters had the same difference, NaN of a single cluster.
        low: lower end.
        high: upper end.
        confidence: of the interval.
        observations: how many.
        clusters: how many.
        tails: what tests of this estimate go by; the least certain of them counts.
        adjusted: the estimate with two made-up clusters, where the differences have a known bound.

    """

    estimate: float
    standard_error: float
    low: float
    high: float
    confidence: float
    observations: int
    clusters: int
    tails: tuple[StudentTail | SameTail, ...]
    adjusted: StudentTail | None = None

    @property
    def has_spread(self) -> bool:
        """Whether the data show how far estimates like this one vary."""
        return self.standard_error > 0

    def p_at_most(self, value: float) -> float:
        """P-value of: what is estimated is at most `value`."""
        return max(tail.p_at_most(value) for tail in self.tails)

    def p_at_least(self, value: float) -> float:
        """P-value of: what is estimated is at least `value`."""
        return max(tail.p_at_least(value) for tail in self.tails)


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
    """Sum of the differences and number of observations by cluster, both of shape G.

    Raises:
        DataError: there is no difference, or one of them is no number.

    """
    values_N = np.asarray(differences_N, dtype=np.float64)
    lacking = int(np.count_nonzero(~np.isfinite(values_N)))
    if lacking or not len(values_N):
        raise DataError(
            f"{lacking} of {len(values_N)} paired differences are no numbers; leave out items without a score, or "
            "score them again"
        )
    _, index_N = np.unique(np.asarray(clusters_N), return_inverse=True)
    sums_G: Floats = np.bincount(index_N, weights=values_N).astype(np.float64)
    return sums_G, np.bincount(index_N).astype(np.float64)


def clusters_unlike_most(differences_N: ArrayLike, clusters_N: ArrayLike) -> int:
    """How many clusters have another mean difference than the commonest one: what a bootstrap has to resample."""
    sums_G, sizes_G = cluster_totals(differences_N, clusters_N)
    _, counts = np.unique(np.round(sums_G / sizes_G, 9), return_counts=True)
    return len(sums_G) - int(counts.max())


def cluster_robust_interval(
    differences_N: ArrayLike, clusters_N: ArrayLike, *, bound: float | None = None, confidence: float = 0.95
) -> Interval:
    """Mean difference with the cluster-robust standard error and Student's t on G - 1 degrees of freedom.

    The variance is G/(G-1) · Σ_g (Σ_{i∈g} (d_i - mean))² / N²: Liang & Zeger (1986) with the usual
    small-sample factor; Miller, "Adding Error Bars to Evals" (2024, arXiv 2411.00640), section 2.2. With every
    item its own cluster this is the ordinary paired standard error.

    Where the differences have a known bound, the interval also holds the one that Bonett & Price (2012, Statistical
    Methods in Medical Research 21) get for paired proportions by adding an item that only the first has right and one
    that only the second has right: here a cluster at plus and one at minus the largest difference seen, which counts
    as 2·bound/G at least. Student's t alone covers as little as 88 % where differences are rare or skewed (measured
    in tests/numerics/test_statistics_calibration.py). Tests go by both up to 30 clusters; from there on the t-test is
    within its level.

    If all clusters have the same difference, or there is only one, t says nothing (its error would be 0, or unknown):
    interval and tests are then those of `SameTail`.

    Args:
        differences_N: score of the first model minus score of the second, an observation each.
        clusters_N: label of each observation's cluster.
        bound: the largest size that a difference can have, in their unit.
        confidence: of the interval, in (0, 1).

    Raises:
        DataError: as `cluster_totals`.

    """
    sums_G, sizes_G = cluster_totals(differences_N, clusters_N)
    total, count = sizes_G.sum(), len(sizes_G)
    mean = float(sums_G.sum() / total)
    residuals_G, largest = sums_G - sizes_G * mean, float(np.abs(sums_G / sizes_G).max())
    alike = bool(np.abs(residuals_G / sizes_G).max() <= _ALIKE * largest)
    error = float(np.sqrt(count / (count - 1) * np.sum(residuals_G**2)) / total) if count > 1 else np.nan
    adjusted = None
    if bound is not None:
        least = bound if alike or count == 1 else min(bound, 2 * bound / count)
        made_up = sizes_G.mean() * max(largest, least)
        sums, sizes = np.append(sums_G, [made_up, -made_up]), np.append(sizes_G, [sizes_G.mean()] * 2)
        center = sums.sum() / sizes.sum()
        spread = np.sqrt(np.sum((sums - sizes * center) ** 2)) / sizes.sum()
        adjusted = StudentTail(float(center), float(spread), count + 1)
    if alike or count == 1:
        error = 0.0 if count > 1 else error
        tails: tuple[StudentTail | SameTail, ...] = (SameTail(mean, np.inf if bound is None else bound, count),)
    else:
        tails = (StudentTail(mean, error, count - 1),)
    shown = tails if adjusted is None else (*tails, adjusted)
    low, high = _widest(shown, confidence, bound)
    return Interval(
        mean, error, low, high, confidence, int(total), count, shown if count < FEW_CLUSTERS else tails, adjusted
    )


def _widest(tails: Sequence[StudentTail | SameTail], confidence: float, bound: float | None) -> tuple[float, float]:
    """The interval that holds those of all tails; a mean lies no further out than the differences themselves."""
    lows, highs = zip(*(tail.bounds((1 - confidence) / 2) for tail in tails), strict=True)
    furthest = np.inf if bound is None else bound
    return float(max(min(lows), -furthest)), float(min(max(highs), furthest))


def score_interval(scores_N: ArrayLike, clusters_N: ArrayLike, *, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of a mean score in 0 … 1: what a score of 0 or 100 % of few items leaves open, too.

    Exact for right and wrong answers to independent items (Clopper & Pearson 1934, by statsmodels), which covers at
    least what it says. Of other scores, or where items share a cluster, `cluster_robust_interval` about one half.

    Args:
        scores_N: of one evaluation.
        clusters_N: label of each score's cluster.
        confidence: of the interval, in (0, 1).

    Raises:
        DataError: as `cluster_totals`.

    """
    scores = np.asarray(scores_N, dtype=np.float64)
    interval = cluster_robust_interval(scores - 0.5, clusters_N, bound=0.5, confidence=confidence)
    if are_decisions(scores) and interval.clusters == len(scores):
        low, high = proportion_confint(int(scores.sum()), len(scores), 1 - confidence, method="beta")
        return float(low), float(high)
    return 0.5 + interval.low, 0.5 + interval.high


def two_way_interval(
    differences_N: ArrayLike,
    first_N: ArrayLike,
    second_N: ArrayLike,
    *,
    bound: float | None = None,
    confidence: float = 0.95,
) -> Interval:
    """Mean difference with errors clustered two ways at once, by item and by training seed say.

    The variance is V_first + V_second - V_both (Cameron, Gelbach & Miller 2011, JBES 29), each with its own
    small-sample factor, and never below the larger of the first two, since that sum can even be negative.
    Student's t has the degrees of freedom of the smaller number of clusters: few seeds give a wide interval. Where
    the differences have a bound, the interval is never narrower than the one-way one of the more clusters.

    Args:
        differences_N: paired differences.
        first_N: labels of the one clustering.
        second_N: labels of the other.
        bound: as in `cluster_robust_interval`.
        confidence: of the interval, in (0, 1).

    """
    labels = [np.unique(np.asarray(one), return_inverse=True)[1] for one in (first_N, second_N)]
    both_N = np.unique(np.stack(labels), axis=1, return_inverse=True)[1]
    by = [
        cluster_robust_interval(differences_N, labels_N, bound=bound, confidence=confidence)
        for labels_N in (first_N, second_N, both_N)
    ]
    few, many = sorted(by[:2], key=lambda interval: interval.clusters)
    variances = [interval.standard_error**2 for interval in by]
    error = float(np.sqrt(max(variances[0] + variances[1] - variances[2], variances[0], variances[1])))
    if few.clusters < 2 or error == 0:
        return few
    tails: tuple[StudentTail | SameTail, ...] = (StudentTail(few.estimate, error, few.clusters - 1),)
    low, high = _widest(tails, confidence, bound)
    if bound is not None:
        # Not by the few as well: made-up seeds at the bound would outweigh three real ones, whose t is wide already.
        low, high = min(low, many.low), max(high, many.high)
    return Interval(few.estimate, error, low, high, confidence, few.observations, few.clusters, tails)


def mean_of_intervals(intervals: Sequence[Interval], *, bound: float | None = None) -> Interval:
    """The unweighted mean of independent estimates, tasks say, with its error.

    Student's t has Satterthwaite's degrees of freedom (Satterthwaite 1946, Biometrics Bulletin 2). An estimate whose
    clusters were all alike adds no variance, so the mean then also goes by the estimates with made-up clusters; if
    these are not known, nothing can be said.

    Args:
        intervals: of the estimates.
        bound: as in `cluster_robust_interval`; the mean's interval lies no further out either.

    """
    if len(intervals) == 1:
        return intervals[0]
    confidence = intervals[0].confidence
    estimate = float(np.mean([interval.estimate for interval in intervals]))
    known = [one for one in intervals if one.has_spread]
    parts = [StudentTail(one.estimate, one.standard_error, one.clusters - 1) for one in known]
    tails: list[StudentTail | SameTail] = []
    error = 0.0
    if known:
        error, freedom = _satterthwaite(parts, len(intervals))
        tails.append(StudentTail(estimate, error, freedom))
    made_up = [one.adjusted for one in intervals if one.adjusted is not None]
    adjusted = None
    if len(made_up) == len(intervals):
        adjusted = StudentTail(float(np.mean([one.center for one in made_up])), *_satterthwaite(made_up, len(made_up)))
    if len(known) < len(intervals) and adjusted is None:
        tails.append(SameTail(estimate, np.inf, 1))
    shown = tails if adjusted is None else [*tails, adjusted]
    few = len(known) < len(intervals) or any(one.clusters < FEW_CLUSTERS for one in intervals)
    low, high = _widest(shown, confidence, bound)
    return Interval(
        estimate,
        error,
        low,
        high,
        confidence,
        sum(interval.observations for interval in intervals),
        sum(interval.clusters for interval in intervals),
        tuple(shown if few else tails),
        adjusted,
    )


def _satterthwaite(parts: Sequence[StudentTail], count: int) -> tuple[float, float]:
    """Error and degrees of freedom of the mean of `count` estimates, of which these have an error."""
    variances = np.array([one.error**2 for one in parts]) / count**2
    total = float(variances.sum())
    return total**0.5, float(total**2 / np.sum(variances**2 / np.array([one.freedom for one in parts])))


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
    acceleration from the jackknife over clusters. It sees no more than what was drawn: of few clusters it is too narrow
    (of two it covers a half), and where all are alike, or there is one, it says nothing and has no end; see
    `cluster_robust_interval` for those.

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
    if np.abs(sums_G / sizes_G - mean).max() <= _ALIKE * np.abs(sums_G / sizes_G).max():
        nothing = SameTail(float(mean), np.inf, count)
        error = 0.0 if count > 1 else np.nan
        return Interval(float(mean), error, -np.inf, np.inf, confidence, int(total), count, (nothing,))
    # Counts of a multinomial are the resample: how often each cluster was drawn.
    weights_RG = generator.multinomial(count, np.full(count, 1 / count), size=resamples)
    means_R = (weights_RG @ sums_G) / (weights_RG @ sizes_G)
    tails = np.array([(1 - confidence) / 2, (1 + confidence) / 2])
    if method == "bca":
        jackknife_G = (sums_G.sum() - sums_G) / (total - sizes_G)
        tails = _bca_tails(tails, means_R, mean, jackknife_G)
    low, high = np.quantile(means_R, tails)
    error = float(np.std(means_R, ddof=1))
    tail = StudentTail(float(mean), error, count - 1)
    return Interval(float(mean), error, float(low), float(high), confidence, int(total), count, (tail,))


def _bca_tails(tails: Floats, means_R: Floats, mean: float, jackknife_G: Floats) -> Floats:
    below = np.mean(means_R < mean) + np.mean(means_R == mean) / 2  # ties are common with binary scores
    if not 0 < below < 1:  # the mean lies outside its own resamples, where the normal quantile is infinite
        return tails
    bias = stats.norm.ppf(below)
    deviations_G = jackknife_G.mean() - jackknife_G
    spread = np.sum(deviations_G**2)
    acceleration = np.sum(deviations_G**3) / (6 * spread**1.5) if spread > 0 else 0.0
    z = bias + stats.norm.ppf(tails)
    corrected: Floats = stats.norm.cdf(bias + z / (1 - acceleration * z))
    return corrected


def t_test(interval: Interval) -> SignificanceTest:
    """Two-sided test that what the interval estimates is zero, by the interval's own tails.

    With spread and without a bound this is Student's t; where all clusters are alike it is exact (`SameTail`).
    """
    estimate, error = interval.estimate, interval.standard_error
    statistic = estimate / error if interval.has_spread else (np.copysign(np.inf, estimate) if estimate else 0.0)
    p_value = min(1.0, 2 * min(interval.p_at_most(0.0), interval.p_at_least(0.0)))
    return SignificanceTest(float(statistic), p_value, interval.observations, interval.clusters)


def sign_flip_test(
    differences_N: ArrayLike, clusters_N: ArrayLike, generator: np.random.Generator, *, resamples: int = 9999
) -> SignificanceTest:
    """Permutation test of paired data: swaps the two models' scores, whole clusters at a time.

    Exact (every one of the 2^G sign patterns) where that takes no more than `resamples`; otherwise
    (b + 1)/(R + 1), which never calls an observed pattern impossible (Phipson & Smyth 2010).
    """
    sums_G, sizes_G = cluster_totals(differences_N, clusters_N)
    if len(sums_G) == 1:  # scipy refuses one; either sign of it is as extreme as the other
        return SignificanceTest(float(sums_G[0] / sizes_G[0]), 1.0, int(sizes_G[0]), 1)
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


def are_decisions(*scores_N: ArrayLike) -> bool:
    """Whether all scores are 0 or 1, so that an item is right or wrong and McNemar's test means something."""
    return all(bool(np.isin(np.asarray(scores), (0.0, 1.0)).all()) for scores in scores_N)


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
        d_z is zero where there is no difference, infinite where every item has the same one, NaN of a single item.

    """
    first, second = np.asarray(first_N, dtype=np.float64), np.asarray(second_N, dtype=np.float64)
    differences = first - second
    mean = float(differences.mean())
    spread = float(differences.std(ddof=1)) if len(differences) > 1 else np.nan
    standardised = mean / spread if spread else (np.copysign(np.inf, mean) if mean else 0.0)
    h = 2 * np.arcsin(np.sqrt(first.mean())) - 2 * np.arcsin(np.sqrt(second.mean()))
    return EffectSize(mean, float(standardised), float(h))
