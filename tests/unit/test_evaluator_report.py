"""The report from made-up rows: its parts, its numbers, its escaping, the files beside it."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tutelage.errors import DataError
from tutelage.evaluator.report import write_report, write_study_report
from tutelage.evaluator.report.chart_style import PALETTE, told_apart
from tutelage.evaluator.report.run_comparisons import changes, likeness
from tutelage.evaluator.report.run_data import read_run
from tutelage.evaluator.report.run_report import facts, tiles
from tutelage.evaluator.results import frames as fr
from tutelage.evaluator.scoring.extraction import paper_number
from tutelage.evaluator.tasks import TASKS
from tutelage.evaluator.tasks.arithmetic_generator import generate

HOSTILE = '<script>alert(1)</script><img src=x onerror="alert(2)"> & </pre>'
ITEMS = 20


def write_rows(
    frames: Path, student: str, *, right: Callable[[int], bool], protocol: str = "paper", **labels: Any
) -> None:
    """Rows of one evaluation of the generated task, right where told."""
    rows = []
    for index, record in enumerate(generate("test", ITEMS, 0)):
        is_right = right(index)
        rows.append(
            {
                **dict.fromkeys(fr.SCHEMA),
                **{"run": "r1", "student": student, "teacher": "", "objective": "", "temperature": 0.0, "noise": 0.0},
                **{"step": 0, "training_seed": 3, "checkpoint": "c", "checkpoint_digest": "d"},
                **labels,
                "evaluation_id": f"{student}-{labels.get('step', 0)}",
                **{"task": "arithmetic", "task_version": 1, "protocol": "paper", "template": "chat"},
                **{"engine": "transformers", "dtype": "bfloat16", "sampling_temperature": 0.0, "seed": 0},
                **{"item_id": str(index), "item_hash": f"h{index}", "prompt_hash": "p"},
                "output": record["output"] if is_right else HOSTILE,
                "extracted": record["answer"] if is_right else "",
                "extracted_corrected": record["answer"] if is_right else "",
                "target": record["answer"],
                "metric": "accuracy",
                "score": float(is_right),
                "score_corrected": float(is_right),
                **{"prompt_tokens": 20, "output_tokens": 10, "finish_reason": "stop", "seconds": 0.5, "error": ""},
            }
        )
    path = fr.frame_path(frames, "r1", "arithmetic", rows[0]["evaluation_id"], "paper")
    fr.write_frame(fr.frame_of_rows(rows), path)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that is right in 15 of 20, a student that goes from 2 to 12, metrics and counters."""
    folder = tmp_path_factory.mktemp("run")
    write_rows(folder / "frames", "big", right=lambda index: index < 15)
    trained = {"teacher": "big", "objective": "gkd", "temperature": 1.0}
    write_rows(folder / "frames", "gkd <b>", right=lambda index: index in (0, 19), **trained)
    write_rows(folder / "frames", "gkd <b>", right=lambda index: 4 <= index < 16, **trained, step=60)
    student = folder / "students" / "gkd <b>"
    student.mkdir(parents=True)
    generator = random.Random(0)
    with (student / "metrics.jsonl").open("w") as stream:
        for step in range(61):
            row: dict[str, float] = {"step": step, "train/loss": generator.random(), "seconds/scoring": 0.5}
            if step % 20 == 0:
                row |= {"heldout/forward_kl": 2.0 - step / 60, "heldout/top1_agreement": 0.2 + step / 600}
            stream.write(json.dumps(row) + "\n")
        stream.write('{"step": 61, "train/lo')  # the trainer is writing
    counts = {"rows": 40, "dropped_prompts": 20, "truncated_completions": 3, "tokens_cut": 120}
    (student / "data.json").write_text(json.dumps(counts))
    usage = {"instanceId": "abc", "startedAtSeconds": 1.8e9, "students": [{"studentId": "gkd <b>", "sequences": "480"}]}
    usage |= {"countedByAnotherVersion": "1"}
    (folder / "teacher_usage.json").write_text(json.dumps(usage))
    return folder


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return write_report(frames=run / "frames", run_dir=run, run=None, out=run / "out" / "report.html").read_text()


