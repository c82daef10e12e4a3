"""What a study may claim: declared comparisons on the same items, with errors, adjustment and power.

Starts from one row an item (`ITEMS`). Nothing is chosen on the test set, no value is counted twice, and
"no difference" is only said where an equivalence test says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl

from tutelage.errors import DataError
from tutelage.evaluator.statistics import paired
from tutelage.evaluator.statistics.equivalence import equivalence_test
from tutelage.evaluator.statistics.group_tests import friedman, kruskal_wallis
from tutelage.evaluator.statistics.mixed_model import MixedModel, mixed_model
from tutelage.evaluator.statistics.multiple_testing import holm_within
from tutelage.evaluator.statistics.power import minimum_detectable_difference
from tutelage.evaluator.statistics.scores import AVERAGE

ITEMS = pl.Schema(
    {
        "teacher": pl.String,
        "student": pl.String,
        "objective": pl.String,
        "temperature": pl.Float64,
        "noise": pl.Float64,
        "seed": pl.Int64,
        "task": pl.String,
        "item_id": pl.String,
        "cluster": pl.String,  # items that share one (a text, a duplicate) are not independent
        "score": pl.Float64,  # 0 … 1
    }
)
_PAIR = ["task", "item_id", "cluster", "seed"]
_POINTS = 100  # scores are 0 … 1, tables are in percentage points

COMPARED = pl.Schema(
    {
        "family": pl.String,
        "comparison": pl.String,
        "task": pl.String,
        "items": pl.Int64,
        "clusters": pl.Int64,
        "seeds": pl.Int64,
        "first": pl.Float64,  # percent
        "second": pl.Float64,
        "difference": pl.Float64,  # points, first minus second
        "standard_error": pl.Float64,
        "low": pl.Float64,  # 95 %, of these checkpoints: items are random
        "high": pl.Float64,
        "bca_low": pl.Float64,
        "bca_high": pl.Float64,
        "seeds_low": pl.Float64,  # 95 %, of the method: items and seeds are random
        "seeds_high": pl.Float64,
        "p_value": pl.Float64,  # cluster-robust t
        "p_permutation": pl.Float64,
        "p_mcnemar": pl.Float64,  # null unless scores are binary, of one seed, in clusters of one
        "cohens_h": pl.Float64,
        "d_z": pl.Float64,
        "detectable": pl.Float64,  # smallest true difference found with 80 % power
        "margin": pl.Float64,
        "p_equivalence": pl.Float64,
    }
)


@dataclass(frozen=True)
class Comparison:
    """Two sets of rows that are compared item by item, declared before the run.

    `first` and `second` give columns of `ITEMS` and the value, or a list of values, that rows must have. `margin` in
    percentage points is the largest difference that counts as none; with it, equivalence is tested too.
    """

    name: str
    family: str
    first: Mapping[str, Any] = field(hash=False)
    second: Mapping[str, Any] = field(hash=False)
    margin: float | None = None


def compare(
    items: pl.DataFrame, comparisons: Sequence[Comparison], generator: np.random.Generator, *, resamples: int = 2000
) -> pl.DataFrame:
    """Every declared comparison, by task and for the unweighted mean of the tasks.

    Args:
        items: rows of `ITEMS`.
        comparisons: what to compare.
        generator: for the bootstrap and the permutations.
        resamples: of each.

    Returns:
        Columns of `COMPARED`, then p_holm (within the family: the averages are one, the single tasks
        another) and conclusion. Rows of the average have no BCa interval and no McNemar test.

    Raises:
        DataError: a side is empty, has an item twice, or lacks an item or seed of the other.

    """
    rows = []
    for comparison in comparisons:
        pairs = pair_items(items, comparison)
        tasks = [part for _, part in pairs.group_by("task", maintain_order=True)]
        by_task = [_task_row(comparison, part, generator, resamples) for part in tasks]
        rows += [row for row, _ in by_task]
        rows.append(_average_row(comparison, tasks, [interval for _, interval in by_task], generator, resamples))
    frame = pl.DataFrame(rows, schema=COMPARED).with_columns(is_average=pl.col("task") == AVERAGE)
    return holm_within(frame, ["family", "is_average"]).drop("is_average").with_columns(conclusion=_CONCLUSION)


_CONCLUSION = (
    pl.when((pl.col("p_holm") <= 0.05) & (pl.col("difference") > 0))
    .then(pl.lit("first higher"))
    .when((pl.col("p_holm") <= 0.05) & (pl.col("difference") < 0))
    .then(pl.lit("second higher"))
    .when(pl.col("p_equivalence") < 0.05)
    .then(pl.lit("equivalent within the margin"))
    .otherwise(pl.lit("undecided"))
)


def rows_with(items: pl.DataFrame, chosen: Mapping[str, Any]) -> pl.DataFrame:
    """Rows that have in each column the chosen value, or one of a list of values; null is a value."""
    return items.filter(
        pl.col(column).is_in(value) if isinstance(value, list) else pl.col(column).eq_missing(value)
        for column, value in chosen.items()
    )


def pair_items(items: pl.DataFrame, comparison: Comparison) -> pl.DataFrame:
    """The two sides of a comparison, joined on task, item and seed.

    Returns:
        Columns task, item_id, cluster, seed, first, second; scores 0 … 1.

    Raises:
        DataError: as `compare`.

    """
    sides = {
        side: rows_with(items, chosen).select(*_PAIR, pl.col("score").alias(side))
        for side, chosen in (("first", comparison.first), ("second", comparison.second))
    }
    for side, rows in sides.items():
        chosen = dict(getattr(comparison, side))
        if rows.is_empty():
            raise DataError(f"no row has {chosen}; evaluate it or change {side}", f"comparison {comparison.name}")
        if rows.select(_PAIR).is_duplicated().any():
            raise DataError(
                f"{side} {chosen} has an item more than once at one seed; name the columns that tell its runs apart",
                f"comparison {comparison.name}",
            )
    pairs = sides["first"].join(sides["second"], on=_PAIR, how="full", coalesce=True, nulls_equal=True)
    lonely = pairs.filter(pl.col("first").is_null() | pl.col("second").is_null())
    if lonely.height:
        row = lonely.row(0, named=True)
        raise DataError(
            f"{lonely.height} items are on one side only, for example task {row['task']!r}, item {row['item_id']!r}, "
            f"seed {row['seed']}; both sides need the same tasks, items and seeds",
            f"comparison {comparison.name}",
        )
    return pairs.sort(_PAIR)


def _task_row(
    comparison: Comparison, pairs: pl.DataFrame, generator: np.random.Generator, resamples: int
) -> tuple[dict[str, Any], paired.Interval]:
    first, second = (_POINTS * pairs[side].to_numpy() for side in ("first", "second"))
    differences, clusters = first - second, pairs["cluster"].to_numpy()
    interval = paired.cluster_robust_interval(differences, clusters)
    bca = paired.cluster_bootstrap_interval(differences, clusters, generator, resamples=resamples)
    seeds = pairs["seed"].n_unique()
    over_seeds = paired.two_way_interval(differences, clusters, pairs["seed"].to_numpy()) if seeds > 1 else None
    effect = paired.effect_size(first / _POINTS, second / _POINTS)
    row = _common(comparison, str(pairs["task"][0]), pairs, interval) | {
        "p_permutation": paired.sign_flip_test(differences, clusters, generator, resamples=resamples).p_value,
        "p_mcnemar": _mcnemar(pairs, interval),
        "bca_low": bca.low,
        "bca_high": bca.high,
        "seeds_low": over_seeds.low if over_seeds else None,
        "seeds_high": over_seeds.high if over_seeds else None,
        "cohens_h": effect.cohens_h,
        "d_z": effect.standardised,
    }
    return row, interval


def _mcnemar(pairs: pl.DataFrame, interval: paired.Interval) -> float | None:
    binary = pairs.select(pl.all_horizontal(pl.col("first", "second").is_in([0.0, 1.0])).all()).item()
    if not binary or interval.clusters < pairs.height:
        return None
    return paired.mcnemar_exact(pairs["first"].to_numpy() == 1, pairs["second"].to_numpy() == 1).p_value


def _common(comparison: Comparison, task: str, pairs: pl.DataFrame, interval: paired.Interval) -> dict[str, Any]:
    means = pairs.group_by("task").agg(pl.col("first", "second").mean()).select(pl.col("first", "second").mean())
    margin = comparison.margin
    return {
        "family": comparison.family,
        "comparison": comparison.name,
        "task": task,
        "items": pairs.select("task", "item_id").n_unique(),
        "clusters": interval.clusters,
        "seeds": pairs["seed"].n_unique(),
        "first": _POINTS * means["first"].item(),
        "second": _POINTS * means["second"].item(),
        "difference": interval.estimate,
        "standard_error": interval.standard_error,
        "low": interval.low,
        "high": interval.high,
        "p_value": paired.t_test(interval).p_value,
        "detectable": minimum_detectable_difference(interval.standard_error).minimum_detectable,
        "margin": margin,
        "p_equivalence": None if margin is None else equivalence_test(interval, margin=margin).p_value,
    }


def _average_row(
    comparison: Comparison,
    tasks: Sequence[pl.DataFrame],
    intervals: Sequence[paired.Interval],
    generator: np.random.Generator,
    resamples: int,
) -> dict[str, Any]:
    pairs = pl.concat(tasks)
    interval = paired.mean_of_intervals(intervals)
    # Each task weighs the same, so an item counts by one over its task's number of rows.
    shares = pairs.select(
        difference=(pl.col("first") - pl.col("second")) / pl.len().over("task"),
        cluster=pl.concat_str("task", "cluster", separator="\0"),
        seed=pl.col("seed"),
    )
    flipped = paired.sign_flip_test(shares["difference"], shares["cluster"], generator, resamples=resamples)
    row = _common(comparison, AVERAGE, pairs, interval) | {"p_permutation": flipped.p_value}
    if shares["seed"].n_unique() > 1:
        points = shares["difference"] * (_POINTS * shares.height / len(tasks))  # their mean is the average
        over_seeds = paired.two_way_interval(points, shares["cluster"], shares["seed"])
        row |= {"seeds_low": over_seeds.low, "seeds_high": over_seeds.high}
    return row


def cells_of_items(items: pl.DataFrame) -> pl.DataFrame:
    """Mean score in percent by teacher, student, objective, seed and task: what methods are compared on."""
    keys = ["teacher", "student", "objective", "temperature", "noise", "seed", "task"]
    return items.group_by(keys, maintain_order=True).agg(score=_POINTS * pl.col("score").mean())


def compare_methods(cells: pl.DataFrame) -> pl.DataFrame:
    """Friedman and Kruskal-Wallis tests over objectives, with their pairwise tests, by task and over all.

    A block is one teacher, student, seed and task; only blocks with every objective enter Friedman's test.

    Args:
        cells: from `cells_of_items`, one row a block and objective (so one temperature and noise).

    Returns:
        Columns task, test, blocks, statistic, p_value, effect, first, second, p_pairwise: a row a pair of
        objectives; the last three say which.

    """
    by_task = [(str(task), part) for (task,), part in cells.group_by("task", maintain_order=True)]
    rows: list[dict[str, Any]] = []
    for task, part in [*by_task, (AVERAGE, cells)]:
        wide = part.pivot("objective", index=["teacher", "student", "seed", "task"], values="score").drop_nulls()
        methods = tuple(sorted(part["objective"].unique()))
        results = [("kruskal", kruskal_wallis({m: part.filter(objective=m)["score"].to_numpy() for m in methods}))]
        if len(methods) > 2 and wide.height > 1:
            results.append(("friedman", friedman(wide.select(methods).to_numpy(), methods)))
        for test, result in results:
            common = {"task": task, "test": test, "blocks": wide.height, "statistic": result.statistic}
            common |= {"p_value": result.p_value, "effect": result.effect}
            rows += [
                common
                | {"first": methods[i], "second": methods[j], "p_pairwise": float(result.pairwise_p_values[i, j])}
                for i in range(len(methods))
                for j in range(i + 1, len(methods))
            ]
    return pl.DataFrame(rows)


def method_model(cells: pl.DataFrame, reference: str) -> MixedModel:
    """What each objective adds to `reference`, with random intercepts for task, seed, student, and teacher's pair.

    Factors that have one level only are left out, and pairs where there is one teacher: then a pair is a student.

    Args:
        cells: from `cells_of_items`.
        reference: the objective that the others are compared with, `sft` say.

    """
    with_pair = cells.with_columns(pair=pl.concat_str("teacher", "student", separator=" → ", ignore_nulls=True))
    several = cells["teacher"].drop_nulls().n_unique() > 1
    factors = ("task", "seed", "student", *(["pair"] if several else []))
    random = [column for column in factors if with_pair[column].n_unique() > 1]
    return mixed_model(with_pair, "score", "objective", reference, random)
