"""One row an item: the declared schema, Parquet files partitioned by run and task, and what is derived from them.

    <frames>/run=<run>/task=<task>/<evaluation_id>--<protocol>.parquet

A file holds one evaluation of one task under one protocol and is renamed into place whole, so that a redo
replaces its rows and never doubles them. Summaries are derived from the rows and never stored.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl

from tutelage.errors import DataError
from tutelage.evaluator.protocols.base import JoinSpanned, TooLong
from tutelage.files import write_durably

_COLUMNS: dict[str, type[pl.DataType] | pl.DataType] = {
    # Who: copied from the request.
    "run": pl.String,
    "student": pl.String,
    "teacher": pl.String,
    "objective": pl.String,
    "temperature": pl.Float64,  # of distillation; 0 where it does not apply
    "noise": pl.Float64,
    "step": pl.UInt64,
    "training_seed": pl.UInt64,
    "evaluation_id": pl.String,
    "checkpoint": pl.String,
    "checkpoint_digest": pl.String,
    # What was asked, and how.
    "task": pl.String,
    "task_version": pl.UInt32,
    "protocol": pl.String,
    "template": pl.String,
    "engine": pl.String,
    "dtype": pl.String,
    "sampling_temperature": pl.Float64,  # 0: greedy; null under loglik
    "seed": pl.UInt64,
    "item_id": pl.String,
    "item_hash": pl.String,
    "prompt_hash": pl.String,
    # What came out. Null where a protocol does not have it; the empty string is "no answer found".
    "output": pl.String,
    "extracted": pl.String,  # paper: LLM-Adapters' rule; loglik: the most likely choice
    "extracted_corrected": pl.String,
    "extracted_normalized": pl.String,  # loglik: the most likely choice per character
    "target": pl.String,
    "metric": pl.String,
    "score": pl.Float64,  # in [0, 1]; null where the item failed
    "score_corrected": pl.Float64,
    "score_normalized": pl.Float64,
    "choices_logp": pl.List(pl.Float64),
    # What it cost.
    "prompt_tokens": pl.UInt32,
    "output_tokens": pl.UInt32,
    # "stop", "length" (cut off), "scored", "scored_past_join" (protocols.loglik); "error" where the item failed,
    # "join_spanned" and "too_long" where its protocol leaves it out
    "finish_reason": pl.String,
    "seconds": pl.Float64,  # the item's share of its batch
    "error": pl.String,  # empty, or why the item failed or was left out
}
SCHEMA = pl.Schema(_COLUMNS)
_HIVE = {"run": pl.String, "task": pl.String}
EVALUATION_KEYS = (
    "run",
    "student",
    "teacher",
    "objective",
    "temperature",
    "noise",
    "step",
    "training_seed",
    "evaluation_id",
)
CHANCE_LEVEL = "tutelage.chance_level"
"""Key of a file's metadata: what guessing scores in its task, which a task of one's own says and no row."""
# Finish reasons of items that their protocol leaves out.
LEFT_OUT = (JoinSpanned.finish_reason, TooLong.finish_reason)
SUMMARY_KEYS = (*EVALUATION_KEYS, "task", "protocol", "template", "metric")


def frame_of_rows(rows: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    """Rows as a frame of the declared schema."""
    return pl.DataFrame(rows, schema=SCHEMA, strict=True)


def frame_path(frames: Path, run: str, task: str, evaluation_id: str, protocol: str) -> Path:
    """Where the rows of one evaluation of one task under one protocol are."""
    return frames / f"run={run}" / f"task={task}" / f"{evaluation_id}--{protocol}.parquet"


def write_frame(frame: pl.DataFrame, path: Path, *, metadata: dict[str, str] | None = None) -> None:
    """Writes a Parquet file, and the folder it is in, so that it is there whole or not at all.

    What the path says (`run=…/task=…`) is no column of the file: pandas and pyarrow read partition keys as dictionaries
    and refuse a folder whose files have them as strings too.

    Raises:
        CheckpointError: the file system refused; what was there is untouched.

    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # In memory first: a file has at most some ten thousand rows, and what is renamed into place is complete.
    buffer = io.BytesIO()
    said_by_path = {folder.name.partition("=")[0] for folder in (path.parent, path.parent.parent)}
    frame.drop(said_by_path & {*_HIVE}).write_parquet(buffer, metadata=metadata)
    write_durably(path, buffer.getvalue())


