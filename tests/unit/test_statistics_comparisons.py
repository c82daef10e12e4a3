"""Planned comparisons from one row an item, and what it refuses."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from scipy import stats

from tutelage.errors import DataError
from tutelage.evaluator.paper_audit.published_tests import published_tests
from tutelage.evaluator.statistics.planned_comparisons import (
    ITEMS,
    Comparison,
    cells_of_items,
    compare,
    compare_methods,
    method_model,
    pair_items,
)
from tutelage.evaluator.statistics.scores import AVERAGE, SCORES, SIMILARITIES, improvements
from tutelage.evaluator.statistics.verdicts import directions, trends, verdicts

CHANCE = {"sft": 0.50, "gkd": 0.65, "reverse_kl": 0.66, "seq_kd": 0.50}


def study(seeds: int = 2, items: int = 150, chance: dict[str, float] = CHANCE) -> pl.DataFrame:
    """Right and wrong answers of two students under each objective, with difficulty shared by all."""
    generator = np.random.default_rng(1)
    rows = []
    for task, shift in (("easy", 0.15), ("hard", -0.15)):
        for item in range(items):
            luck = generator.uniform(-0.3, 0.3)
            for student in ("small", "large"):
                for objective, p in chance.items():
                    for seed in range(seeds):
                        teacher = None if objective == "sft" else "big"
                        right = generator.uniform() < np.clip(p + shift + luck, 0, 1)
                        temperature = None if teacher is None else 1.0
                        labels = (teacher, student, objective, temperature, 0.0, seed, task, f"{task}-{item}")
                        rows.append((*labels, f"{task}-{item}", float(right)))
    return pl.DataFrame(rows, schema=ITEMS, orient="row")


def comparison(objective: str, **more: object) -> Comparison:
    first = {"objective": objective, "student": "small", "temperature": 1.0}
    return Comparison(f"{objective} against sft", "primary", first, {"objective": "sft", "student": "small"}, **more)


@pytest.fixture(scope="module")
def compared() -> pl.DataFrame:
    declared = [comparison("gkd"), comparison("seq_kd", margin=25.0)]
    return compare(study(), declared, np.random.default_rng(2), resamples=500)


def row(frame: pl.DataFrame, **chosen: str) -> dict[str, float]:
    return frame.filter(**chosen).row(0, named=True)


def test_the_average_is_the_unweighted_mean_of_the_tasks(compared: pl.DataFrame) -> None:
    tasks = compared.filter((pl.col("comparison") == "gkd against sft") & (pl.col("task") != AVERAGE))
    average = row(compared, comparison="gkd against sft", task=AVERAGE)
    assert average["difference"] == pytest.approx(tasks["difference"].mean())
    assert average["standard_error"] == pytest.approx(np.sqrt((tasks["standard_error"] ** 2).sum()) / 2)
    assert average["first"] - average["second"] == pytest.approx(average["difference"])


def test_conclusions_follow_what_was_put_in(compared: pl.DataFrame) -> None:
    assert row(compared, comparison="gkd against sft", task=AVERAGE)["conclusion"] == "first higher"
    same = row(compared, comparison="seq_kd against sft", task=AVERAGE)
    assert same["conclusion"] == "equivalent within the margin"
    assert abs(same["difference"]) < same["margin"]


def test_seeds_widen_the_interval_of_the_method_and_items_are_counted_once(compared: pl.DataFrame) -> None:
    easy = row(compared, comparison="gkd against sft", task="easy")
    assert (easy["items"], easy["clusters"], easy["seeds"]) == (150, 150, 2)
    assert easy["seeds_high"] - easy["seeds_low"] > easy["high"] - easy["low"]
    assert easy["p_mcnemar"] is None  # two seeds of an item are no independent items


def test_holm_adjusts_averages_and_tasks_apart(compared: pl.DataFrame) -> None:
    averages = compared.filter(task=AVERAGE)
    smallest = averages.sort("p_value").row(0, named=True)
    assert smallest["p_holm"] == pytest.approx(min(2 * smallest["p_value"], 1))
    tasks = compared.filter(pl.col("task") != AVERAGE).sort("p_value")
    assert tasks["p_holm"][0] == pytest.approx(min(4 * tasks["p_value"][0], 1))


def test_one_seed_gives_mcnemar_and_the_paired_t_test() -> None:
    items = study(seeds=1)
    frame = compare(items, [comparison("gkd")], np.random.default_rng(3), resamples=200)
    pairs = pair_items(items, comparison("gkd")).filter(task="hard")
    hard = row(frame, task="hard")
    discordant = pairs.filter(pl.col("first") != pl.col("second"))
    expected = stats.binomtest(int(discordant["first"].sum()), discordant.height).pvalue
    assert hard["p_mcnemar"] == pytest.approx(expected)
    assert hard["p_value"] == pytest.approx(stats.ttest_rel(pairs["first"], pairs["second"]).pvalue)
    assert hard["seeds_low"] is None


def test_a_side_that_matches_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="no row has"):
        compare(study(seeds=1, items=3), [comparison("nothing")], np.random.default_rng(0))


def test_sides_with_different_items_are_refused() -> None:
    items = study(seeds=1, items=5)
    lacking = items.filter(~((pl.col("objective") == "sft") & (pl.col("item_id") == "hard-3")))
    with pytest.raises(DataError, match="hard-3"):
        compare(lacking, [comparison("gkd")], np.random.default_rng(0))


def test_two_runs_in_one_side_are_refused() -> None:
    items = study(seeds=1, items=5)
    vague = Comparison("vague", "primary", {"objective": "gkd"}, {"objective": "sft"})
    with pytest.raises(DataError, match="more than once"):
        compare(items, [vague], np.random.default_rng(0))


def few(*scores: tuple[float | None, float | None]) -> pl.DataFrame:
    """Items of one task with these scores of gkd and of sft."""
    sides = (("gkd", "big", 1.0), ("sft", None, None))
    rows = [
        (teacher, "small", objective, temperature, 0.0, 0, "t", f"t-{item}", f"t-{item}", both[side])
        for item, both in enumerate(scores)
        for side, (objective, teacher, temperature) in enumerate(sides)
    ]
    return pl.DataFrame(rows, schema=ITEMS, orient="row")


@pytest.mark.parametrize(
    "scores",
    [[(1.0, 0.0)], [(1.0, 0.0)] * 2, [(1.0, 1.0)], [(1.0, 1.0)] * 2, [(1.0, 1.0)] * 20, [(0.3, 0.3)] * 20],
    ids=["one gains", "two gain", "one ties", "two tie", "twenty tie", "twenty texts tie"],
)
def test_items_that_do_not_differ_among_themselves_cannot_tell(scores: list[tuple[float, float]]) -> None:
    frame = compare(few(*scores), [comparison("gkd", margin=2.0)], np.random.default_rng(0))
    assert frame["conclusion"].to_list() == ["cannot tell", "cannot tell"]
    assert frame["p_value"].min() > 0.05
    assert frame["p_equivalence"].min() > 0.05
    assert (frame["low"] < frame["difference"]).all() or frame["difference"][0] == 100
    assert frame["detectable"].min() > 10


def test_a_task_in_which_all_items_tie_does_not_silence_the_average_of_those_that_tell() -> None:
    items = study(seeds=1)
    tied = items.filter(task="easy").with_columns(task=pl.lit("tied"), item_id="tied-" + pl.col("item_id"), score=1.0)
    declared = [comparison("gkd"), comparison("seq_kd")]
    frame = compare(pl.concat([items, tied]), declared, np.random.default_rng(0), resamples=100)
    said = {task: frame.filter(task=task)["conclusion"].to_list() for task in ("tied", AVERAGE)}
    assert said == {"tied": ["cannot tell"] * 2, AVERAGE: ["first higher", "undecided"]}


@pytest.mark.parametrize("scores", [[(1.0, 0.0)] * 2, [(1.0, 0.0), (0.5, 0.0)], [(1.0, 0.0)] * 4 + [(0.0, 1.0)]])
@pytest.mark.parametrize("tasks", [1, 2])
def test_no_interval_lies_further_out_than_a_difference_can(scores: list[tuple[float, float]], tasks: int) -> None:
    one = few(*scores)
    names = [
        (pl.lit(f"t{number}"), pl.col("item_id") + f"-{number}", pl.col("cluster") + f"-{number}")
        for number in range(tasks)
    ]
    items = pl.concat([one.with_columns(task=task, item_id=item, cluster=cluster) for task, item, cluster in names])
    frame = compare(items, [comparison("gkd")], np.random.default_rng(0), resamples=100)
    assert frame["low"].min() >= -100
    assert frame["high"].max() <= 100


def test_items_of_one_cluster_cannot_tell() -> None:
    items = few(*[(1.0, 0.0)] * 3, (0.0, 0.0)).with_columns(cluster=pl.lit("one text"))
    frame = compare(items, [comparison("gkd", margin=2.0)], np.random.default_rng(0))
    assert frame["conclusion"].to_list() == ["cannot tell", "cannot tell"]
    assert frame["standard_error"].to_list() == [None, None]
    assert (frame["low"] < 0).all()


def test_many_items_that_all_gain_do_tell() -> None:
    frame = compare(few(*[(1.0, 0.0)] * 20), [comparison("gkd")], np.random.default_rng(0))
    assert frame["conclusion"].to_list() == ["first higher", "first higher"]
    assert (frame["low"] > 0).all()


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_items_without_a_score_are_refused_by_name(missing: float | None) -> None:
    with pytest.raises(DataError, match="1 rows of first have no score, for example task 't', item 't-1'"):
        compare(few((1.0, 0.0), (missing, 0.0), (0.0, 1.0)), [comparison("gkd")], np.random.default_rng(0))


def test_scores_that_are_no_decisions_have_no_mcnemar_test() -> None:
    frame = compare(few((0.31, 0.2), (0.5, 0.4), (0.1, 0.2)), [comparison("gkd")], np.random.default_rng(0))
    assert frame["p_mcnemar"].to_list() == [None, None]
    assert frame["p_value"].is_not_null().all()


def test_one_method_or_one_cell_a_method_cannot_tell() -> None:
    cells = cells_of_items(study(seeds=1, items=5))
    alone = cells.filter(objective="gkd")
    assert compare_methods(alone).is_empty()
    assert compare_methods(alone).columns == compare_methods(cells).columns
    one_each = cells.filter(task="easy", student="small")
    assert method_model(one_each, "sft") is None
    table = compare_methods(one_each)
    assert table["p_value"].null_count() == table.height > 0
    same = cells.with_columns(score=pl.lit(50.0))
    assert compare_methods(same)["p_value"].null_count() == compare_methods(same).height > 0


@pytest.mark.parametrize(("runs", "verdict"), [(3, "cannot tell"), (6, "does not show"), (7, "shows")])
def test_a_trend_of_few_runs_in_order_does_not_show(runs: int, verdict: str) -> None:
    rows = pl.DataFrame({"student": [f"s{n}" for n in range(runs)], "improvement": [float(-n) for n in range(runs)]})
    measures = rows.with_columns(seed=pl.lit(0), method=pl.lit("kd"), size=-pl.col("improvement"))
    measures = measures.with_columns(agreement=pl.col("size"), fidelity=pl.col("size"))
    claim = {"text": "smaller gain more", "family": None, "trend": "size", "expects": "negative"}
    found = trends(measures, np.random.default_rng(0))
    averages = pl.DataFrame(schema={"family": pl.String, "holds": pl.String})
    assert verdicts([claim], averages, found, {})["verdict"].to_list() == [verdict]


def test_a_family_without_spread_cannot_tell() -> None:
    declared = comparison("gkd", margin=2.0)
    averages = directions(compare(few(*[(1.0, 1.0)] * 20), [declared], np.random.default_rng(0)))
    claim = {"text": "alike", "family": "primary", "trend": None, "expects": "equivalent"}
    assert verdicts([claim], averages, {}, {"primary": 1})["verdict"].to_list() == ["cannot tell"]


@pytest.mark.parametrize("expects", ["first higher", "second higher", "equivalent"])
@pytest.mark.parametrize("chosen", [{"objective": "gkd"}, {"objective": "seq_kd", "margin": 25.0}])
def test_one_training_a_side_tells_nothing_of_a_method(chosen, expects) -> None:
    averages = directions(compare(study(seeds=1), [comparison(**chosen)], np.random.default_rng(0), resamples=200))
    assert averages["holds"].to_list() == ["these runs only"]
    claim = {"text": "", "family": "primary", "trend": None, "expects": expects}
    assert verdicts([claim], averages, {}, {"primary": 1})["verdict"].to_list() == ["cannot tell"]


def test_equivalence_needs_the_interval_over_runs_within_the_margin() -> None:
    frame = compare(study(seeds=4), [comparison("seq_kd", margin=25.0)], np.random.default_rng(0), resamples=200)
    assert directions(frame)["holds"].to_list() == ["equivalent"]
    wider = frame.with_columns(seeds_high=pl.lit(26.0))
    assert directions(wider)["holds"].to_list() == ["these runs only"]


def test_a_cell_without_a_score_is_refused_by_the_tests_over_methods() -> None:
    cells = cells_of_items(study(seeds=1, items=5)).with_columns(
        score=pl.when(pl.col("task") == "hard").then(float("nan")).otherwise("score")
    )
    with pytest.raises(DataError, match=r"8 of 16 cells have no score"):
        compare_methods(cells)


def test_methods_are_told_apart_where_they_differ() -> None:
    cells = cells_of_items(study(seeds=4)).filter(pl.col("objective") != "sft")
    table = compare_methods(cells)
    overall = table.filter(task=AVERAGE, test="friedman")
    assert overall["p_value"][0] < 0.01
    assert overall["blocks"][0] == 16  # two students, four seeds, two tasks
    pairwise = {(first, second): p for first, second, p in overall.select("first", "second", "p_pairwise").rows()}
    assert pairwise["gkd", "seq_kd"] < 0.05 < pairwise["gkd", "reverse_kl"]


def test_the_mixed_model_reports_each_objective_against_sft() -> None:
    cells = cells_of_items(study(seeds=4)).with_columns(teacher=pl.lit("big"))
    model = method_model(cells, "sft")
    effects = {effect.name: effect for effect in model.effects}
    assert set(effects) == {"Intercept", "gkd", "reverse_kl", "seq_kd"}
    assert effects["gkd"].low < 15 < effects["gkd"].high
    assert effects["seq_kd"].low < 0 < effects["seq_kd"].high
    assert model.observations == cells.height
    assert set(model.variances) == {"task", "seed", "student"}


def test_a_student_that_is_bad_under_every_objective_says_nothing_about_objectives() -> None:
    items = study()
    weak = pl.col("student") == "small"
    weaker = items.with_columns(
        score=pl.when(weak).then(pl.col("score") * (pl.col("item_id").hash() % 3 == 0)).otherwise("score")
    )
    plain, shifted = (method_model(cells_of_items(one), "sft") for one in (items, weaker))
    errors = [{effect.name: effect.standard_error for effect in model.effects}["seq_kd"] for model in (plain, shifted)]
    assert shifted.variances["student"] > 20 * plain.residual_variance
    assert errors[1] < 3 * errors[0]


def scores_of(items: pl.DataFrame, sizes: dict[str, float]) -> pl.DataFrame:
    """`SCORES` from items: the mean over items and seeds, and the mean of the tasks."""
    keys = ["teacher", "student", "objective", "temperature"]
    by_task = items.group_by(*keys, "task", maintain_order=True).agg(score=100 * pl.col("score").mean())
    average = by_task.group_by(keys, maintain_order=True).agg(task=pl.lit(AVERAGE), score=pl.col("score").mean())
    rows = pl.concat([by_task, average.select(by_task.columns)]).rename({"objective": "method"})
    return rows.with_columns(
        track=pl.lit("ours"),
        student_size=pl.col("student").replace_strict(sizes, return_dtype=pl.Float64),
        teacher_tuned=pl.when(pl.col("teacher").is_not_null()).then(True),
    ).match_to_schema(SCORES)


def test_published_tests_run_on_our_own_frames() -> None:
    teachers = study(seeds=1, chance={"sft": 0.8}).filter(student="large").with_columns(student=pl.lit("big"))
    items = pl.concat([study(seeds=1), teachers])
    scores = scores_of(items, {"small": 1.0, "large": 2.0, "big": 8.0})
    gains = improvements(scores, "maximum_over_temperatures")
    tests = published_tests(gains, pl.DataFrame(schema=SIMILARITIES))
    t_test = row(tests, task=AVERAGE, method="all", test="t_test")
    values = gains.filter(task=AVERAGE)["improvement"].to_numpy()
    assert t_test["n"] == len(values) == 6
    assert t_test["statistic"] == pytest.approx(values.mean() / (values.std(ddof=1) / 6**0.5))
    assert set(tests["test"]) == {"t_test", "anova", "kruskal", "spearman_size", "spearman_teacher", "spearman_sft"}
    # One teacher: improvement cannot be correlated with its score.
    assert row(tests, task=AVERAGE, method="all", test="spearman_teacher")["statistic"] is None


def test_a_student_without_fine_tuning_is_refused_by_name() -> None:
    scores = scores_of(study(seeds=1, items=5), {"small": 1.0, "large": 2.0})
    with pytest.raises(DataError, match="teacher 'big' has no 'sft' score"):
        improvements(scores, "temperature_1")


def test_an_average_of_two_runs_ends_where_differences_end() -> None:
    uneven = study(seeds=2, items=20).filter((pl.col("task") == "hard") | pl.col("item_id").is_in(["easy-0", "easy-1"]))
    averages = compare(uneven, [comparison("gkd")], np.random.default_rng(0)).filter(task=AVERAGE)
    assert averages["seeds_low"].item() >= -100
    assert averages["seeds_high"].item() <= 100
