"""Intervals of few items and one to three training runs cover what they say; run as a script it prints the table.

A world is how likely the second model is right, how much items differ in that, and what the first adds. A training run
moves the first model by a normal deviate, or now and then ruins it. Shapes: S studies, N items, K runs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
import polars as pl
import pytest

from tutelage.evaluator.statistics import paired
from tutelage.evaluator.statistics.mixed_model import mixed_model
from tutelage.evaluator.statistics.planned_comparisons import AVERAGE, Comparison, compare
from tutelage.evaluator.statistics.rank_correlation import spearman_over_pairs

Floats = np.ndarray
WORLDS = {
    "rare gains": (0.05, 0.05, 0.05),
    "no gain": (0.5, 0.3, 0.0),
    "a gain": (0.4, 0.3, 0.25),
    "nearly always a gain": (0.1, 0.1, 0.8),
    "both high": (0.9, 0.1, 0.05),
}
NULLS = {"never right": (0.03, 0.03, 0.0), "half right": (0.5, 0.3, 0.0), "nearly always right": (0.95, 0.05, 0.0)}
RUNS = {"alike": 0.0, "differ by 5 points": 0.05, "differ by 20 points": 0.2}
ITEMS, KINDS_OF_RUNS = (2, 5, 10, 20), (1, 2, 3)
_GRID = 101


@dataclass(frozen=True)
class Coverage:
    """Share of simulated studies whose interval holds the truth, or whose test keeps a true null; the mean width."""

    interval: str
    items: int
    runs: int
    world: str
    share: float
    width: float


def chances(world: str, items: Floats, runs: Floats) -> tuple[Floats, Floats]:
    """Chance that the first and the second model are right, of items between -1 and 1 and the runs' effects."""
    base, spread, gain = (WORLDS | NULLS)[world]
    second = np.clip(base + spread * items, 0, 1)
    return np.clip(second + gain + runs, 0, 1), second


def scores(world: str, runs_SK: Floats, items: int, generator: np.random.Generator) -> tuple[Floats, Floats]:
    """Right or wrong of both models, of shape S × N × K; half of the luck is shared."""
    shape = (len(runs_SK), items, runs_SK.shape[1])
    first, second = chances(world, generator.uniform(-1, 1, (*shape[:2], 1)), runs_SK[:, None, :])
    luck, own = generator.uniform(size=(2, *shape))
    shared = generator.uniform(size=shape) < 0.5
    return (luck < first).astype(float), (np.where(shared, luck, own) < second).astype(float)


def truth(world: str, runs: Floats) -> Floats:
    """Expected difference over items, the last axis being runs to average over."""
    first, second = chances(world, np.linspace(-1, 1, _GRID)[:, None], runs[..., None, :])
    mean: Floats = (first - second).mean(axis=(-2, -1))
    return mean


def differences(count: int, generator: np.random.Generator) -> Iterator[Coverage]:
    """Intervals of a difference: over items with the runs as they are, and over items and runs."""
    for items, runs, world, (spread, deviation) in product(ITEMS, KINDS_OF_RUNS, WORLDS, RUNS.items()):
        runs_SK = generator.normal(0, deviation, (count, runs))
        first, second = scores(world, runs_SK, items, generator)
        of_these, of_all = truth(world, runs_SK), float(truth(world, generator.normal(0, deviation, 20_000)))
        item_labels, run_labels = np.repeat(np.arange(items), runs), np.tile(np.arange(runs), items)
        found: dict[str, list[tuple[bool, float]]] = {}
        for gap, expected in zip((first - second).reshape(count, -1), of_these, strict=True):
            over_items = paired.cluster_robust_interval(gap, item_labels, bound=1.0)
            found.setdefault("difference, items", []).append(_judged(over_items, expected))
            if runs > 1:
                over_both = paired.two_way_interval(gap, item_labels, run_labels, bound=1.0)
                found.setdefault("difference, items and runs", []).append(_judged(over_both, of_all))
        for name, judged in found.items():
            hit, width = np.mean(judged, axis=0)
            yield Coverage(name, items, runs, f"{world}, runs {spread}", float(hit), 100 * float(width))


def _judged(interval: paired.Interval, expected: float) -> tuple[bool, float]:
    return interval.low - 1e-12 <= expected <= interval.high + 1e-12, interval.high - interval.low


