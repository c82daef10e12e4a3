"""The ready studies of deploy/studies: each can be planned here, and the instruction study's measures be reported."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from tutelage.evaluator.report import write_study_report
from tutelage.evaluator.results.frames import SCHEMA, frame_of_rows, frame_path, write_frame
from tutelage.evaluator.tasks import TASKS
from tutelage.study import cli
from tutelage.study.cells import Cell
from tutelage.study.driver import write_description
from tutelage.study.folder import Folder
from tutelage.study.plan import cost_of
from tutelage.study.printing import print_plan
from tutelage.study.resolution import Study

READY = sorted((Path(__file__).resolve().parents[2] / "deploy" / "studies").glob("*.yaml"))
ITEMS, ANSWERS = 12, 5


@cache
def planned(name: str) -> Study:
    """It asks three commands, each of which takes a second."""
    return cli.planned(Path(name))[0]


@pytest.mark.parametrize("file", READY, ids=lambda file: file.stem)
def test_a_ready_study_can_be_planned(file, tmp_path, capsys):
    study = planned(file.stem)
    print_plan(study, cost_of(study, Folder(tmp_path)))
    shown = capsys.readouterr().out
    assert f"0 cells are done, {len(study.cells)} are missing" in shown
    known = {task.task for task in study.config.evaluation.tasks if not task.task.endswith(".yaml")}
    assert known <= set(TASKS)
    # What a folder stands for, and how its status is asked for.
    assert Study.from_json(json.loads(json.dumps(study.to_json()))) == study


def write_open_rows(frames: Path, study: Study, cell: Cell, generator: np.random.Generator) -> None:
    """As the protocol `open` writes them: several answers an item, a ROUGE-L each, nothing extracted."""
    for task in study.config.evaluation.tasks:
        rows = []
        for item in range(ITEMS):
            for seed in range(ANSWERS):
                answer = f"an answer {item} {seed}"
                row = {
                    "run": study.config.name,
                    "student": cell.model,
                    "teacher": cell.teacher,
                    "objective": cell.objective,
                    "temperature": cell.temperature,
                    "noise": cell.noise,
                    "step": cell.steps,
                    "training_seed": cell.seed,
                    "evaluation_id": study.evaluation_id(cell),
                    "task": task.task,
                    "protocol": "open",
                    "template": "alpaca",
                    "sampling_temperature": 1.0,
                    "seed": seed,
                    "item_id": str(item),
                    "item_hash": f"hash {item}",
                    "output": answer,
                    "target": f"the answer {item}",
                    "metric": "rougeL",
                    "score": float(generator.uniform(0.1, 0.6)) + (0.2 if cell.method == "gkd" else 0.0),
                    "finish_reason": "stop",
                    "error": "",
                }
                rows.append({**dict.fromkeys(SCHEMA), **row})
        path = frame_path(frames, study.config.name, task.task, study.evaluation_id(cell), "open")
        write_frame(frame_of_rows(rows), path)


def test_the_instruction_study_can_be_reported(tmp_path):
    study = planned("paper_instruction")
    folder = Folder(tmp_path / "run")
    folder.make()
    write_description(study, folder)
    generator = np.random.default_rng(0)
    done = [cell for cell in study.cells if cell.role != "student" or cell.model == "q0.5b"]
    for cell in done:
        write_open_rows(folder.path("frames"), study, cell, generator)
    page = write_study_report(frames=folder.path("frames"), study=folder.root, out=tmp_path / "report.html")
    claims = pl.read_csv(page.parent / "tables" / "claims.csv")
    assert len(claims) == len(study.config.claims)
    text = page.with_suffix(".md").read_text()
    assert "dolly" in text
    assert "nan" not in text.lower().replace("nano", "")
