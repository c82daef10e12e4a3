"""Simulated studies: intervals cover as often as they say, and tests reject true nulls as often as they may.

A study is a set of paired binary scores whose items come in clusters that share their difficulty and their
difference. The short form has fewer studies and a band to match; `-m long` runs the 2,000 that settle it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tutelage.evaluator.statistics import paired
from tutelage.evaluator.statistics.equivalence import equivalence_test

Study = tuple[np.ndarray, np.ndarray, np.ndarray]

CLUSTERS, LARGEST = 250, 8
SHORT = pytest.param(250, 0.045, id="short")  # 3.3 standard errors of a share of 0.05 in 250
LONG = pytest.param(2000, 0.01, id="long", marks=[pytest.mark.long, pytest.mark.timeout(900)])


def studies(count: int, gain: float, seed: int) -> list[Study]:
    """Scores of both models and the clusters; `gain` moves both models' chance of a cluster at a time."""
    generator = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        clusters = np.repeat(np.arange(CLUSTERS), generator.integers(1, LARGEST + 1, CLUSTERS))
        easy = generator.uniform(0.35, 0.65, CLUSTERS)
        tilt = generator.uniform(-0.2, 0.2, CLUSTERS)  # a cluster favours one model: what clustering must count
        luck = generator.uniform(size=len(clusters))  # shared by both models: what pairing takes out
        own = generator.uniform(size=(2, len(clusters)))
        mixed = np.where(own < 0.5, luck, generator.uniform(size=own.shape))
        first = mixed[0] < (easy + tilt + gain / 2)[clusters]
        second = mixed[1] < (easy - tilt - gain / 2)[clusters]
        made.append((first.astype(float), second.astype(float), clusters))
    return made


def share(made: list[Study], judge: Callable[[Study], bool]) -> float:
    return float(np.mean([judge(study) for study in made]))


@pytest.mark.parametrize(("count", "band"), [SHORT, LONG])
@pytest.mark.parametrize("method", ["cluster_t", "bca", "percentile"])
def test_intervals_cover_ninety_five_percent(count: int, band: float, method: str) -> None:
    truth = 0.06
    generator = np.random.default_rng(21)

    def covers(study: Study) -> bool:
        first, second, clusters = study
        if method == "cluster_t":
            interval = paired.cluster_robust_interval(first - second, clusters)
        else:
            interval = paired.cluster_bootstrap_interval(
                first - second, clusters, generator, method=method, resamples=1000
            )
        return interval.low <= truth <= interval.high

    # Sizes are independent of the tilt, so the mean difference of a study has expectation `truth`.
    assert share(studies(count, truth, 20), covers) == pytest.approx(0.95, abs=band)


@pytest.mark.parametrize(("count", "band"), [SHORT, LONG])
@pytest.mark.parametrize("method", ["cluster_t", "sign_flip"])
def test_true_nulls_are_rejected_five_times_in_a_hundred(count: int, band: float, method: str) -> None:
    generator = np.random.default_rng(31)

    def rejects(study: Study) -> bool:
        first, second, clusters = study
        if method == "cluster_t":
            return paired.t_test(paired.cluster_robust_interval(first - second, clusters)).p_value < 0.05
        # Graded scores, as ROUGE is: on binary ones the exact test cannot reach its level (next test).
        grades = generator.uniform(0.5, 1.0, size=(2, len(clusters)))
        differences = first * grades[0] - second * grades[1]
        return paired.sign_flip_test(differences, clusters, generator, resamples=399).p_value <= 0.05

    assert share(studies(count, 0.0, 30), rejects) == pytest.approx(0.05, abs=band)


def test_sign_flips_of_binary_scores_stay_below_their_level() -> None:
    generator = np.random.default_rng(32)

    def rejects(study: Study) -> bool:
        first, second, clusters = study
        return paired.sign_flip_test(first - second, clusters, generator, resamples=399).p_value <= 0.05

    assert 0.01 < share(studies(250, 0.0, 33), rejects) < 0.05 + 2 * (0.05 * 0.95 / 250) ** 0.5


@pytest.mark.parametrize(("count", "band"), [SHORT, LONG])
def test_equivalence_is_claimed_five_times_in_a_hundred_at_the_margin(count: int, band: float) -> None:
    def claims(study: Study) -> bool:
        first, second, clusters = study
        return equivalence_test(paired.cluster_robust_interval(first - second, clusters), margin=0.2).equivalent

    assert share(studies(count, 0.2, 40), claims) == pytest.approx(0.05, abs=band)


def test_what_ignores_clusters_rejects_too_often() -> None:
    # The reason for all of the above, and the proof that these simulations can fail a method.
    def rejects(study: Study) -> bool:
        first, second, clusters = study
        ignoring = paired.cluster_robust_interval(first - second, np.arange(len(clusters)))
        return paired.t_test(ignoring).p_value < 0.05

    assert share(studies(400, 0.0, 30), rejects) > 0.085


@pytest.mark.parametrize("count", [400, pytest.param(2000, marks=pytest.mark.long)])
def test_exact_mcnemar_never_exceeds_its_level_on_independent_items(count: int) -> None:
    generator = np.random.default_rng(50)

    def rejects(_: int) -> bool:
        first, second = generator.uniform(size=(2, 150)) < 0.5
        return paired.mcnemar_exact(first, second).p_value < 0.05

    rate = float(np.mean([rejects(study) for study in range(count)]))
    assert 0.01 < rate < 0.05 + 2 * (0.05 * 0.95 / count) ** 0.5


