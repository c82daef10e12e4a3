"""The audit of the released tables, the report around it, and how it fails."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from tutelage.errors import DataError
from tutelage.evaluator.paper_audit.audit import PaperReport, from_paper, shown_as
from tutelage.evaluator.paper_audit.single_scores import impossible_cells, repeated_cells
from tutelage.evaluator.report.page import Page, Section
from tutelage.evaluator.statistics.scores import SCORES


@pytest.fixture(scope="module")
def report(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[PaperReport, Path]:
    out = tmp_path_factory.mktemp("paper")
    return from_paper(data_dir / "paper_results", out), out


@pytest.mark.data
@pytest.mark.parametrize(
    ("track", "student", "maximum", "at_one"),
    [
        ("math", "Llama-3.2-1B", 7.86, 7.86), ("math", "Qwen2.5-0.5B", 7.38, 6.57),
        ("math", "Qwen2.5-7B", -0.12, -0.12),
        ("commonsense", "Llama-3.2-1B", 9.77, 9.77), ("commonsense", "Qwen2.5-0.5B", 5.40, 2.30),
        ("commonsense", "Qwen2.5-1.5B", 0.99, -9.94), ("commonsense", "Qwen2.5-3B", 0.75, -8.87),
        ("commonsense", "Qwen2.5-7B", 1.24, 1.24),
    ],
)  # fmt: skip
def test_means_by_student(
    report: tuple[PaperReport, Path], track: str, student: str, maximum: float, at_one: float
) -> None:
    rows = report[0].tables["means_by_student"].filter(track=track, student=student)
    means = dict(rows.select("selection", "mean").iter_rows())
    assert round(means["maximum_over_temperatures"], 2) == maximum
    assert round(means["temperature_1"], 2) == at_one


@pytest.mark.data
def test_agreement_tables_exclude_the_methods_they_cannot_be_about(report: tuple[PaperReport, Path]) -> None:
    table = report[0].tables["which_method"]

    def violations(track: str, measure: str, other: str) -> dict[str, int]:
        rows = table.filter(track=track, measure=measure, other=other, temperature=1.0)
        return dict(rows.select("method", "violations").iter_rows())

    assert violations("commonsense", "agreement", "teacher") == {"Rev-KD": 4, "GKD": 23, "Seq-KD": 30}
    assert violations("math", "agreement", "teacher") == {"Rev-KD": 0, "Seq-KD": 0, "GKD": 5}
    assert min(violations("math", "agreement_with_sft_student", "teacher").values()) == 17
    assert violations("commonsense", "agreement_with_sft_student", "own fine-tuning")["Rev-KD"] == 0


@pytest.mark.data
def test_the_similarity_is_a_float32_number_and_bleu_is_not(report: tuple[PaperReport, Path]) -> None:
    shares = dict(report[0].tables["similarity_files"].select("measure", "float32").iter_rows())
    assert shares == {"similarity": 1.0, "bleu": 0.0}
    assert report[0].tables["similarity_files"]["pearson"][0] == pytest.approx(0.929, abs=5e-4)


@pytest.mark.data
def test_reverse_kl_collapses_at_one_and_the_maximum_hides_it(report: tuple[PaperReport, Path]) -> None:
    rows = report[0].tables["collapses"].filter(track="commonsense", temperature=1.0)
    assert set(rows["method"]) == {"Rev-KD"}
    assert sorted(rows["score"].to_list()) == [10.55, 17.45, 21.92, 42.14]
    assert (rows["reported"] > rows["difference"]).all()


@pytest.mark.data
def test_only_runs_at_five_have_impossible_cells(report: tuple[PaperReport, Path]) -> None:
    rows = report[0].tables["impossible_cells"]
    assert set(rows["temperature"]) == {5.0}
    assert set(rows["track"]) == {"math"}
    assert report[0].tables["averages"].is_empty()


@pytest.mark.data
def test_boolq_majority_and_shared_questions(report: tuple[PaperReport, Path]) -> None:
    majority = report[0].tables["boolq_majority"].row(0, named=True)
    assert (round(majority["majority"], 2), majority["cells"], majority["at_or_below"]) == (62.17, 61, 44)
    shared = report[0].tables["shared_questions"]
    assert set(shared.select("task", "also_in").iter_rows()) == {("AddSub", "SingleEq"), ("SingleEq", "AddSub")}


@pytest.mark.data
def test_every_pooled_correlation_equals_the_published_one(report: tuple[PaperReport, Path]) -> None:
    names = {
        "spearman_size": "student_size", "spearman_teacher": "teacher_score", "spearman_sft": "sft_score",
        "spearman_agreement": "agreement", "spearman_similarity": "similarity", "spearman_bleu": "bleu",
    }  # fmt: skip
    published = report[0].tables["published"].filter(pl.col("test").is_in(names.keys()) & (pl.col("method") == "all"))
    ours = report[0].tables["correlations"].filter(selection="maximum_over_temperatures")
    joined = published.with_columns(quantity=pl.col("test").replace(names)).join(ours, on=["track", "task", "quantity"])
    assert joined.height == published.height == 74
    assert (joined["statistic"] - joined["rho_pooled"]).abs().max() < 1e-12
    assert ((joined["low"] <= joined["rho_pooled"]) & (joined["rho_pooled"] <= joined["high"])).all()
    assert set(joined["n_pooled"]) == {33}
    assert set(joined["n_pairs"]) == {11}


@pytest.mark.data
def test_verdicts_name_what_depends_on_the_maximum(report: tuple[PaperReport, Path]) -> None:
    verdicts = dict(report[0].tables["claims"].select("claim", "verdict").iter_rows())
    assert verdicts["Distillation beats fine-tuning (math average)"] == "survives"
    assert verdicts["Distillation beats fine-tuning (commonsense average)"] == "does not survive"
    assert verdicts["Smaller students gain more (math average)"] == "survives"
    assert verdicts["Smaller students gain more (commonsense average)"] == "does not survive"
    assert verdicts["The methods do equally well (math average)"] == "does not survive"
    assert verdicts["The teacher's own score does not matter (math average)"] == "undecided"


@pytest.mark.data
def test_the_report_is_written_and_the_same_every_time(
    report: tuple[PaperReport, Path], data_dir: Path, tmp_path: Path
) -> None:
    first, out = report
    from_paper(data_dir / "paper_results", tmp_path)
    for name in ("report.md", "report.html"):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes()
    markdown = (out / "report.md").read_text(encoding="utf-8")
    assert "-0.6562 (3.38e-05)" in markdown
    assert "-0.5393 (0.0012)" in markdown
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert page.count("<section") == len(first.page.sections)
    for name, table in first.tables.items():
        assert pl.read_csv(out / "tables" / f"{name}.csv").height == table.height


def test_a_folder_without_the_tables_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"math_results_main\.csv"):
        from_paper(tmp_path)


def cells(task: str, *scores: float) -> pl.DataFrame:
    rows = [
        ("math", "big", "small", 1.0, f"method-{index}", 1.0, True, task, score) for index, score in enumerate(scores)
    ]
    return pl.DataFrame(rows, schema=SCORES, orient="row")


def test_a_score_that_is_no_whole_number_of_items_is_found() -> None:
    found = impossible_cells(cells("SVAMP", 66.6, 66.61))
    assert found["method"].to_list() == ["method-1"]
    assert found["examples"].to_list() == ["SVAMP 66.61 of 1000"]


def test_repeats_are_weighed_against_chance() -> None:
    # 1,000 items at one half: two runs meet about 1 / (2 sqrt(pi * 250)) = 1.8 % of the time.
    found = repeated_cells(cells("SVAMP", 50.0, 50.0)).filter(task="SVAMP").row(0, named=True)
    assert (found["compared"], found["repeats"]) == (1, 1)
    assert found["expected"] == pytest.approx(0.01784, abs=1e-5)
    assert found["p_value"] == pytest.approx(0.01768, abs=1e-5)


def test_rendering_escapes_what_the_tables_hold() -> None:
    table = shown_as("s", pl.DataFrame({"text": ["<img|x>"], "p_value": [0.00001234], "n": [None]}))
    shown = Page("Audit", "<t>", [Section("<b>", "a & b", tables=[table])], contents=True)
    page, markdown = shown.html(), shown.markdown()
    assert "<img" not in page
    assert "&lt;img|x&gt;" in page
    assert "<b>" not in page
    assert "| <img\\|x> | 1.23e-05 | – |" in markdown
