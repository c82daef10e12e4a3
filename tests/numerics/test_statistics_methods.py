"""The methods equal published examples, scipy and statsmodels."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import statsmodels.api as sm
from scipy import optimize, stats
from statsmodels.stats.power import normal_power
from statsmodels.stats.weightstats import ttost_paired

from tutelage.errors import DataError
from tutelage.evaluator.statistics import paired
from tutelage.evaluator.statistics.equivalence import equivalence_test
from tutelage.evaluator.statistics.group_tests import friedman, kruskal_wallis
from tutelage.evaluator.statistics.mixed_model import mixed_model
from tutelage.evaluator.statistics.multiple_testing import holm, holm_within
from tutelage.evaluator.statistics.power import minimum_detectable_difference
from tutelage.evaluator.statistics.rank_correlation import spearman_over_pairs


@pytest.fixture
def clustered() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(3)
    clusters = np.repeat(np.arange(40), generator.integers(1, 6, 40))
    shared = generator.normal(0.2, 1, 40)[clusters]
    return shared + generator.normal(0, 0.5, len(clusters)), clusters


def test_holm_on_a_worked_example() -> None:
    # Four hypotheses with p = 0.01, 0.04, 0.03, 0.005: Holm multiplies 0.005 by 4, 0.01 by 3, 0.03 by 2.
    adjusted = holm([0.01, 0.04, 0.03, 0.005])
    assert adjusted.p_values == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert adjusted.rejected.tolist() == [True, False, False, True]


def test_holm_is_step_down_by_hand() -> None:
    p_values = np.random.default_rng(1).uniform(size=50) ** 3
    order = np.argsort(p_values)
    by_hand = np.minimum(np.maximum.accumulate(p_values[order] * np.arange(50, 0, -1)), 1)
    assert holm(p_values).p_values[order] == pytest.approx(by_hand, rel=1e-12)
    assert holm([]).p_values.tolist() == []


def test_holm_stays_within_its_family_and_passes_nulls_over() -> None:
    frame = pl.DataFrame({"family": ["a", "b", "a", "b", "b"], "p_value": [0.02, 0.01, 0.03, None, 0.5]})
    assert holm_within(frame, ["family"])["p_holm"].to_list() == pytest.approx([0.04, 0.02, 0.04, None, 0.5])


def test_mcnemar_on_a_published_table() -> None:
    # Fay 2010 (R Journal 2:1, "Two-sided exact tests"): table 21, 9, 2, 12; discordant 9 and 2, p = 0.06543.
    first = np.repeat([1, 1, 0, 0], [21, 9, 2, 12])
    second = np.repeat([1, 0, 1, 0], [21, 9, 2, 12])
    result = paired.mcnemar_exact(first, second)
    assert (result.only_first, result.only_second) == (9, 2)
    assert result.p_value == pytest.approx(0.06543, abs=5e-6)
    assert result.p_value == pytest.approx(stats.binomtest(2, 11).pvalue, rel=1e-12)


def test_mcnemar_without_discordant_items() -> None:
    assert paired.mcnemar_exact([1, 0, 1], [1, 0, 1]).p_value == 1.0


def test_cluster_robust_error_equals_statsmodels(clustered: tuple[np.ndarray, np.ndarray]) -> None:
    differences, clusters = clustered
    fit = sm.OLS(differences, np.ones(len(differences))).fit(
        cov_type="cluster", cov_kwds={"groups": clusters}, use_t=True
    )
    interval = paired.cluster_robust_interval(differences, clusters)
    assert interval.standard_error == pytest.approx(fit.bse[0], rel=1e-12)
    assert (interval.low, interval.high) == pytest.approx(tuple(fit.conf_int()[0]), rel=1e-9)
    assert paired.t_test(interval).p_value == pytest.approx(fit.pvalues[0], rel=1e-9)
    assert (interval.observations, interval.clusters) == (len(differences), 40)


def test_two_way_error_equals_statsmodels(clustered: tuple[np.ndarray, np.ndarray]) -> None:
    differences, clusters = clustered
    seeds = np.random.default_rng(5).integers(0, 6, len(differences))
    both = clusters * 10 + seeds
    one_way = [
        sm.OLS(differences, np.ones(len(differences))).fit(cov_type="cluster", cov_kwds={"groups": groups}).bse[0]
        for groups in (clusters, seeds, both)
    ]
    variances = np.square(one_way)
    expected = np.sqrt(max(variances[0] + variances[1] - variances[2], variances[0], variances[1]))
    interval = paired.two_way_interval(differences, clusters, seeds)
    assert interval.standard_error == pytest.approx(expected, rel=1e-12)
    assert interval.clusters == 6


def test_clusters_of_one_give_the_paired_t_test() -> None:
    generator = np.random.default_rng(4)
    first, second = generator.normal(0.3, 1, 60), generator.normal(0, 1, 60)
    interval = paired.cluster_robust_interval(first - second, np.arange(60))
    expected = stats.ttest_rel(first, second)
    assert paired.t_test(interval).statistic == pytest.approx(expected.statistic, rel=1e-12)
    assert paired.t_test(interval).p_value == pytest.approx(expected.pvalue, rel=1e-12)
    assert (interval.low, interval.high) == pytest.approx(tuple(expected.confidence_interval()), rel=1e-12)


def test_bootstrap_agrees_with_scipy() -> None:
    sample = np.random.default_rng(6).exponential(1, 80)  # skewed, so that BCa differs from percentile
    ours = {
        method: paired.cluster_bootstrap_interval(
            sample, np.arange(80), np.random.default_rng(7), method=method, resamples=40_000
        )
        for method in ("bca", "percentile")
    }
    for method, interval in ours.items():
        theirs = stats.bootstrap(
            (sample,), np.mean, method=method, n_resamples=40_000, rng=np.random.default_rng(8), batch=4000
        ).confidence_interval
        assert (interval.low, interval.high) == pytest.approx(tuple(theirs), abs=0.01)
    assert ours["bca"].high - ours["percentile"].high > 0.02


def test_sign_flips_are_exact_for_few_clusters() -> None:
    # Fisher's paired data (Darwin's maize, 15 pairs, eighths of an inch): exact two-sided p = 0.0526
    # (Fisher 1935, The Design of Experiments, section 21: 863 of 32,768 arrangements each way).
    darwin = np.array([49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48])
    result = paired.sign_flip_test(darwin, np.arange(15), np.random.default_rng(0), resamples=2**15)
    assert result.p_value == pytest.approx(2 * 863 / 32768, abs=1e-9)


def test_effect_sizes_by_hand() -> None:
    effect = paired.effect_size([1, 1, 1, 0], [0, 1, 0, 0])
    assert effect.difference == 0.5
    assert effect.standardised == pytest.approx(0.5 / np.std([1, 0, 1, 0], ddof=1))
    assert effect.cohens_h == pytest.approx(2 * np.arcsin(np.sqrt(0.75)) - 2 * np.arcsin(np.sqrt(0.25)))


@pytest.mark.parametrize(("items", "p_value"), [(1, 1.0), (2, 0.5), (5, 0.0625), (6, 0.03125), (20, 2 / 2**20)])
def test_items_that_all_gain_have_the_p_value_of_the_sign_test(items: int, p_value: float) -> None:
    interval = paired.cluster_robust_interval([1.0] * items, np.arange(items), bound=1.0)
    assert paired.t_test(interval).p_value >= p_value * (1 - 1e-9)
    exact = paired.SameTail(1.0, 1.0, items)
    assert min(1.0, 2 * exact.p_at_most(0.0)) == pytest.approx(p_value)
    assert exact.bounds(0.025)[0] == pytest.approx(1 - 2 * (1 - 0.025 ** (1 / items)))  # Clopper and Pearson, by hand
    assert (interval.low > 0) == (p_value < 0.05)
    assert interval.high >= 1.0


@pytest.mark.parametrize("items", [1, 2, 20])
def test_items_that_all_tie_are_not_shown_to_be_equivalent(items: int) -> None:
    interval = paired.cluster_robust_interval([0.0] * items, np.arange(items), bound=100.0)
    assert paired.t_test(interval).p_value == 1.0
    equivalence = equivalence_test(interval, margin=2.0)
    assert not equivalence.equivalent
    assert equivalence.p_value >= 0.98**items  # if 2 % of all items differed by all, this often none would show
    assert interval.low < -2.0 < 2.0 < interval.high


def test_three_hundred_ties_are_equivalent_within_two_points() -> None:
    interval = paired.cluster_robust_interval([0.0] * 300, np.arange(300), bound=100.0)
    assert equivalence_test(interval, margin=2.0).p_value == pytest.approx(0.98**300)
    assert equivalence_test(interval, margin=2.0).equivalent


def test_a_constant_difference_of_unknown_bound_says_nothing() -> None:
    for value in (0.0, 1.0, 0.1 + 0.2):
        interval = paired.cluster_robust_interval([value] * 50, np.arange(50))
        assert paired.t_test(interval).p_value == 1.0
        assert not equivalence_test(interval, margin=10.0).equivalent
        assert (interval.low, interval.high) == (-np.inf, np.inf)
        drawn = paired.cluster_bootstrap_interval([value] * 50, np.arange(50), np.random.default_rng(0))
        assert (drawn.low, drawn.high) == (-np.inf, np.inf)
    assert paired.cluster_bootstrap_interval([1.0, 0.0], [0, 0], np.random.default_rng(0)).high == np.inf


def test_a_task_without_spread_makes_the_average_less_certain_not_more() -> None:
    noisy = np.random.default_rng(2).choice([-1.0, 0.0, 1.0], 40)
    tied, other = np.zeros(5), np.random.default_rng(3).choice([-1.0, 0.0, 1.0], 5)
    parts = [paired.cluster_robust_interval(one, np.arange(len(one)), bound=1.0) for one in (noisy, tied, other)]
    widths = [paired.mean_of_intervals([parts[0], part]) for part in parts[1:]]
    assert widths[0].high - widths[0].low > 0.25
    assert paired.t_test(widths[0]).p_value > 0.05
    alone = paired.mean_of_intervals([parts[1], parts[1]])
    assert paired.t_test(alone).p_value > 0.5
    assert alone.low < -0.2 < 0.2 < alone.high


@pytest.mark.parametrize("method", ["interval", "bootstrap", "signs"])
def test_a_score_that_is_no_number_is_refused_with_a_count(method: str) -> None:
    differences, clusters, generator = [1.0, np.nan, 0.0, np.nan], np.arange(4), np.random.default_rng(0)
    functions = {
        "interval": lambda: paired.cluster_robust_interval(differences, clusters),
        "bootstrap": lambda: paired.cluster_bootstrap_interval(differences, clusters, generator),
        "signs": lambda: paired.sign_flip_test(differences, clusters, generator),
    }
    with pytest.raises(DataError, match="2 of 4 paired differences are no numbers"):
        functions[method]()


def test_mean_of_intervals_is_welch_for_two() -> None:
    generator = np.random.default_rng(9)
    one, two = generator.normal(1, 2, 12), generator.normal(0, 1, 30)
    intervals = [paired.cluster_robust_interval(sample, np.arange(len(sample))) for sample in (one, -two)]
    expected = stats.ttest_ind(one, two, equal_var=False)  # the mean of one and -two is half their difference
    assert paired.t_test(paired.mean_of_intervals(intervals)).p_value == pytest.approx(expected.pvalue, rel=1e-12)


def test_equivalence_equals_statsmodels() -> None:
    generator = np.random.default_rng(10)
    first, second = generator.normal(0.05, 1, 300), generator.normal(0, 1, 300)
    interval = paired.cluster_robust_interval(first - second, np.arange(300))
    result = equivalence_test(interval, margin=0.3)
    assert result.p_value == pytest.approx(ttost_paired(first, second, -0.3, 0.3)[0], rel=1e-10)
    assert result.equivalent == (result.low > -0.3 and result.high < 0.3)


def test_the_detectable_difference_has_the_power_that_it_says() -> None:
    detectable = minimum_detectable_difference(1.5).minimum_detectable
    assert detectable == pytest.approx(1.5 * 2.8016, rel=1e-4)
    assert normal_power(detectable / 1.5, 1, 0.05) == pytest.approx(0.8, abs=1e-5)


def test_friedman_and_nemenyi_on_a_published_study() -> None:
    # Demšar 2006, table 6: four C4.5 variants on 14 data sets. Average ranks 3.143, 2.000, 2.893, 1.964,
    # chi² = 9.28 (no correction for ties); at 0.10 Nemenyi tells C4.5 from +m and +m+cf, at 0.05 no pair.
    # The 0.9751 is one of two equal printed values that the paper ranks 2 and 3.
    table = np.array(
        [
            [0.763, 0.768, 0.771, 0.798], [0.599, 0.591, 0.590, 0.569], [0.954, 0.971, 0.968, 0.967],
            [0.628, 0.661, 0.654, 0.657], [0.882, 0.888, 0.886, 0.898], [0.936, 0.931, 0.916, 0.931],
            [0.661, 0.668, 0.609, 0.685], [0.583, 0.583, 0.563, 0.625], [0.775, 0.838, 0.866, 0.875],
            [1.000, 1.000, 1.000, 1.000], [0.940, 0.962, 0.965, 0.962], [0.619, 0.666, 0.614, 0.669],
            [0.972, 0.981, 0.9751, 0.975], [0.957, 0.978, 0.946, 0.970],
        ]
    )  # fmt: skip
    result = friedman(table, ("C4.5", "+m", "+cf", "+m+cf"))
    ranks = stats.rankdata(-table, axis=1)
    ties = sum(sum(n**3 - n for n in np.unique(row, return_counts=True)[1]) for row in ranks)
    assert ranks.mean(0) == pytest.approx([3.143, 2.0, 2.893, 1.964], abs=5e-4)
    assert result.statistic * (1 - ties / (14 * (4**3 - 4))) == pytest.approx(9.28, abs=0.01)
    assert result.effect == pytest.approx(result.statistic / (14 * 3))
    upper = result.pairwise_p_values[np.triu_indices(4, 1)]  # 01 02 03 12 13 23
    assert ((upper > 0.05) & (upper < 0.10)).tolist() == [True, False, True, False, False, False]
    assert upper.min() > 0.05


def test_kruskal_equals_scipy_and_its_effect_by_hand() -> None:
    groups = {"a": [27, 2, 4, 18, 7, 9], "b": [20, 8, 14, 36, 21, 22], "c": [34, 31, 3, 23, 30, 6]}
    result = kruskal_wallis(groups)
    assert result.p_value == pytest.approx(stats.kruskal(*groups.values()).pvalue)
    assert result.effect == pytest.approx(result.statistic / 17)
    assert result.methods == ("a", "b", "c")


@pytest.mark.parametrize(("pairs", "p_value"), [(2, 1.0), (3, 2 / 6), (4, 2 / 24), (5, 2 / 120), (7, 2 / 5040)])
def test_few_pairs_in_order_are_as_likely_as_their_orders(pairs: int, p_value: float) -> None:
    values = np.arange(float(pairs))[:, None]
    found = spearman_over_pairs(values, values**2, np.random.default_rng(0))
    assert found.rho == pytest.approx(1.0)
    assert found.p_value == pytest.approx(p_value)
    assert (found.low is None) == (pairs < 5)


def test_more_pairs_have_scipys_p_value() -> None:
    first, second = np.random.default_rng(1).normal(size=(2, 11, 1))
    found = spearman_over_pairs(first, second, np.random.default_rng(0))
    assert found.p_value == pytest.approx(stats.spearmanr(first.ravel(), second.ravel()).pvalue)


def test_values_that_are_no_numbers_are_refused_by_correlation_and_adjustment() -> None:
    with pytest.raises(DataError, match="no number"):
        spearman_over_pairs([[1.0], [np.nan], [3.0]], [[1.0], [2.0], [3.0]], np.random.default_rng(0))
    with pytest.raises(DataError, match="1 of 3 p-values"):
        holm([0.01, float("nan"), 0.04])


def test_mixed_model_finds_what_was_put_in() -> None:
    generator = np.random.default_rng(11)
    rows = []
    seed_shifts = generator.normal(0, 1, 6)
    for task, task_shift in enumerate(generator.normal(0, 8, 12)):
        for seed, seed_shift in enumerate(seed_shifts):
            for objective, gain in (("sft", 0.0), ("gkd", 3.0), ("seq_kd", 0.0)):
                rows.append((objective, f"t{task}", seed, 50 + task_shift + seed_shift + gain + generator.normal(0, 1)))
    cells = pl.DataFrame(rows, schema=["objective", "task", "seed", "score"], orient="row")
    model = mixed_model(cells, "score", "objective", "sft", ["task", "seed"])
    effects = {effect.name: effect for effect in model.effects}
    # The design is balanced, so the coefficient is the plain difference of means.
    means = dict(cells.group_by("objective").agg(pl.col("score").mean()).iter_rows())
    assert effects["gkd"].estimate == pytest.approx(means["gkd"] - means["sft"], abs=1e-6)
    assert abs(effects["gkd"].estimate - 3) < 4 * effects["gkd"].standard_error
    assert effects["gkd"].standard_error == pytest.approx((2 * model.residual_variance / 72) ** 0.5, rel=1e-4)
    assert effects["gkd"].p_value < 1e-6
    assert effects["seq_kd"].p_value > 0.01
    assert model.variances["task"] > 10 * model.variances["seed"]
    assert model.residual_variance == pytest.approx(1, abs=0.3)
    assert model.observations == 216


def crossed_cells(seed: int) -> pl.DataFrame:
    """Scores of three methods over tasks, seeds and students, each with a shift of its own, some of them none."""
    generator = np.random.default_rng(seed)
    tasks, seeds = int(generator.integers(2, 8)), int(generator.integers(2, 6))
    shifts = [
        generator.normal(0, generator.choice(spreads), count)
        for spreads, count in (([0, 1, 8], tasks), ([0, 0.5, 3], seeds), ([0, 5], 3))
    ]
    rows = [
        (method, f"t{t}", s, f"u{u}", 50 + shifts[0][t] + shifts[1][s] + shifts[2][u] + gain + generator.normal(0, 1))
        for t in range(tasks)
        for s in range(seeds)
        for u in range(3)
        for method, gain in (("sft", 0.0), ("gkd", 3.0), ("seq_kd", 0.0))
    ]
    return pl.DataFrame(rows, schema=["method", "task", "seed", "student", "score"], orient="row")


def restricted_likelihood(cells: pl.DataFrame, random: list[str], variances: list[float]) -> float:
    """The restricted log-likelihood by its formula, with the whole covariance matrix (Patterson & Thompson 1971).

    `variances` are of the random intercepts, then of the residual.
    """
    y = cells["score"].to_numpy()
    methods = cells["method"].unique().sort().to_list()
    design = np.stack([np.ones(len(y)), *((cells["method"] == one).to_numpy() for one in methods[1:])], axis=1)
    covariance = variances[-1] * np.eye(len(y))
    for column, variance in zip(random, variances, strict=False):
        labels = cells[column].to_numpy()
        covariance += variance * (labels[:, None] == labels)
    inverse = np.linalg.inv(covariance)
    information = design.T @ inverse @ design
    rest = y - design @ np.linalg.solve(information, design.T @ inverse @ y)
    logs = np.linalg.slogdet(covariance)[1] + np.linalg.slogdet(information)[1]
    return float(-0.5 * (logs + rest @ inverse @ rest))


@pytest.mark.parametrize("seed", [1, 4, pytest.param(7, marks=pytest.mark.long)])
def test_mixed_models_reach_the_highest_likelihood(seed: int) -> None:
    cells, random = crossed_cells(seed), ["task", "seed", "student"]
    model = mixed_model(cells, "score", "method", "sft", random)

    def loss(roots: np.ndarray) -> float:
        return -restricted_likelihood(cells, random, [*np.square(roots[:-1]), np.square(roots[-1]) + 1e-9])

    found = [*(model.variances[name] for name in random), model.residual_variance]
    ours = restricted_likelihood(cells, random, found)
    options = {"xatol": 1e-5, "fatol": 1e-7, "maxiter": 250}
    starts = (np.sqrt(found) + 0.05, [1.0, 1.0, 1.0, 1.0])
    best = min(optimize.minimize(loss, start, method="Nelder-Mead", options=options).fun for start in starts)
    assert ours == pytest.approx(-best, abs=1e-4)
    assert model.converged


def test_an_optimiser_that_ends_at_a_singular_point_leaves_the_fit_to_the_others() -> None:
    model = mixed_model(crossed_cells(23), "score", "method", "sft", ["task", "seed", "student"])
    assert model.converged
    assert {effect.name for effect in model.effects} == {"Intercept", "gkd", "seq_kd"}


def test_a_cell_without_a_score_is_refused_by_the_mixed_model() -> None:
    cells = crossed_cells(1).with_columns(score=pl.when(pl.col("seed") == 0).then(float("nan")).otherwise("score"))
    with pytest.raises(DataError, match=r"\d+ of 144 values of score are no numbers"):
        mixed_model(cells, "score", "method", "sft", ["task"])