def true_nulls(count: int, generator: np.random.Generator) -> Iterator[Coverage]:
    """Tests at the level of 5 % where neither model is better: how often each keeps the null."""
    for items, runs, world in product(ITEMS, KINDS_OF_RUNS, NULLS):
        first, second = scores(world, np.zeros((count, runs)), items, generator)
        item_labels, run_labels = np.repeat(np.arange(items), runs), np.tile(np.arange(runs), items)
        p_values: dict[str, list[float]] = {}
        for one, other in zip(first.reshape(count, -1), second.reshape(count, -1), strict=True):
            over_items = paired.cluster_robust_interval(one - other, item_labels, bound=1.0)
            flipped = paired.sign_flip_test(one - other, item_labels, generator, resamples=199)
            p_values.setdefault("t-test, items", []).append(paired.t_test(over_items).p_value)
            p_values.setdefault("sign flips, items", []).append(flipped.p_value)
            if runs == 1:
                p_values.setdefault("McNemar", []).append(paired.mcnemar_exact(one == 1, other == 1).p_value)
            else:
                over_both = paired.two_way_interval(one - other, item_labels, run_labels, bound=1.0)
                p_values.setdefault("t-test, items and runs", []).append(paired.t_test(over_both).p_value)
        for name, values in p_values.items():
            yield Coverage(name, items, runs, world, float(np.mean(np.array(values) > 0.05)), 0.0)


def averages(count: int, generator: np.random.Generator) -> Iterator[Coverage]:
    """What a study's report shows of two tasks of different size: the average's two intervals, by `compare`."""
    declared = Comparison("gain", "all", {"objective": "kd"}, {"objective": "sft"})
    for (few, many), runs, world in product([(2, 5), (5, 20)], (2, 3), ("a gain", "both high")):
        effects = generator.normal(0, 0.05, (count, runs))
        made = [scores(world, effects, items, generator) for items in (few, many)]
        of_these, of_all = truth(world, effects), float(truth(world, generator.normal(0, 0.05, 20_000)))
        hits: dict[str, list[tuple[bool, float]]] = {"average, items": [], "average, items and runs": []}
        for study in range(count):
            frame = pl.concat(
                _frame(task, name, side[study])
                for task, both in enumerate(made)
                for name, side in zip(("kd", "sft"), both, strict=True)
            )
            row = compare(frame, [declared], generator, resamples=20).filter(task=AVERAGE).row(0, named=True)
            for name, ends, expected in (
                ("average, items", ("low", "high"), of_these[study]),
                ("average, items and runs", ("seeds_low", "seeds_high"), of_all),
            ):
                low, high = (row[end] / 100 for end in ends)
                hits[name].append((low - 1e-12 <= expected <= high + 1e-12, high - low))
        for name, judged in hits.items():
            hit, width = np.mean(judged, axis=0)
            yield Coverage(name, few + many, runs, f"{world}, {few} and {many} items", float(hit), 100 * float(width))


def _frame(task: int, objective: str, right_NK: Floats) -> pl.DataFrame:
    items, runs = right_NK.shape
    return pl.DataFrame(
        {
            "teacher": "t",
            "student": "s",
            "objective": objective,
            "temperature": 1.0,
            "noise": 0.0,
            "seed": np.tile(np.arange(runs), items),
            "task": f"task {task}",
            "item_id": np.repeat(np.arange(items), runs).astype(str),
            "cluster": np.repeat(np.arange(items), runs).astype(str),
            "score": right_NK.ravel(),
        }
    )


def single_scores(count: int, generator: np.random.Generator) -> Iterator[Coverage]:
    """The interval of one evaluation's score, of right and wrong and of graded answers."""
    for items in ITEMS:
        labels = np.arange(items)
        for chance in (0.02, 0.1, 0.3, 0.5, 0.8, 0.95):
            made = (generator.uniform(size=(count, items)) < chance).astype(float)
            yield _of_scores(f"{chance:.0%} right", made, labels, chance)
        for name, (a, b) in {"even": (2, 2), "low": (1, 9), "extreme": (0.3, 0.7)}.items():
            yield _of_scores(f"graded, {name}", generator.beta(a, b, (count, items)), labels, a / (a + b))


