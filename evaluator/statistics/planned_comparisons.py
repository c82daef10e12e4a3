"""What a study may claim: declared comparisons on the same items, with errors, adjustment and power.

Starts from one row an item (`ITEMS`). Nothing is chosen on the test set, no value is counted twice, and
"no difference" is only said where an equivalence test says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
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
_FEWEST_UNLIKE = 20
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
        another) and conclusion: first or second higher, equivalent within the margin, undecided, or "cannot tell"
        where the differences show no spread (all alike, or a single cluster) and exact bounds decide nothing. Rows of
        the average have no BCa interval and no McNemar test; nor have tasks a BCa interval of which fewer than 20
        clusters differ from what most show: resamples know no more than these (of 10 it covers 90 to 93 %).

    Raises:
        DataError: a side is empty, has an item twice or without a score, or lacks an item or seed of the other.

    """
    rows = []
    for comparison in comparisons:
        pairs = pair_items(items, comparison)
        tasks = [part for _, part in pairs.group_by("task", maintain_order=True)]
        by_task = [_interval(part) for part in tasks]
        for part, interval in zip(tasks, by_task, strict=True):
            own = {"task": part["task"][0]} | _of_task(part, interval, generator, resamples)
            rows.append(_common(comparison, part, interval) | own)
        average = paired.mean_of_intervals(by_task, bound=_POINTS)
        shown = {"task": AVERAGE} | _of_average(pairs, generator, resamples)
        rows.append(_common(comparison, pairs, average) | shown)
    schema = pl.Schema([*COMPARED.items(), ("has_spread", pl.Boolean())])
    frame = pl.DataFrame(rows, schema=schema).with_columns(is_average=pl.col("task") == AVERAGE)
    judged = holm_within(frame, ["family", "is_average"]).with_columns(conclusion=_CONCLUSION)
    return judged.drop("is_average", "has_spread")