def read(frames: Path) -> pl.LazyFrame:
    """All rows below a folder, lazily; filters on `run` and `task` open only the files that match."""
    files = sorted(frames.glob("run=*/task=*/*.parquet"))
    if not files:
        return SCHEMA.to_frame(eager=False)
    if "=" in str(frames.resolve()):
        return read_files(files)
    return pl.scan_parquet(
        frames / "run=*" / "task=*" / "*.parquet", hive_partitioning=True, hive_schema=_HIVE, glob=True
    ).select(list(SCHEMA))


def chance_levels(frames: Path, run: str) -> dict[tuple[str, str], float]:
    """What guessing scores, by task and protocol, as `CHANCE_LEVEL` of the files' metadata says."""
    levels = {}
    for path in frames.glob(f"run={run}/task=*/*.parquet"):
        said = pl.read_parquet_metadata(path).get(CHANCE_LEVEL)
        if said is not None:
            levels[path.parent.name.partition("=")[2], path.stem.rpartition("--")[2]] = float(said)
    return levels


@contextmanager
def naming_unreadable(frames: Path) -> Iterator[None]:
    """Says which file is no file of rows, where Polars only says that one is not.

    Raises:
        DataError: names the file and what to do.

    """
    try:
        yield
    except pl.exceptions.PolarsError as error:
        for path in sorted(frames.glob("run=*/task=*/*.parquet")):
            try:
                pl.read_parquet_schema(path)
            except (pl.exceptions.PolarsError, OSError) as reason:
                raise DataError(f"{path} cannot be read ({reason}); remove it and evaluate again", "frames") from error
        raise


def read_files(paths: Sequence[Path]) -> pl.LazyFrame:
    """The rows of these files alone, lazily; what else lies beside them is not opened."""
    # Not by Polars' own partition keys: it takes every `name=value` of a path for one, a folder's above ours too.
    return pl.concat([_scan(path) for path in paths])


def _scan(path: Path) -> pl.LazyFrame:
    run, task = (pl.lit(folder.name.partition("=")[2]) for folder in (path.parent.parent, path.parent))
    return pl.scan_parquet(path, hive_partitioning=False).with_columns(run=run, task=task).select(list(SCHEMA))


def summarize(rows: pl.LazyFrame) -> pl.LazyFrame:
    """Per evaluation, task and protocol: `score`, `standard_error`, `n`, counts of items and the other scores' means.

    Scores are means over the items that have one, in [0, 1], where an item that was answered several times (protocol
    `open`) is the mean of its answers; the standard error is the sample standard deviation of the items over the
    square root of n. Items are counted apart that `failed`, whose output was `cut_off` at its length limit or is
    `unparsable`, and that their protocol leaves out: `join_spanned` (no token of a choice is its own), `too_long`.
    An item counts if any of its answers does.
    """
    means = [pl.col(name).mean() for name in ("score", "score_corrected", "score_normalized")]
    counts = ("failed", "cut_off", "unparsable", *LEFT_OUT)
    reason = pl.col("finish_reason")
    marked = rows.with_columns(
        failed=(pl.col("error") != "") & ~reason.is_in(LEFT_OUT),
        cut_off=reason == "length",
        unparsable=pl.col("extracted") == "",
        **{name: reason == name for name in LEFT_OUT},
    )
    items = marked.group_by(*SUMMARY_KEYS, "item_id").agg(
        *means, pl.col(*counts).any(), pl.col("output_tokens", "seconds").sum()
    )
    score = pl.col("score")
    return (
        items.group_by(SUMMARY_KEYS)
        .agg(
            score.mean(),
            (score.std() / score.count().sqrt()).alias("standard_error"),
            score.count().alias("n"),
            pl.col(*counts).sum(),
            *means[1:],
            pl.col("output_tokens", "seconds").sum(),
        )
        .sort(SUMMARY_KEYS)
    )


def without_scores(rows: pl.LazyFrame) -> list[str]:
    """What was evaluated for nothing: a sentence for each task and protocol none of whose items could be scored.

    An item that was answered and has no reference to compare with (Vicuna's bare questions) did not fail.
    """
    keys = [*EVALUATION_KEYS, "task", "protocol"]
    unscored = (
        rows.group_by(keys, maintain_order=True)
        .agg(pl.len(), pl.col("score").count(), first=pl.col("error").filter(pl.col("error") != "").first())
        .filter(pl.col("score") == 0, pl.col("first").is_not_null())
        .collect()
    )
    return [
        f"{row['task']}:{row['protocol']} of {row['student']}: none of {row['len']} rows has a score; the first says: "
        f"{row['first']}"
        for row in unscored.to_dicts()
    ]