class Tags(HTMLParser):
    """Every tag, attribute and heading of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def test_it_has_its_parts(page: str) -> None:
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == [
        "Learning",
        "Scores",
        "Before and after",
        "Agreement and fidelity",
        "In their own words",
        "Throughput",
    ]
    for words in (
        "McNemar",
        "95 % interval",
        "n = 20",
        "training seeds",
        "sacreBLEU",
        "nrefs:1",
        "1 students attached",
        "2027-01-15",
        "greedy",
        "chance",
    ):
        assert words in page, words


def test_training_seeds_are_those_of_the_trained(tmp_path: Path) -> None:
    write_rows(tmp_path, "big", right=lambda index: index < 15, training_seed=0)
    assert dict(facts(read_run(tmp_path, None, None)))["training seeds"] == "none"
    write_rows(tmp_path, "gkd", right=lambda index: index < 9, objective="gkd", training_seed=1)
    assert dict(facts(read_run(tmp_path, None, None)))["training seeds"] == "1"


def test_what_the_length_of_the_data_cost_is_said(run: Path, page: str, tmp_path: Path) -> None:
    cost = "40 rows, 20 of them left out, as their prompt alone is too long, 3 completions cut, by 120 tokens together"
    assert cost in page
    shutil.copytree(run / "students", tmp_path / "students")
    (tmp_path / "students/other").mkdir()
    (tmp_path / "students/other/data.json").write_text(json.dumps({"rows": 9, "dropped_prompts": 0} | NOTHING_CUT))
    assert dict(facts(read_run(run / "frames", tmp_path, None)))["training data"] == f"gkd <b>: {cost}; other: 9 rows"
    (tmp_path / "students/other/data.json").write_text("{")
    with pytest.raises(DataError, match=r"other/data\.json is not JSON"):
        read_run(run / "frames", tmp_path, None)


def test_the_headline_of_one_task_is_before_after_and_teacher_with_intervals(run: Path) -> None:
    [tile] = tiles(read_run(run / "frames", run, None))
    assert (tile.student, tile.value) == ("gkd <b>, arithmetic, 20 items", "10.0 → 60.0 %")
    # Clopper and Pearson's intervals of 2, 12 and 15 of 20; 12 items gained and 2 lost: 2 · (1 + 14 + 91) / 2¹⁴.
    assert tile.text.startswith(
        "before 10.0 % (1.2 to 31.7); after 60.0 % (36.1 to 80.9); teacher 75.0 % (50.9 to 91.3); +50.0 points ("
    )
    assert tile.text.endswith("), McNemar, p = 0.013; same answer as the teacher 5.0 → 55.0 %")


def test_the_headline_of_several_tasks_is_the_distance_to_the_teacher(run: Path) -> None:
    data = read_run(run / "frames", run, None)
    other = data.rows.with_columns(task=pl.lit("other"))
    [tile] = tiles(replace(data, rows=pl.concat([data.rows, other])))
    assert (tile.student, tile.text[:11]) == ("gkd <b>", "held-out KL")


NOTHING_CUT = {"truncated_completions": 0, "tokens_cut": 0}


def test_what_models_write_is_text(page: str) -> None:
    tags = Tags(page)
    assert HOSTILE in tags.text
    assert not {"script", "img", "iframe", "object", "link", "base", "form"} & set(tags.tags)
    assert not [name for name, _ in tags.attributes if name.startswith("on")]
    assert "gkd <b>" in tags.text
    assert page.count("<b>") == page.count('<div class="tile">')


def test_it_needs_nothing_else_and_allows_nothing_else(page: str) -> None:
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert policy.group(1).startswith("default-src 'none'")
    loading = {"src", "href", "xlink:href", "action", "srcset", "data"}
    assert not [name for name, _ in Tags(page).attributes if name in loading]
    assert "@import" not in page


def test_ids_of_inline_figures_do_not_clash(page: str) -> None:
    ids = [value for name, value in Tags(page).attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]*)\)", page)) <= set(ids)


def test_figures_and_tables_lie_beside_it(run: Path, page: str) -> None:
    for name in ("heldout_forward_kl", "train_loss", "changes", "agreement", "scores_arithmetic_paper", "phases"):
        assert (run / "out" / "figures" / f"{name}.svg").read_text().startswith("<svg")
        assert (run / "out" / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    scores = pl.read_csv(run / "out" / "tables" / "scores.csv")
    assert scores["score"].to_list() == [0.75, 0.1, 0.6]
    assert scores["n"].to_list() == [20, 20, 20]
    assert all(colour in page for colour in PALETTE[:1])


@pytest.mark.parametrize("by", ["shape", "strokeDash"])
def test_more_names_than_colours_are_told_apart(by: str) -> None:
    few, many = ([f"method-{number}" for number in range(count)] for count in (6, 24))
    assert list(told_apart("method", few, by)) == ["color"]
    ranges = [map(str, channel["scale"]["range"]) for channel in told_apart("method", many, by).values()]
    assert len(set(zip(*ranges, strict=True))) == 24


def test_a_score_of_nothing_or_everything_is_not_certain(tmp_path: Path) -> None:
    write_rows(tmp_path, "none", right=lambda _: False)
    write_rows(tmp_path, "all", right=lambda _: True)
    summary = read_run(tmp_path, None, "r1").summary
    found = {row["student"]: (row["low"], row["high"]) for row in summary.to_dicts()}
    # 1 - 0.025^(1/20): no success in twenty (Clopper & Pearson).
    assert found["none"] == pytest.approx((0.0, 0.1684), abs=1e-4)
    assert found["all"] == pytest.approx((0.8316, 1.0), abs=1e-4)


def test_before_and_after_are_paired(run: Path) -> None:
    row = changes(read_run(run / "frames", run, None)).to_dicts()[0]
    assert (row["before"], row["after"], row["items"]) == (0.1, 0.6, 20)
    assert row["change"] == pytest.approx(0.5)
    assert (row["gained"], row["lost"]) == (12, 2)
    assert row["p_value"] == pytest.approx(2 * sum((1, 14, 91)) / 2**14)  # the binomial tail by hand
    assert 0 < row["low"] < 0.5 < row["high"] < 1


def test_agreement_is_with_its_own_teacher(run: Path) -> None:
    rows = likeness(read_run(run / "frames", run, None)).sort("step").to_dicts()
    assert [row["agreement"] for row in rows] == [1 / 20, 11 / 20]
    assert [row["student_unparsable"] for row in rows] == [0.9, 0.4]
    assert rows[1]["bleu"] > rows[0]["bleu"]


def test_kinds_of_errors_are_shown_before_and_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = [f"Ann has {30 + n} pears and {n} apples. How many more pears than apples?" for n in (2, 3, 4, 5)]
    records = [{"instruction": question, "input": "", "output": "", "answer": "30.0"} for question in questions]
    (tmp_path / "tasks" / "SVAMP").mkdir(parents=True)
    (tmp_path / "tasks" / "SVAMP" / "test.json").write_text(json.dumps(records))
    monkeypatch.setenv("TUTELAGE_DATA_DIR", str(tmp_path))
    items = TASKS["SVAMP"].items(tmp_path)
    said = {0: ["", "36", "38", "40"], 9: ["30", "30", "36 - 4 = 30", "40"]}  # wrong operation: the sum
    for step, outputs in said.items():
        rows = [
            {
                **dict.fromkeys(fr.SCHEMA),
                **{"run": "r1", "student": "s", "teacher": "big", "objective": "gkd", "temperature": 1.0, "noise": 0.0},
                **{
                    "step": step,
                    "training_seed": 0,
                    "evaluation_id": f"s-{step}",
                    "task": "SVAMP",
                    "protocol": "paper",
                },
                **{"template": "chat", "item_id": item.item_id, "item_hash": item.item_hash, "error": "", "seed": 0},
                **{"output": output, "extracted": paper_number(output), "extracted_corrected": paper_number(output)},
                **{"target": "30", "score": float(paper_number(output) == "30"), "metric": "accuracy"},
                **{"output_tokens": 3, "seconds": 0.1, "finish_reason": "stop"},
            }
            for item, output in zip(items, outputs, strict=True)
        ]
        path = fr.frame_path(tmp_path / "frames", "r1", "SVAMP", f"s-{step}", "paper")
        fr.write_frame(fr.frame_of_rows(rows), path)
    out = write_report(frames=tmp_path / "frames", run_dir=None, run=None, out=tmp_path / "out" / "report.html")
    assert "<h2>Kinds of errors</h2>" in out.read_text()
    counted = pl.read_csv(out.parent / "tables" / "error_kinds.csv")
    found = {(row["evaluation_id"], row["kind"]): row["items"] for row in counted.to_dicts()}
    assert found == {
        ("s-0", "no_answer"): 1,
        ("s-0", "wrong_operation"): 3,
        ("s-9", "right"): 3,
        ("s-9", "wrong_operation"): 1,
    }
    monkeypatch.delenv("TUTELAGE_DATA_DIR")
    write_report(frames=tmp_path / "frames", run_dir=None, run=None, out=out)
    assert "The questions of SVAMP are not here" in out.read_text()


def test_open_questions_are_compared_by_their_scores(tmp_path: Path) -> None:
    levels = {("big", 0): 0.6, ("s", 0): 0.2, ("s", 9): 0.4}
    generator = random.Random(0)
    for (student, step), level in levels.items():
        rows = [
            {
                **dict.fromkeys(fr.SCHEMA),
                **{"run": "r1", "student": student, "teacher": "" if student == "big" else "big"},
                **{"objective": "" if student == "big" else "gkd"},
                **{"temperature": 1.0, "noise": 0.0, "step": step, "training_seed": 0, "template": "alpaca"},
                **{"evaluation_id": f"{student}-{step}", "task": "self_instruct", "protocol": "open", "seed": seed},
                **{"item_id": str(item), "item_hash": f"h{item}", "output": "text", "metric": "rougeL", "error": ""},
                **{"output_tokens": 9, "seconds": 0.1, "finish_reason": "length" if seed == 10 else "stop"},
                "score": None if item == 12 else min(1.0, max(0.0, level + generator.gauss(0, 0.03))),
            }
            for item in range(13)
            for seed in (10, 20, 30, 40, 50)
        ]
        path = fr.frame_path(tmp_path / "frames", "r1", "self_instruct", f"{student}-{step}", "open")
        fr.write_frame(fr.frame_of_rows(rows), path)
    data = read_run(tmp_path / "frames", None, None)
    change = changes(data).row(0, named=True)
    assert (change["items"], change["gained"], change["lost"], change["test"]) == (12, None, None, "t")
    assert change["low"] < 0.2 < change["high"]
    assert change["p_value"] < 0.001
    after = likeness(data).filter(step=9).row(0, named=True)
    assert (after["agreement"], after["kappa"], after["when_teacher_right"]) == (None, None, None)
    assert after["low"] < -0.2 < after["high"] < 0
    out = write_report(frames=tmp_path / "frames", run_dir=None, run=None, out=tmp_path / "out" / "report.html")
    text = out.with_name("report.md").read_text()
    assert "nan" not in text.lower()
    assert "minus the teacher's" in text
    assert "| big (teacher), self_instruct | 20.0 | 65 |" in text  # one answer of five was cut off


def test_without_a_run_folder_it_is_scores_alone(run: Path, tmp_path: Path) -> None:
    out = write_report(frames=run / "frames", run_dir=None, run="r1", out=tmp_path / "report.html")
    assert "<h2>Learning</h2>" not in out.read_text()
    assert "<h2>Scores</h2>" in out.read_text()


def test_no_rows_and_too_many_runs_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="`tutelage evaluate` writes some"):
        write_report(frames=tmp_path, run_dir=None, run=None, out=tmp_path / "r.html")
    with pytest.raises(DataError, match="no rows of run r2"):
        write_report(frames=run / "frames", run_dir=None, run="r2", out=tmp_path / "r.html")
    write_rows(tmp_path / "f", "big", right=lambda _: True)
    frame = fr.read(tmp_path / "f").collect().with_columns(run=pl.lit("r2"))
    fr.write_frame(frame, fr.frame_path(tmp_path / "f", "r2", "arithmetic", "x", "paper"))
    with pytest.raises(DataError, match="--run"):
        write_report(frames=tmp_path / "f", run_dir=None, run=None, out=tmp_path / "r.html")


def test_rows_without_a_single_score_and_a_run_that_is_not_there_are_refused(run: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "f", "big", right=lambda _: True)
    failed = fr.read(tmp_path / "f").collect()
    failed = failed.with_columns(score=pl.lit(None, pl.Float64), error=pl.lit("RuntimeError: out of memory"))
    fr.write_frame(failed, fr.frame_path(tmp_path / "f", "r1", "arithmetic", "big-0", "paper"))
    with pytest.raises(
        DataError, match=r"no score: arithmetic:paper of big: none of 20 .* RuntimeError: out of memory"
    ):
        write_report(frames=tmp_path / "f", run_dir=None, run=None, out=tmp_path / "r.html")
    with pytest.raises(DataError, match="nowhere is not a folder"):
        write_report(frames=run / "frames", run_dir=tmp_path / "nowhere", run=None, out=tmp_path / "r.html")


def test_a_broken_metrics_file_is_named(run: Path, tmp_path: Path) -> None:
    (tmp_path / "students" / "s").mkdir(parents=True)
    for content in (b"not json\n", '{"note": "Zürich"}\n'.encode("latin-1")):
        (tmp_path / "students" / "s" / "metrics.jsonl").write_bytes(content)
        with pytest.raises(DataError, match=r"metrics\.jsonl has a line that is not JSON in UTF-8"):
            write_report(frames=run / "frames", run_dir=tmp_path, run=None, out=tmp_path / "r.html")


def test_a_file_that_is_none_of_rows_is_named(run: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "f" / "run=r1" / "task=arithmetic" / "x--paper.parquet"
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"PAR1 and then nothing like it")
    with pytest.raises(DataError, match=r"x--paper\.parquet cannot be read .*; remove it and evaluate again"):
        write_report(frames=tmp_path / "f", run_dir=None, run=None, out=tmp_path / "r.html")
    (tmp_path / "study.json").write_text('{"cells": []}')
    with pytest.raises(DataError, match=r"study\.json lacks claims, comparisons, name, teachers"):
        write_study_report(frames=run / "frames", study=tmp_path, out=tmp_path / "r.html")


def test_a_student_whose_rows_name_no_teacher_is_still_a_student(tmp_path: Path) -> None:
    """Fine-tuned, taught by stored signals or evaluated by hand: its rows say how it was trained, no teacher's do."""
    write_rows(tmp_path / "frames", "big", right=lambda index: index < 15)
    write_rows(tmp_path / "frames", "sft", right=lambda index: index < 5, objective="sft", step=2)
    folder = tmp_path / "students" / "sft"
    folder.mkdir(parents=True)
    lines = [json.dumps({"step": step, "train/loss": 1.0, "heldout/forward_kl": 1.0}) for step in (0, 2)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    data = read_run(tmp_path / "frames", tmp_path, None)
    assert data.students == ["sft"]
    roles = dict(data.summary.select("student", "role").rows())
    assert roles == {"big": "teacher", "sft": "after"}
    out = write_report(frames=tmp_path / "frames", run_dir=tmp_path, run=None, out=tmp_path / "out" / "report.html")
    assert "sft" in out.read_text()


@pytest.mark.parametrize("items", [1, 2])
def test_a_run_of_one_item_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, items: int) -> None:
    monkeypatch.setitem(globals(), "ITEMS", items)
    trained = {"teacher": "big", "objective": "gkd", "temperature": 1.0}
    write_rows(tmp_path / "frames", "big", right=lambda _: True)
    write_rows(tmp_path / "frames", "s", right=lambda _: False, **trained)
    write_rows(tmp_path / "frames", "s", right=lambda _: True, **trained, step=60)
    out = write_report(frames=tmp_path / "frames", run_dir=None, run=None, out=tmp_path / "out" / "report.html")
    assert "Before and after" in out.read_text()
    [row] = changes(read_run(tmp_path / "frames", None, "r1")).to_dicts()
    assert (row["change"], row["p_value"]) == (1.0, [1.0, 0.5][items - 1])
    assert row["low"] < 0 < row["high"]