CANNOT_TELL = "cannot tell"
_CONCLUSION = (
    pl.when((pl.col("p_holm") <= 0.05) & (pl.col("difference") > 0))
    .then(pl.lit("first higher"))
    .when((pl.col("p_holm") <= 0.05) & (pl.col("difference") < 0))
    .then(pl.lit("second higher"))
    .when(pl.col("p_equivalence") < 0.05)
    .then(pl.lit("equivalent within the margin"))
    .when(~pl.col("has_spread"))
    .then(pl.lit(CANNOT_TELL))
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
        lacking = rows.filter(pl.col(side).is_null() | pl.col(side).is_nan())
        if lacking.height:
            row = lacking.row(0, named=True)
            raise DataError(
                f"{lacking.height} rows of {side} have no score, for example task {row['task']!r}, item "
                f"{row['item_id']!r}; leave these items out, or score them again",
                f"comparison {comparison.name}",
            )
        if rows.select(_PAIR).is_duplicated().any():
            raise DataError(
                f"{side} {chosen} has an item more than once at one seed; name the columns that tell its runs apart",
                f"comparison {comparison.name}",
            )
    # A full join, so that what one side lacks is seen and not dropped; a cluster may be null, and is then a value.
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


def _interval(pairs: pl.DataFrame) -> paired.Interval:
    points = _POINTS * (pairs["first"] - pairs["second"])
    return paired.cluster_robust_interval(points, pairs["cluster"], bound=_POINTS)


def _common(comparison: Comparison, pairs: pl.DataFrame, interval: paired.Interval) -> dict[str, Any]:
    """What the rows of single tasks and of their average have alike."""
    means = pairs.group_by("task").agg(pl.col("first", "second").mean()).select(pl.col("first", "second").mean())
    margin = comparison.margin
    # Without spread the made-up clusters of Bonett & Price say what could have been seen; an error of 0 says "all".
    error = interval.adjusted.error if interval.adjusted and not interval.has_spread else interval.standard_error
    return {
        "family": comparison.family,
        "comparison": comparison.name,
        "items": pairs.select("task", "item_id").n_unique(),
        "clusters": interval.clusters,
        "seeds": pairs["seed"].n_unique(),
        "first": _POINTS * means["first"].item(),
        "second": _POINTS * means["second"].item(),
        "difference": interval.estimate,
        "standard_error": interval.standard_error if interval.standard_error >= 0 else None,
        "low": interval.low,
        "high": interval.high,
        "p_value": paired.t_test(interval).p_value,
        "detectable": minimum_detectable_difference(error).minimum_detectable,
        "margin": margin,
        "p_equivalence": None if margin is None else equivalence_test(interval, margin=margin).p_value,
        "has_spread": interval.has_spread,
    }


def _of_task(
    pairs: pl.DataFrame, interval: paired.Interval, generator: np.random.Generator, resamples: int
) -> dict[str, Any]:
    """What is computed for single tasks alone."""
    first, second, clusters = (pairs[name].to_numpy() for name in ("first", "second", "cluster"))
    points = _POINTS * (first - second)
    enough = paired.clusters_unlike_most(points, clusters) >= _FEWEST_UNLIKE
    bca = paired.cluster_bootstrap_interval(points, clusters, generator, resamples=resamples) if enough else None
    several = pairs["seed"].n_unique() > 1
    over_seeds = paired.two_way_interval(points, clusters, pairs["seed"], bound=_POINTS) if several else None
    effect = paired.effect_size(first, second)
    independent = interval.clusters == pairs.height
    return {
        "p_permutation": paired.sign_flip_test(points, clusters, generator, resamples=resamples).p_value,
        "p_mcnemar": paired.mcnemar_exact(first == 1, second == 1).p_value
        if independent and paired.are_decisions(first, second)
        else None,
        "bca_low": bca.low if bca else None,
        "bca_high": bca.high if bca else None,
        "seeds_low": over_seeds.low if over_seeds else None,
        "seeds_high": over_seeds.high if over_seeds else None,
        "cohens_h": effect.cohens_h,
        "d_z": None if np.isnan(effect.standardised) else effect.standardised,
    }


def _of_average(pairs: pl.DataFrame, generator: np.random.Generator, resamples: int) -> dict[str, Any]:
    """What is computed for the average from all rows at once."""
    # Each task weighs the same, so an item counts by one over its task's number of rows.
    shares = pairs.select(
        difference=(pl.col("first") - pl.col("second")) / pl.len().over("task"),
        cluster=pl.concat_str("task", "cluster", separator="\0"),
        seed=pl.col("seed"),
    )
    flipped = paired.sign_flip_test(shares["difference"], shares["cluster"], generator, resamples=resamples)
    row: dict[str, Any] = {"p_permutation": flipped.p_value}
    if shares["seed"].n_unique() > 1:
        weight = _POINTS * shares.height / pairs["task"].n_unique()  # the mean of the weighted ones is the average
        bound = weight / min(pairs.group_by("task").len()["len"].to_list())
        over_seeds = paired.two_way_interval(
            weight * shares["difference"], shares["cluster"], shares["seed"], bound=bound
        )
        row |= {"seeds_low": max(over_seeds.low, -_POINTS), "seeds_high": min(over_seeds.high, _POINTS)}
    return row


def cells_of_items(items: pl.DataFrame) -> pl.DataFrame:
    """Mean score in percent by teacher, student, objective, seed and task: what methods are compared on."""
    keys = ["teacher", "student", "objective", "temperature", "noise", "seed", "task"]
    return items.group_by(keys, maintain_order=True).agg(score=_POINTS * pl.col("score").mean())


METHODS = pl.Schema(
    {
        "task": pl.String,
        "test": pl.String,
        "blocks": pl.Int64,
        "statistic": pl.Float64,  # this and the next three are null where the scores show no spread
        "p_value": pl.Float64,
        "effect": pl.Float64,
        "first": pl.String,
        "second": pl.String,
        "p_pairwise": pl.Float64,
    }
)


def compare_methods(cells: pl.DataFrame) -> pl.DataFrame:
    """Friedman and Kruskal-Wallis tests over objectives, with their pairwise tests, by task and over all.

    A block is one teacher, student, seed and task; only blocks with every objective enter Friedman's test.

    Args:
        cells: from `cells_of_items`, one row a block and objective (so one temperature and noise).

    Returns:
        Columns of `METHODS`, a row a pair of objectives; no rows of fewer than two objectives. Statistic and p-values
        are null where nothing can be told: one score an objective, or all scores equal.

    Raises:
        DataError: a cell has no score.

    """
    lacking = cells.filter(pl.col("score").is_null() | pl.col("score").is_nan()).height
    if lacking:
        raise DataError(f"{lacking} of {cells.height} cells have no score; leave them out, or score their items again")
    by_task = [(str(task), part) for (task,), part in cells.group_by("task", maintain_order=True)]
    rows: list[dict[str, Any]] = []
    for task, part in [*by_task, (AVERAGE, cells)]:
        wide = part.pivot("objective", index=["teacher", "student", "seed", "task"], values="score").drop_nulls()
        methods = tuple(sorted(part["objective"].unique()))
        tells = part["score"].n_unique() > 1 and part.height > len(methods) > 1
        groups = {method: part.filter(objective=method)["score"].to_numpy() for method in methods}
        results = [("kruskal", kruskal_wallis(groups) if tells else None)]
        if len(methods) > 2 and wide.height > 1:
            results.append(("friedman", friedman(wide.select(methods).to_numpy(), methods) if tells else None))
        for test, result in results:
            common = {"task": task, "test": test, "blocks": wide.height}
            if result is not None:
                common |= {"statistic": result.statistic, "p_value": result.p_value, "effect": result.effect}
            for (i, first), (j, second) in combinations(enumerate(methods), 2):
                pairwise = None if result is None else float(result.pairwise_p_values[i, j])
                rows.append(common | {"first": first, "second": second, "p_pairwise": pairwise})
    return pl.DataFrame(rows, schema=METHODS)


def method_model(cells: pl.DataFrame, reference: str) -> MixedModel | None:
    """What each objective adds to `reference`, with random intercepts for task, seed, student, and teacher's pair.

    Factors that have one level only are left out, and pairs where there is one teacher: then a pair is a student.

    Args:
        cells: from `cells_of_items`.
        reference: the objective that the others are compared with, `sft` say.

    Returns:
        The model; None where nothing can be told: one objective, or one score an objective.

    """
    with_pair = cells.with_columns(pair=pl.concat_str("teacher", "student", separator=" → ", ignore_nulls=True))
    several = cells["teacher"].drop_nulls().n_unique() > 1
    factors = ("task", "seed", "student", *(["pair"] if several else []))
    random = [column for column in factors if with_pair[column].n_unique() > 1]
    objectives = cells["objective"].n_unique()
    if objectives < 2 or not random or cells.height <= objectives + len(random) or cells["score"].n_unique() < 2:
        return None
    return mixed_model(with_pair, "score", "objective", reference, random)