def test_two_way_intervals_cover_when_seeds_matter_and_one_way_ones_do_not() -> None:
    generator = np.random.default_rng(60)
    items, seeds, covered = 100, 8, {"items": 0, "both": 0}
    item_labels, seed_labels = np.repeat(np.arange(items), seeds), np.tile(np.arange(seeds), items)
    for _ in range(400):
        differences = (
            generator.normal(0, 1, items)[item_labels]
            + generator.normal(0, 0.5, seeds)[seed_labels]
            + generator.normal(0, 1, items * seeds)
        )
        by_item = paired.cluster_robust_interval(differences, item_labels)
        by_both = paired.two_way_interval(differences, item_labels, seed_labels)
        covered["items"] += by_item.low <= 0 <= by_item.high
        covered["both"] += by_both.low <= 0 <= by_both.high
    assert covered["items"] / 400 < 0.80
    assert 0.92 <= covered["both"] / 400 <= 0.98


# Few items: differences of right and wrong answers (shares of items that only one of the two has right), and of graded
# scores like ROUGE-L: both vary, most are copies of each other, one gains a little everywhere and much now and then.
SHARES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.98)
DECISIONS = [(up, down) for up in SHARES for down in SHARES if down <= up and up + down <= 1]
GRADED: dict[str, Callable[[np.random.Generator, tuple[int, int]], np.ndarray]] = {
    "both vary": lambda g, shape: g.beta(2, 5, shape) - g.beta(2, 4, shape),
    "copies": lambda g, shape: np.where(g.uniform(size=shape) < 0.3, 0, g.beta(2, 5, shape) - g.beta(2, 4, shape)),
    "skewed": lambda g, shape: np.minimum(g.exponential(0.1, shape), 1.0) - 0.02,
    "rare and large": lambda g, shape: g.beta(0.5, 4, shape),
}
# The band below 93 % is two standard errors of a share of 0.93 in as many studies.
FEW = [pytest.param(300, 0.03, id="short"), pytest.param(4000, 0.008, id="long", marks=LONG.marks)]


def covered(differences_SN: np.ndarray, truth: float) -> dict[str, float]:
    """Share of studies whose intervals hold the truth: the interval of the items, and of an average with others."""
    items = np.arange(differences_SN.shape[1])
    hits = {"interval": 0, "average": 0}
    other = np.random.default_rng(70).choice([-1.0, 0.0, 1.0], size=(len(differences_SN), 5), p=[0.1, 0.7, 0.2])
    for differences_N, more in zip(differences_SN, other, strict=True):
        interval = paired.cluster_robust_interval(differences_N, items, bound=1.0)
        hits["interval"] += interval.low - 1e-12 <= truth <= interval.high + 1e-12
        average = paired.mean_of_intervals([interval, paired.cluster_robust_interval(more, np.arange(5), bound=1.0)])
        hits["average"] += average.low - 1e-12 <= (truth + 0.1) / 2 <= average.high + 1e-12
    return {name: count / len(differences_SN) for name, count in hits.items()}


@pytest.mark.parametrize(("count", "band"), FEW)
@pytest.mark.parametrize("items", [2, 5, 10, 20])
def test_no_interval_of_few_items_covers_less_than_ninety_three_percent(items: int, count: int, band: float) -> None:
    generator = np.random.default_rng(71)
    short = count < 1000
    worst: dict[str, float] = {}
    for up, down in DECISIONS[::5] if short else DECISIONS:
        luck = generator.uniform(size=(count, items))
        differences = np.where(luck < up, 1.0, np.where(luck < up + down, -1.0, 0.0))
        worst |= {f"{name} {up} {down}": share for name, share in covered(differences, up - down).items()}
    for name, draw in GRADED.items():
        truth = float(draw(np.random.default_rng(72), (1000, 2000)).mean())
        worst |= {f"{kind} {name}": share for kind, share in covered(draw(generator, (count, items)), truth).items()}
    assert min(worst.values()) >= 0.93 - band, sorted(worst.items(), key=lambda one: one[1])[:5]


@pytest.mark.parametrize(("count", "band"), FEW)
@pytest.mark.parametrize("items", [2, 5, 10, 20])
def test_few_items_without_a_difference_are_told_apart_five_times_in_a_hundred_at_most(
    items: int, count: int, band: float
) -> None:
    generator = np.random.default_rng(73)
    for discordant in (0.05, 0.2, 0.5, 0.8, 1.0):
        luck = generator.uniform(size=(count, items))
        made = np.where(luck < discordant / 2, 1.0, np.where(luck < discordant, -1.0, 0.0))
        intervals = [paired.cluster_robust_interval(one, np.arange(items), bound=1.0) for one in made]
        assert np.mean([paired.t_test(interval).p_value <= 0.05 for interval in intervals]) <= 0.05 + band
        # Half of the items differ, by 20 points of the average at least: never "equivalent within 2 points".
        if discordant >= 0.5:
            assert not any(equivalence_test(interval, margin=0.02).equivalent for interval in intervals)


def test_students_t_alone_covers_less_than_ninety_percent_of_few_items() -> None:
    # The reason for the made-up clusters, and the proof that the simulation above can fail a method.
    luck = np.random.default_rng(74).uniform(size=(600, 10))
    made = np.where(luck < 0.7, 1.0, np.where(luck < 0.75, -1.0, 0.0))
    intervals = [paired.cluster_robust_interval(one, np.arange(10)) for one in made if np.ptp(one)]
    assert np.mean([interval.low <= 0.65 <= interval.high for interval in intervals]) < 0.91
