"""The files of rows: pandas, pyarrow and Polars read a folder of them, of both protocols, with the declared types."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
from pyarrow import parquet

from evaluator_support import EchoEngine, write_checkpoint
from tutelage.evaluator.config import EvaluationSettings
from tutelage.evaluator.results import frames as fr
from tutelage.evaluator.runner.evaluation import evaluate
from tutelage.evaluator.runner.requests import Evaluation, Labels, TaskRequest

TASKS = (TaskRequest("arithmetic", "paper", 5), TaskRequest("arithmetic", "loglik", 3))


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    evaluation = Evaluation("one", write_checkpoint(tmp_path / "c"), Labels("r1", "s"), TASKS)
    settings = EvaluationSettings(prompt="chat", max_new_tokens=8)
    evaluate(evaluation, settings, tmp_path / "f", engines=lambda _: EchoEngine())
    return tmp_path / "f"


def test_every_file_has_the_declared_types_but_for_what_its_path_says(frames: Path) -> None:
    declared = {name: kind for name, kind in fr.SCHEMA.items() if name not in ("run", "task")}
    files = sorted(frames.rglob("*.parquet"))
    assert len(files) == 2
    for file in files:
        assert dict(pl.read_parquet_schema(file)) == declared


def test_other_readers_read_the_whole_folder(frames: Path) -> None:
    pandas = pytest.importorskip("pandas")
    expected = fr.read(frames).collect()
    for table in (parquet.read_table(frames).to_pandas(), pandas.read_parquet(frames)):
        assert len(table) == len(expected) == 8
        assert set(table.columns) == set(fr.SCHEMA)
        assert set(table["run"]) == {"r1"}
        assert sorted(table["score"]) == sorted(expected["score"])


def test_files_that_have_their_folders_name_in_them_are_still_read(frames: Path) -> None:
    old = frames / "run=r0" / "task=arithmetic" / "old--paper.parquet"
    old.parent.mkdir(parents=True)
    rows = fr.read(frames).filter(protocol="paper").collect().with_columns(run=pl.lit("r0"))
    rows.write_parquet(old)
    both = fr.read(frames).collect()
    assert both.schema == fr.SCHEMA
    assert both.group_by("run").len().sort("run").rows() == [("r0", 5), ("r1", 8)]
    assert fr.read_files([old]).collect().equals(rows)
