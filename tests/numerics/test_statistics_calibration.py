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
