"""The ready studies of deploy/studies: each can be planned here."""

from __future__ import annotations

from pathlib import Path

import pytest

from tutelage.evaluator.tasks import TASKS
from tutelage.study import cli
from tutelage.study.folder import Folder
from tutelage.study.plan import cost_of
from tutelage.study.printing import print_plan

READY = sorted((Path(__file__).resolve().parents[2] / "deploy" / "studies").glob("*.yaml"))


@pytest.mark.parametrize("file", READY, ids=lambda file: file.stem)
def test_a_ready_study_can_be_planned(file, tmp_path, capsys):
    study, _ = cli.planned(Path(file.stem))
    print_plan(study, cost_of(study, Folder(tmp_path)))
    shown = capsys.readouterr().out
    assert f"0 cells are done, {len(study.cells)} are missing" in shown
    known = {task.task for task in study.config.evaluation.tasks if not task.task.endswith(".yaml")}
    assert known <= set(TASKS)
