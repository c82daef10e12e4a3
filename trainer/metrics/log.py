"""Metrics on disk: one JSON line a step, each step once, however often the training was interrupted.

A checkpoint remembers how long the file was; resuming cuts it back to that length, so the steps that are
done again are written again and none is there twice. The Parquet form is made from the lines.
Trackers get copies.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from tutelage.files import reporting_disk_errors, write_durably
from tutelage.trainer.metrics.trackers import Tracker

Row = Mapping[str, float | int | str]


class MetricsLog:
    """`metrics.jsonl` and `metrics.parquet` in a student's folder.

    Args:
        folder: the student's.
        offset_bytes: length of the lines that count; what follows is cut off.
        trackers: get copies, and are closed with the file.

    Raises:
        CheckpointError: the file system refused; all methods raise it.

    """

    def __init__(self, folder: Path, *, offset_bytes: int, trackers: Sequence[Tracker] = ()) -> None:
        self._path, self._trackers = folder / "metrics.jsonl", trackers
        with reporting_disk_errors(self._path):
            folder.mkdir(parents=True, exist_ok=True)
            self._stream = self._path.open("ab")
            self._stream.truncate(offset_bytes)
            self._stream.seek(0, os.SEEK_END)

    def append(self, row: Row) -> None:
        """Adds a row and hands it to the operating system, so that readers see it now."""
        with reporting_disk_errors(self._path):
            self._stream.write(json.dumps(row).encode() + b"\n")
            self._stream.flush()
        for tracker in self._trackers:
            tracker.write(row)

    def commit(self) -> int:
        """Makes all rows durable, brings the Parquet file up to date, and returns the length in bytes."""
        import polars  # A quarter of a second that a restarted student does not wait for before its first step.

        with reporting_disk_errors(self._path):
            os.fsync(self._stream.fileno())
        rows = [json.loads(line) for line in self._path.read_text(encoding="utf-8").splitlines()]
        if rows:
            buffer = io.BytesIO()
            polars.DataFrame(rows, infer_schema_length=None).write_parquet(buffer)
            write_durably(self._path.with_suffix(".parquet"), buffer.getvalue())
        return self._stream.tell()

    def close(self) -> None:
        """Closes the file."""
        for tracker in self._trackers:
            tracker.close()
        with reporting_disk_errors(self._path):  # What could not be written is tried once more.
            self._stream.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
