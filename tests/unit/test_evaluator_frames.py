"""The files of rows: pandas, pyarrow, DuckDB and Polars read a folder of them as it is, with the declared types."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from pyarrow import parquet

from evaluator_support import EchoEngine, write_checkpoint
from tutelage.errors import CheckpointError
from tutelage.evaluator.config import EvaluationSettings
from tutelage.evaluator.results import frames as fr
from tutelage.evaluator.runner.evaluation import Progress, evaluate
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


def with_polars(folder: Path) -> pl.DataFrame:
    return pl.scan_parquet(folder).collect()


def with_pyarrow(folder: Path) -> pl.DataFrame:
    return pl.from_arrow(parquet.read_table(folder))


def with_pandas(folder: Path) -> pl.DataFrame:
    import pandas as pd

    return pl.from_pandas(pd.read_parquet(folder))


def with_duckdb(folder: Path) -> pl.DataFrame:
    import duckdb

    return pl.from_arrow(duckdb.sql(f"SELECT * FROM read_parquet('{folder}/**/*.parquet')").to_arrow_table())


@pytest.mark.parametrize("reader", [with_polars, with_pyarrow, with_pandas, with_duckdb])
def test_other_readers_read_the_whole_folder(reader: Callable[[Path], pl.DataFrame], frames: Path) -> None:
    order = ["protocol", "item_id"]
    keys = {"run": pl.String, "task": pl.String}  # categories for pandas and pyarrow
    read = reader(frames).cast(keys).select(list(fr.SCHEMA)).sort(order)
    assert read.equals(fr.read(frames).collect().sort(order))
    assert len(read) == 8


def test_the_folder_holds_nothing_but_frames_whatever_ends_an_evaluation(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "c", manifest=True)
    evaluation = Evaluation("one", checkpoint, Labels("r1", "s"), TASKS)
    settings = EvaluationSettings(prompt="chat", max_new_tokens=8)
    out = tmp_path / "f"

    def links() -> list[Path]:
        return [path for path in tmp_path.rglob("model.safetensors") if path.parent != checkpoint]

    def interrupt(progress: Progress) -> None:
        assert links()  # pinned while it is worked on
        if progress.done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(evaluation, settings, out, engines=lambda _: EchoEngine(), on_progress=interrupt)
    assert not list(out.rglob("*.*"))
    assert not links()
    assert list((tmp_path / "f.unfinished").rglob("*.parquet"))  # with which the next one goes on
    (checkpoint / "model.safetensors").write_bytes(b"another 10")
    with pytest.raises(CheckpointError, match="manifest"):
        evaluate(evaluation, settings, out, engines=lambda _: EchoEngine())
    assert not links()
    (checkpoint / "model.safetensors").write_bytes(b"not really")
    evaluate(evaluation, settings, out, engines=lambda _: EchoEngine())
    assert {path.suffix for path in out.rglob("*") if path.is_file()} == {".parquet"}
    assert not links()


def test_frames_below_a_folder_that_reads_like_a_partition_are_read(frames: Path, tmp_path: Path) -> None:
    moved = tmp_path / "run=7" / "task=x" / "f"
    moved.parent.mkdir(parents=True)
    expected = fr.read(frames).collect()
    frames.rename(moved)
    assert fr.read(moved).collect().equals(expected)
    files = sorted(moved.rglob("*.parquet"))
    assert fr.read_files(files).collect().sort("protocol").equals(expected.sort("protocol"))


def test_files_that_have_their_folders_name_in_them_are_still_read(frames: Path) -> None:
    old = frames / "run=r0" / "task=arithmetic" / "old--paper.parquet"
    old.parent.mkdir(parents=True)
    rows = fr.read(frames).filter(protocol="paper").collect().with_columns(run=pl.lit("r0"))
    rows.write_parquet(old)
    both = fr.read(frames).collect()
    assert both.schema == fr.SCHEMA
    assert both.group_by("run").len().sort("run").rows() == [("r0", 5), ("r1", 8)]
    assert fr.read_files([old]).collect().equals(rows)


def test_items_whose_output_was_cut_off_or_has_no_answer_are_counted(frames: Path) -> None:
    rows = fr.read(frames).filter(protocol="paper").with_row_index("row").collect()
    rows = rows.with_columns(
        finish_reason=pl.when(pl.col("row") < 2).then(pl.lit("length")).otherwise("finish_reason"),
        extracted=pl.when(pl.col("row") > 1).then(pl.lit("")).otherwise("extracted"),
    )
    (summary,) = fr.summarize(rows.lazy()).collect().to_dicts()
    assert (summary["n"], summary["cut_off"], summary["unparsable"], summary["failed"]) == (5, 2, 3, 0)
