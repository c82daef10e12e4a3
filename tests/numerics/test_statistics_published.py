"""Every number that the authors printed comes out of their released tables again, to the last printed digit."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import polars as pl
import pytest

from tutelage.evaluator.paper_audit.published_tests import published_tests
from tutelage.evaluator.paper_audit.released_tables import read_scores, read_similarities
from tutelage.evaluator.statistics.scores import improvements

# `notebook`: the outputs printed in the authors' two notebooks, at full float64 precision;
# `table`: the summary with four decimals, which adds Kruskal-Wallis and the real BLEU.
EXPECTED = pl.read_csv(
    Path(__file__).parent / "statistics_published.csv", schema_overrides={"statistic": pl.String, "p_value": pl.String}
)
# The poster's Table 3: Spearman correlation of improvement and student size.
POSTER = {
    ("math", "Average"): -0.66, ("math", "gsm8k"): -0.51, ("math", "SVAMP"): -0.43, ("math", "MultiArith"): -0.83,
    ("math", "SingleEq"): -0.59, ("math", "AddSub"): -0.64, ("math", "AQuA"): -0.23,
    ("commonsense", "Average"): -0.54, ("commonsense", "hellaswag"): -0.40, ("commonsense", "boolq"): -0.15,
    ("commonsense", "social_i_qa"): -0.49, ("commonsense", "piqa"): -0.67, ("commonsense", "ARC-Easy"): -0.78,
    ("commonsense", "ARC-Challenge"): -0.63, ("commonsense", "winogrande"): -0.34, ("commonsense", "openbookqa"): -0.55,
}  # fmt: skip


@pytest.fixture(scope="module")
def tests(data_dir: Path) -> pl.DataFrame:
    folder = data_dir / "paper_results"
    chosen = improvements(read_scores(folder), "maximum_over_temperatures")
    return published_tests(chosen, read_similarities(folder))


def same_printed_digits(value: float, printed: str) -> bool:
    """Equal after rounding to the printed places, up to 14 significant digits (float64 sums differ in the last two)."""
    number = Decimal(printed)
    exponent = number.as_tuple().exponent
    unit = Decimal(1).scaleb(exponent)
    rounding = abs(Decimal(value) - number) <= unit / 2
    return rounding or abs(value - float(printed)) <= 2e-13 * abs(float(printed))


@pytest.mark.parametrize(("value", "printed", "same"), [(8.86504, "8.8650", True), (8.8651, "8.8650", False)])
def test_the_comparison_of_digits_can_fail(value: float, printed: str, same: bool) -> None:
    assert same_printed_digits(value, printed) is same


@pytest.mark.data
@pytest.mark.parametrize("source", ["notebook", "table"])
def test_every_printed_digit(tests: pl.DataFrame, source: str) -> None:
    expected = EXPECTED.filter(pl.col("source") == source)
    keys = ["track", "test", "method", "task"]
    joined = expected.join(tests, on=keys, how="left", suffix="_ours")
    wrong = [
        row
        for row in joined.iter_rows(named=True)
        if row["statistic_ours"] is None
        or not same_printed_digits(row["statistic_ours"], row["statistic"])
        or not same_printed_digits(row["p_value_ours"], row["p_value"])
    ]
    assert joined.height == expected.height > 100
    assert wrong == []


@pytest.mark.data
def test_the_posters_correlations_with_size(tests: pl.DataFrame) -> None:
    rows = tests.filter((pl.col("test") == "spearman_size") & (pl.col("method") == "all"))
    ours = {(track, task): round(value, 2) for track, task, value in rows.select("track", "task", "statistic").rows()}
    assert ours == POSTER


@pytest.mark.data
def test_every_test_is_over_eleven_pairs_and_three_methods(tests: pl.DataFrame) -> None:
    assert set(tests.filter(pl.col("method") == "all")["n"]) == {33}
    assert set(tests.filter(pl.col("method") != "all")["n"]) == {11}
