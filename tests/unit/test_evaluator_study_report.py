"""The report of a study, from a study whose truth is known: what it says of each claim, and what it must not hide."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from tutelage.errors import DataError
from tutelage.evaluator.report import write_study_report
from tutelage.evaluator.report.preflight import of_several
from tutelage.evaluator.report.study_data import read_study
from tutelage.evaluator.report.study_report import facts
from tutelage.evaluator.report.study_sections import learning, likeness, results_of
from tutelage.evaluator.results.frames import SCHEMA, frame_of_rows, frame_path, write_frame
from tutelage.evaluator.tasks import TASKS

SIZES = {"small": 1000, "middle": 3000, "large": 9000}
CHANCE = {"small": 0.3, "middle": 0.5, "large": 0.6}
GAIN = {"small": 0.5, "middle": 0.3, "large": 0.1}
SEEDS, ITEMS = (0, 1, 2), 120


def cell(role: str, model: str, method: str = "", seed: int = 0, **more: object) -> dict[str, object]:
    described = {"role": role, "model": model, "method": method, "seed": seed, "parameters": SIZES.get(model, 20000)}
    described |= {"objective": method, "teacher": "", "temperature": 1.0, "noise": 0.0, "steps": 5, "on_policy": False}
    described |= more
    name = "-".join(
        str(described[key]) for key in ("role", "model", "method", "teacher", "temperature", "noise", "seed")
    )
    return {"id": name, "evaluation_id": f"e-{name}".lower(), **described}


def chance(described: dict[str, object]) -> float:
    """The true accuracy of a cell: smaller students gain more, noise destroys."""
    if described["role"] == "tuned":
        return 0.95
    own = CHANCE.get(str(described["model"]), 0.1)
    if described["noise"]:
        return 0.05
    return own if described["method"] in ("sft", "seq_kd") else own + GAIN[str(described["model"])]


def declared(cells: list[dict[str, object]]) -> dict[str, object]:
    kd = {"method": "kd", "noise": 0.0}
    comparisons = [
        {"name": "KD against SFT", "family": "kd", "first": kd, "second": {"method": "sft"}, "students": []},
        {
            "name": "σ = 5",
            "family": "noise",
            "first": {"method": "kd", "noise": 5.0},
            "second": kd,
            "students": ["small"],
        },
        {"name": "never run", "family": "later", "first": {"method": "gkd"}, "second": kd, "students": []},
    ]
    claims = [
        {"text": "KD helps", "family": "kd", "trend": None, "expects": "first higher"},
        {"text": "noise helps", "family": "noise", "trend": None, "expects": "first higher"},
        {"text": "not there yet", "family": "later", "trend": None, "expects": "equivalent"},
        {"text": "smaller students gain more", "family": None, "trend": "size", "expects": "negative"},
    ]
    return {
        "name": "known",
        "teachers": {"big": {"cell": "tuned-big--" + "-1.0-0.0-0", "tuned": True}},
        "cells": cells,
        "tasks": [{"task": "sums", "protocol": "paper", "limit": 0}],
        "comparisons": [{**one, "margin": None} for one in comparisons],
        "claims": claims,
    }


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """Three sizes and seeds, SFT and two methods (one without effect), one noise, and one cell that never ran."""
    folder = tmp_path_factory.mktemp("study")
    cells = [cell("tuned", "big")]
    for model in SIZES:
        for seed in SEEDS:
            cells += [cell("student", model, "sft", seed)]
            cells += [cell("student", model, method, seed, teacher="big") for method in ("kd", "seq_kd")]
    cells += [cell("student", "small", "kd", seed, teacher="big", noise=5.0) for seed in SEEDS]
    generator = np.random.default_rng(0)
    for described in cells:
        write_rows(folder / "frames", described, generator)
    absent = cell("student", "large", "gkd", 0, teacher="big")
    (folder / "study.json").write_text(json.dumps(declared([*cells, absent])))
    return folder


def write_rows(frames: Path, described: dict[str, object], generator: np.random.Generator, error: str = "") -> None:
    rows = []
    for item in range(ITEMS):
        right = bool(generator.uniform() < float(described.get("right", chance(described))))
        number = str(item) if right else "wrong <b>"
        rows.append(
            {
                **dict.fromkeys(SCHEMA),
                "run": "known",
                "student": described["model"],
                "teacher": described["teacher"],
                "objective": described["objective"],
                "temperature": described["temperature"],
                "noise": described["noise"],
                "step": 5,
                "training_seed": described["seed"],
                "evaluation_id": described["evaluation_id"],
                "task": described.get("task", "sums"),
                "protocol": "paper",
                "template": "chat",
                "sampling_temperature": 0.0,
                "seed": 0,
                "item_id": str(item),
                "item_hash": f"hash {item}",
                "output": f"The answer is {number}",
                "extracted": number if right else "",
                "target": str(item),
                "score": float(right),
                "error": error,
            }
        )
    path = frame_path(frames, "known", str(described.get("task", "sums")), str(described["evaluation_id"]), "paper")
    write_frame(frame_of_rows(rows), path)


@pytest.fixture(scope="module")
def report(study, tmp_path_factory) -> Path:
    return write_study_report(
        frames=study / "frames", study=study, out=tmp_path_factory.mktemp("report") / "report.html"
    )


def verdicts(report: Path) -> dict[str, str]:
    table = pl.read_csv(report.parent / "tables" / "claims.csv")
    return dict(table.select("claim", "verdict").rows())


def test_each_claim_gets_the_verdict_that_the_truth_deserves(report):
    assert verdicts(report) == {
        "KD helps": "shows",
        "noise helps": "the opposite shows",
        "not there yet": "undecided: 0 of 1 comparisons are scored",
        "smaller students gain more": "shows",
    }


def test_the_pooled_difference_is_the_mean_of_the_students_differences(report, study):
    compared = pl.read_csv(report.parent / "tables" / "comparisons.csv").filter(
        pl.col("comparison") == "KD against SFT", pl.col("task") == "Average"
    )
    rows = read_study(study, study / "frames").rows.filter(pl.col("role") == "student", pl.col("noise") == 0)
    means = dict(rows.group_by("method").agg(pl.col("score").mean()).rows())
    assert compared["difference"].item() == pytest.approx(100 * (means["kd"] - means["sft"]))
    assert compared["seeds"].item() == len(SIZES) * len(SEEDS)
    assert compared["clusters"].item() == ITEMS
    assert compared["seeds_low"].item() < compared["low"].item()


def test_the_mixed_model_tells_the_method_that_helps_from_the_one_that_does_not(report):
    effects = {one["name"]: one for one in pl.read_csv(report.parent / "tables" / "methods_model.csv").to_dicts()}
    true_gain = 100 * sum(GAIN.values()) / len(GAIN)
    assert set(effects) == {"Intercept", "kd", "seq_kd"}
    assert effects["kd"]["low"] < true_gain < effects["kd"]["high"]
    assert effects["kd"]["p_value"] < 0.001
    assert effects["seq_kd"]["low"] < 0 < effects["seq_kd"]["high"]
    apart = pl.read_csv(report.parent / "tables" / "methods_apart.csv").filter(test="kruskal")
    assert "kd and seq_kd" in report.with_name("report.md").read_text()
    assert apart.height == 1


def test_what_several_rows_have_is_said_in_one_order(tmp_path):
    """Polars gives unique values in any order."""
    cells = [cell("tuned", "big"), *(cell("student", "small", "sft", seed) for seed in SEEDS)]
    for described in cells:
        write_rows(tmp_path / "frames", described, np.random.default_rng(0))
    (tmp_path / "study.json").write_text(json.dumps(declared(cells)))
    data = read_study(tmp_path, tmp_path / "frames")
    names = [f"t{number}" for number in range(9)]
    many = data.rows.with_columns(template=pl.Series(np.resize(names, len(data.rows))))
    shown = dict(facts(replace(data, rows=many)))
    assert shown["protocol"] == f"paper, prompt {', '.join(names)}"


def test_curves_and_maps_are_drawn_in_one_order(study):
    """Polars groups in any order, and what is drawn last lies on top."""
    data = read_study(study, study / "frames")
    steps = pl.DataFrame({"step": range(40), "heldout/forward_kl": np.linspace(4, 1, 40)})
    data = replace(data, metrics=data.cells.filter(role="student").join(steps, how="cross"))
    found = results_of(data)
    for section, keys in ((learning(data, found), ["method", "step"]), (likeness(data, found), ["student", "method"])):
        drawn = section.figures[0].chart.data
        assert drawn.height > 1
        assert drawn.select(keys).equals(drawn.select(keys).sort(keys))


def test_it_says_how_many_cells_are_missing(report):
    assert "31 of 32 scored" in report.read_text()


def test_markdown_and_files_hold_the_same_and_nothing_is_fetched(report):
    text, page = report.with_name("report.md").read_text(), report.read_text()
    assert not re.search(r"(src|href)=.?http", page)
    for figure in ("improvement_by_size", "forest", "by_noise", "agreement", "accuracy_fidelity"):
        assert f"figures/{figure}.png" in text
        assert (report.parent / "figures" / f"{figure}.png").stat().st_size > 1000
        assert (report.parent / "figures" / f"{figure}.svg").read_text().startswith("<svg")
    assert "| KD helps | shows |" in text


def test_a_failed_item_is_not_scored_silently(study, tmp_path):
    described = cell("student", "large", "kd", 0, teacher="big")
    write_rows(tmp_path / "frames", described, np.random.default_rng(0), error="out of memory")
    with pytest.raises(DataError, match="120 items failed, the first with out of memory"):
        read_study(study, tmp_path / "frames")


def write_answers(frames: Path, described: dict[str, object], generator: np.random.Generator) -> None:
    """Five answers an item under `open`: the last item has no reference, the one before it is too long to be asked."""
    rows = []
    level = 0.6 if described["role"] == "tuned" else 0.4 if described["method"] == "kd" else 0.2
    for item in range(40):
        for seed in (10, 20, 30, 40, 50):
            score = float(np.clip(level + generator.normal(0, 0.05), 0, 1))
            rows.append(
                {
                    **dict.fromkeys(SCHEMA),
                    **{"run": "known", "student": described["model"], "teacher": described["teacher"], "step": 5},
                    **{"objective": described["objective"], "temperature": 1.0, "noise": 0.0, "template": "alpaca"},
                    **{"training_seed": described["seed"], "evaluation_id": described["evaluation_id"]},
                    **{"task": "self_instruct", "protocol": "open", "sampling_temperature": 1.0, "seed": seed},
                    **{"item_id": str(item), "item_hash": f"hash {item}", "output": f"words {seed}"},
                    "score": None if item >= 38 else score,
                    "error": "the prompt has 300 tokens" if item == 38 else "",
                    "finish_reason": "too_long" if item == 38 else "length" if seed == 10 else "stop",
                }
            )
    path = frame_path(frames, "known", "self_instruct", str(described["evaluation_id"]), "open")
    write_frame(frame_of_rows(rows), path)


def test_a_study_of_open_questions_reports(tmp_path):
    cells = [cell("tuned", "big")]
    for model in SIZES:
        for seed in SEEDS:
            cells += [cell("student", model, "sft", seed), cell("student", model, "kd", seed, teacher="big")]
    generator = np.random.default_rng(1)
    for described in cells:
        write_answers(tmp_path / "frames", described, generator)
    (tmp_path / "study.json").write_text(json.dumps(declared(cells)))
    out = write_study_report(frames=tmp_path / "frames", study=tmp_path, out=tmp_path / "out" / "report.html")
    compared = pl.read_csv(out.parent / "tables" / "comparisons.csv", infer_schema_length=None)
    one = compared.filter(pl.col("comparison") == "KD against SFT", pl.col("task") == "self_instruct").row(
        0, named=True
    )
    assert (one["items"], one["clusters"], one["seeds"]) == (38, 38, 9)
    assert one["difference"] == pytest.approx(20, abs=1)
    assert one["p_mcnemar"] is None
    assert verdicts(out)["KD helps"] == "shows"
    text = out.with_name("report.md").read_text()
    assert "2 items have no score and are left out" in text
    assert "figures/agreement.png" not in text
    assert "20.0" in next(line for line in text.splitlines() if line.startswith("| large, kd"))  # cut off, percent


def test_a_study_of_one_training_a_method_says_what_it_cannot_tell(tmp_path):
    known = {"topic": "test items", "state": "note", "text": "sums: 2 of 9"}
    cells = [cell("tuned", "big"), *(cell("student", "small", method, 0, teacher="big") for method in ("kd", "seq_kd"))]
    cells.append(cell("student", "small", "sft", 0))
    generator = np.random.default_rng(1)
    for described in cells:
        write_rows(tmp_path / "frames", described, generator)
    (tmp_path / "study.json").write_text(json.dumps(declared(cells)))
    (tmp_path / "preflight.json").write_text(json.dumps({cells[-1]["id"]: [known], "another's": [known]}))
    out = write_study_report(frames=tmp_path / "frames", study=tmp_path, out=tmp_path / "out" / "report.html")
    text = out.with_name("report.md").read_text()
    assert "cannot be told from one score a method" in text
    assert "| 1 | · test items | sums: 2 of 9 |" in text
    assert "| sums | kruskal | 1 | – | cannot tell | – |" in text


def test_what_was_found_before_the_trainings_is_shown_once():
    found = [{"student": name, "topic": "length", "state": "ok", "text": "all fit"} for name in ("a", "b")]
    section = of_several([*found, {"student": "b", "topic": "test items", "state": "note", "text": "sums: 2 of 9"}])
    assert section.tables[0].cells == [["2", "✓ length", "all fit"], ["1", "· test items", "sums: 2 of 9"]]
    assert of_several([]) is None


def test_a_folder_without_a_study_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"not the folder of a study .*run it first"):
        read_study(tmp_path, tmp_path)


@pytest.mark.parametrize(("items", "seeds"), [(1, 1), (1, 2), (2, 3)])
def test_a_study_of_one_item_or_one_run_reports(tmp_path, monkeypatch, items: int, seeds: int):
    monkeypatch.setitem(globals(), "ITEMS", items)
    cells = [cell("tuned", "big")]
    for seed in range(seeds):
        cells += [cell("student", "small", "sft", seed), cell("student", "small", "kd", seed, teacher="big")]
    generator = np.random.default_rng(1)
    for described in cells:
        write_rows(tmp_path / "frames", described, generator)
    (tmp_path / "study.json").write_text(json.dumps(declared(cells)))
    out = write_study_report(frames=tmp_path / "frames", study=tmp_path, out=tmp_path / "out" / "report.html")
    assert verdicts(out)["KD helps"] in ("undecided", "cannot tell")
    compared = pl.read_csv(out.parent / "tables" / "comparisons.csv", infer_schema_length=None)
    assert compared["items"].to_list() == [items] * compared.height > []
    assert (compared["high"] - compared["low"]).min() > 50


def test_a_comparison_of_some_tasks_averages_those_alone(tmp_path):
    cells = [cell("tuned", "big")]
    for seed in SEEDS:
        cells += [cell("student", "small", "sft", seed), cell("student", "small", "kd", seed, teacher="big")]
    generator = np.random.default_rng(0)
    for described in cells:
        for task, right in (("ARC-Easy", 0.1), ("piqa", 0.9), ("own", 0.5)):
            write_rows(tmp_path / "frames", {**described, "task": task, "right": right}, generator)
    sides = {"first": {"method": "kd"}, "second": {"method": "sft"}, "students": [], "margin": None, "family": "kd"}
    chosen = {"low": ["arc_easy"], "high": ["piqa"], "two": ["PIQA", "own"], "all": []}
    content = declared(cells) | {"claims": []}
    content["comparisons"] = [{"name": name, **sides, "tasks": tasks} for name, tasks in chosen.items()]
    (tmp_path / "study.json").write_text(json.dumps(content))
    out = write_study_report(frames=tmp_path / "frames", study=tmp_path, out=tmp_path / "out" / "report.html")
    compared = pl.read_csv(out.parent / "tables" / "comparisons.csv", infer_schema_length=None)
    assert compared.filter(task="Average")["items"].to_list() == [ITEMS, ITEMS, 2 * ITEMS, 3 * ITEMS]
    average = dict(compared.filter(task="Average").select("comparison", "second").rows())
    by_task = dict(compared.filter(comparison="all").select("task", "second").rows())
    assert average["low"] == by_task["ARC-Easy"] < average["two"] == (by_task["piqa"] + by_task["own"]) / 2
    shown = out.read_text()
    assert "<td>ARC-Easy</td>" in shown
    assert "<td>own, piqa</td>" in shown


def test_kinds_of_errors_are_counted_over_seeds(tmp_path, monkeypatch):
    questions = [f"Ann has {30 + n} pears and {n} apples. How many more?" for n in range(2, 5)]
    records = [{"instruction": question, "input": "", "output": "", "answer": "30"} for question in questions]
    (tmp_path / "tasks" / "SVAMP").mkdir(parents=True)
    (tmp_path / "tasks" / "SVAMP" / "test.json").write_text(json.dumps(records))
    monkeypatch.setenv("TUTELAGE_DATA_DIR", str(tmp_path))
    cells = [cell("tuned", "big"), *(cell("student", "small", "sft", seed) for seed in (0, 1))]
    for described in cells:
        rows = [
            {
                **dict.fromkeys(SCHEMA),
                **{"run": "known", "student": described["model"], "teacher": "", "objective": described["objective"]},
                **{"temperature": 1.0, "noise": 0.0, "step": 5, "training_seed": described["seed"], "seed": 0},
                **{"evaluation_id": described["evaluation_id"], "task": "SVAMP", "protocol": "paper", "error": ""},
                **{"template": "chat", "item_id": item.item_id, "item_hash": item.item_hash, "target": "30"},
                **{"output": output, "extracted": output, "score": float(output == "30"), "metric": "accuracy"},
            }
            for item, output in zip(TASKS["SVAMP"].items(tmp_path), ("30", "36", "38"), strict=True)
        ]
        path = frame_path(tmp_path / "frames", "known", "SVAMP", str(described["evaluation_id"]), "paper")
        write_frame(frame_of_rows(rows), path)
    (tmp_path / "study.json").write_text(json.dumps(declared(cells)))
    out = write_study_report(frames=tmp_path / "frames", study=tmp_path, out=tmp_path / "out" / "report.html")
    line = next(line for line in out.with_name("report.md").read_text().splitlines() if "small, sft, SVAMP" in line)
    assert [one.strip() for one in line.split("|")[2:5]] == ["33.3", "0.0", "0.0"]
    assert line.split("|")[-2].strip() == "6"


@pytest.fixture(scope="module")
def controlled(tmp_path_factory) -> Path:
    """Two methods that gain 30 points: one that its control gains as well, one that its control does not."""
    folder = tmp_path_factory.mktemp("controlled")
    base = cell("base", "small")
    true = {"": 0.2, "warm": 0.2, "sft": 0.3, "kd": 0.5, "kd.shuffled": 0.5, "pg": 0.5, "pg.constant_advantage": 0.2}
    cells, lines = [base, cell("tuned", "big")], {}
    for seed in range(4):
        warm = cell("student", "small", "warm", seed, start=base["id"], control_of="")
        cells += [warm, cell("student", "small", "sft", seed, start="models/small", control_of="")]
        for method in ("kd", "kd.shuffled", "pg", "pg.constant_advantage"):
            control_of = method.partition(".")[0] if "." in method else ""
            more = {"teacher": "big", "start": warm["id"], "control_of": control_of}
            cells.append(cell("student", "small", method, seed, **more))
    generator = np.random.default_rng(0)
    for described in cells:
        write_rows(folder / "frames", described | {"right": true[str(described["method"])]}, generator)
        lines[described["id"]] = {"train/tokens": 10, "train/teacher_tokens": 100 * (described["teacher"] != "")}
    for name, counts in lines.items():
        (folder / "students" / str(name)).mkdir(parents=True)
        steps = [{"step": step, "time_seconds": step, "student": name, "seconds/stepping": 2.0} for step in (1, 2)]
        text = "".join(json.dumps({**step, **counts}) + "\n" for step in steps)
        (folder / "students" / str(name) / "metrics.jsonl").write_text(text)
    content = declared(cells) | {
        "comparisons": [
            {"name": name, "family": name, "first": {"method": name}, "second": {"method": "sft"}}
            | {"students": [], "margin": None}
            for name in ("kd", "pg")
        ],
        "claims": [
            {"text": f"{name} helps", "family": name, "trend": None, "expects": "first higher"} for name in ("kd", "pg")
        ],
    }
    (folder / "study.json").write_text(json.dumps(content))
    return write_study_report(frames=folder / "frames", study=folder, out=folder / "report" / "report.html")


def test_a_gain_that_a_control_has_as_well_is_said_to_be_so(controlled):
    found = pl.read_csv(controlled.parent / "tables" / "controls.csv")
    assert dict(found.select("control", "verdict").rows()) == {
        "kd.shuffled": "its control gains as well",
        "pg.constant_advantage": "its own",
    }
    kd = found.row(by_predicate=pl.col("method") == "kd", named=True)
    assert kd["gain"] == pytest.approx(30, abs=8)
    assert kd["apart_low"] < 0 < kd["apart_high"]
    assert verdicts(controlled) == {"kd helps": "shows; kd.shuffled gains as well", "pg helps": "shows"}


def test_controls_and_warm_ups_are_no_methods_among_others(controlled):
    text = controlled.with_name("report.md").read_text()
    effects = pl.read_csv(controlled.parent / "tables" / "methods_model.csv")
    assert set(effects["name"]) == {"Intercept", "kd", "pg", "warm"}  # over sft, which nothing starts from
    gains = pl.read_csv(controlled.parent / "tables" / "improvement.csv")
    assert sorted(gains["method"].unique()) == ["kd", "pg"]
    assert len(gains) == 8
    assert "## Controls" in text


def test_what_a_method_spent_has_its_warm_up_in_it(controlled):
    spent = pl.read_csv(controlled.parent / "tables" / "spent.csv").filter(seed=0)
    columns = ["method", "steps", "scored_tokens", "teacher_tokens", "seconds"]
    by_method = {row[0]: row[1:] for row in spent.select(columns).rows()}
    assert by_method["sft"] == (2, 20, 0, 4.0)
    assert by_method["kd"] == (4, 40, 200, 8.0)
    for name in ("score_by_teacher_tokens", "score_by_seconds"):
        assert (controlled.parent / "figures" / f"{name}.png").exists()
