"""Whether what a study declared before its run shows: verdicts by fixed rules from comparisons and trends.

A claim about a family of comparisons needs every member, on the average of the tasks, to fall on the expected side with
an adjusted p ≤ 0.05 over items and with an interval over items and training runs that excludes zero; equivalence needs
that interval to lie within the margin. One training a side has no such interval, and tells nothing. A claim about a
trend needs the interval of Spearman's rho to exclude zero on the expected side, and p ≤ 0.05; "none" needs it to hold
zero. Fewer than five runs have no such interval, and tell nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from tutelage.evaluator.statistics.planned_comparisons import CANNOT_TELL
from tutelage.evaluator.statistics.rank_correlation import Correlation, by_pair, spearman_over_pairs
from tutelage.evaluator.statistics.scores import AVERAGE

SHOWS, PARTLY, NOT, OPPOSITE, UNDECIDED = "shows", "partly", "does not show", "the opposite shows", "undecided"
_HIGHER = {"first higher": 1.0, "second higher": -1.0}
VERDICTS = pl.Schema(
    {"claim": pl.String, "expected": pl.String, "found": pl.String, "test": pl.String, "verdict": pl.String}
)


def directions(compared: pl.DataFrame) -> pl.DataFrame:
    """The averages of `planned_comparisons.compare` with `holds`: what each says of the method, other runs included.

    first higher, second higher, equivalent, these runs only (so over items, but not over runs), undecided, or cannot
    tell (the differences show no spread).
    """
    averages = compared.filter(task=AVERAGE)
    beyond = (pl.col("seeds_low") > 0) | (pl.col("seeds_high") < 0)
    within = (pl.col("seeds_low") > -pl.col("margin")) & (pl.col("seeds_high") < pl.col("margin"))
    higher = pl.col("conclusion").is_in(list(_HIGHER))
    alike = pl.col("p_equivalence") < 0.05
    holds = (
        pl.when(higher & beyond)
        .then("conclusion")
        .when(alike & within)
        .then(pl.lit("equivalent"))
        .when(higher | alike)
        .then(pl.lit("these runs only"))
        .when(pl.col("conclusion") == CANNOT_TELL)
        .then("conclusion")
        .otherwise(pl.lit("undecided"))
    )
    return averages.with_columns(holds=holds)


def trends(measures: pl.DataFrame, generator: np.random.Generator) -> dict[str, Correlation]:
    """Spearman's rho of the improvement with size, agreement and fidelity, methods averaged within a run.

    Args:
        measures: one row a run (student and seed) and method, every run under every method: `student`, `seed`,
            `method`, `improvement`, `size`, `agreement`, `fidelity`.
        generator: for the bootstrap over runs.

    Returns:
        By name of what it goes with; n is the number of runs.

    """
    # `by_pair` groups by teacher and student; here a pair is a run, which is a student and a seed.
    rows = measures.with_columns(teacher=pl.col("seed").cast(pl.String))
    improvement_G1 = by_pair(rows, "improvement").mean(axis=1, keepdims=True)
    return {
        name: spearman_over_pairs(by_pair(rows, name).mean(axis=1, keepdims=True), improvement_G1, generator)
        for name in ("size", "agreement", "fidelity")
        if not rows[name].has_nulls()  # scores that are no decisions have no agreement
    }


def verdicts(
    claims: Sequence[Mapping[str, Any]],
    averages: pl.DataFrame,
    found: Mapping[str, Correlation],
    families: Mapping[str, int],
) -> pl.DataFrame:
    """A row a claim.

    Args:
        claims: `text`, `family` or `trend`, `expects`.
        averages: from `directions`.
        found: from `trends`.
        families: declared comparisons of each family; a claim is undecided until all of them are scored.

    """
    rows = [
        _of_family(claim, averages.filter(family=claim["family"]), families[claim["family"]])
        if claim["family"]
        else _of_trend(claim, found)
        for claim in claims
    ]
    return pl.DataFrame(rows, schema=VERDICTS)


def _of_family(claim: Mapping[str, Any], members: pl.DataFrame, count: int) -> dict[str, str]:
    expected, holds = claim["expects"], members["holds"].to_list()
    hits = sum(one == expected for one in holds)
    reverse = {"first higher": "second higher", "second higher": "first higher"}.get(expected)
    against = sum(one == reverse for one in holds)
    if len(holds) < count:
        verdict = f"{UNDECIDED}: {len(holds)} of {count} comparisons are scored"
    elif hits == len(holds):
        verdict = SHOWS
    elif against == len(holds):
        verdict = OPPOSITE
    elif hits:
        verdict = f"{PARTLY}, {hits} of {len(holds)}"
    else:
        # One training a side says nothing of what another one would have given.
        kinds = {CANNOT_TELL if row["seeds"] == 1 else row["holds"] for row in members.to_dicts()}
        verdict = CANNOT_TELL if kinds == {CANNOT_TELL} else UNDECIDED if kinds <= {UNDECIDED, CANNOT_TELL} else NOT
    return _row(claim, "; ".join(_found(row) for row in members.to_dicts()) or "–", _FAMILY_TEST, verdict)


_FAMILY_TEST = "paired items, cluster-robust t, Holm in the family; interval over items and runs"
_TREND_TEST = "Spearman over runs, methods averaged; 95 % bootstrap over runs"


def _found(row: Mapping[str, Any]) -> str:
    interval = "" if row["seeds_low"] is None else f" ({_signed(row['seeds_low'])} to {_signed(row['seeds_high'])})"
    return f"{row['comparison']}: {_signed(row['difference'])}{interval}, {row['holds']}"


def _signed(points: float) -> str:
    return f"{points:+.1f}".replace("-", "−")


def _of_trend(claim: Mapping[str, Any], found: Mapping[str, Correlation]) -> dict[str, str]:
    trend = found.get(claim["trend"])
    if trend is None or trend.rho is None or trend.p_value is None:
        return _row(claim, "not scored yet", _TREND_TEST, UNDECIDED)
    if trend.low is None or trend.high is None:
        return _row(claim, f"rho = {trend.rho:+.2f} of {trend.n} runs".replace("-", "−"), _TREND_TEST, CANNOT_TELL)
    certain = trend.p_value <= 0.05  # a bootstrap of five runs in order holds nothing but runs in order
    sign = "positive" if trend.low > 0 and certain else "negative" if trend.high < 0 and certain else "none"
    text = (
        f"rho = {trend.rho:+.2f} ({trend.low:+.2f} to {trend.high:+.2f}), p = {trend.p_value:.2g}, n = {trend.n} runs"
    )
    if sign == claim["expects"]:
        verdict = SHOWS
    elif sign == "none" or claim["expects"] == "none":
        verdict = NOT
    else:
        verdict = OPPOSITE
    return _row(claim, text.replace("-", "−"), _TREND_TEST, verdict)


def _row(claim: Mapping[str, Any], found: str, test: str, verdict: str) -> dict[str, str]:
    return {"claim": claim["text"], "expected": claim["expects"], "found": found, "test": test, "verdict": verdict}