def _of_scores(world: str, made_SN: Floats, labels: Floats, expected: float) -> Coverage:
    ends = np.array([paired.score_interval(made, labels) for made in made_SN])
    share = np.mean((ends[:, 0] - 1e-12 <= expected) & (expected <= ends[:, 1] + 1e-12))
    width = 100 * float((ends[:, 1] - ends[:, 0]).mean())
    return Coverage("one score", made_SN.shape[1], 1, world, float(share), width)


def correlations(count: int, generator: np.random.Generator) -> Iterator[Coverage]:
    """Spearman's rho of as many runs; two normal variables, whose rho is 6/pi·asin(r/2) (Pearson 1907)."""
    for runs, r in product((5, 6, 10, 20), (0.0, 0.3, 0.6, 0.9, 0.97)):
        ends = []
        for _ in range(count):
            values = generator.multivariate_normal([0, 0], [[1, r], [r, 1]], runs)
            found = spearman_over_pairs(values[:, :1], values[:, 1:], generator, resamples=200)
            ends.append((found.low, found.high))
        low, high = np.array(ends).T
        expected = 6 / np.pi * np.arcsin(r / 2)
        share = float(np.mean((low <= expected) & (expected <= high)))
        yield Coverage("Spearman's rho", 0, runs, f"r = {r}", share, float((high - low).mean()))


def mixed_models(count: int, generator: np.random.Generator) -> Iterator[Coverage]:
    """What a method adds, in the mixed model over tasks, seeds and students."""
    for tasks, seeds, students in ((2, 2, 1), (3, 1, 2), (2, 3, 2)):
        hits = []
        for _ in range(count):
            levels = [generator.normal(0, spread, size) for spread, size in ((5, tasks), (2, seeds), (4, students))]
            rows = [
                {"task": f"t{a}", "seed": b, "student": f"s{c}", "objective": name}
                | {"score": 40 + levels[0][a] + levels[1][b] + levels[2][c] + gain + generator.normal(0, 2)}
                for a, b, c in product(range(tasks), range(seeds), range(students))
                for name, gain in (("sft", 0.0), ("kd", 3.0))
            ]
            random = [name for name, size in (("task", tasks), ("seed", seeds), ("student", students)) if size > 1]
            effect = mixed_model(pl.DataFrame(rows), "score", "objective", "sft", random).effects[1]
            hits.append((effect.low <= 3 <= effect.high, effect.high - effect.low))
        hit, width = np.mean(hits, axis=0)
        yield Coverage("mixed model", 0, seeds, f"{tasks} tasks, {students} students", float(hit), float(width))


# Studies of each family, since some cost a thousand times what others cost; below 93 % by two standard errors at most.
FAMILIES = {differences: 25, true_nulls: 25, averages: 0, single_scores: 100, correlations: 40, mixed_models: 0}
LONG = {differences: 2000, true_nulls: 1000, averages: 150, single_scores: 4000, correlations: 2000, mixed_models: 1000}


def floor(count: int) -> float:
    """The least share that still fits a coverage of 93 % in as many studies: three standard errors below."""
    return 0.93 - 3 * (0.93 * 0.07 / count) ** 0.5


@pytest.mark.parametrize("family", [family for family, count in FAMILIES.items() if count])
def test_no_interval_of_few_items_and_runs_covers_less_than_93_percent(family) -> None:
    found = list(family(FAMILIES[family], np.random.default_rng(80)))
    assert [one for one in found if one.share < floor(FAMILIES[family])] == []


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", LONG)
def test_no_interval_of_few_items_and_runs_covers_less_than_93_percent_in_thousands(family) -> None:
    found = list(family(LONG[family], np.random.default_rng(81)))
    assert [one for one in found if one.share < floor(LONG[family])] == []


def main(factor: float) -> None:
    """Prints the worst world of every kind of interval and size."""
    print("| interval or test | items | runs | worst world | covers or keeps | mean width |\n|---|---|---|---|---|---|")
    for family, count in LONG.items():
        found = list(family(max(int(factor * count), 20), np.random.default_rng(81)))
        for key in dict.fromkeys((one.interval, one.items, one.runs) for one in found):
            worst = min((one for one in found if (one.interval, one.items, one.runs) == key), key=lambda one: one.share)
            size, width = f"{worst.items or '–'} | {worst.runs}", f"{worst.width:.3g}" if worst.width else "–"
            print(f"| {worst.interval} | {size} | {worst.world} | {worst.share:.1%} | {width} |", flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 1.0)
