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
from typing import Any

from tutelage.errors import CheckpointError
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
        CheckpointError: the file system refused, or the lines that count are not all there; all methods raise it.

    """

    def __init__(self, folder: Path, *, offset_bytes: int, trackers: Sequence[Tracker] = ()) -> None:
        self._path, self._trackers = folder / "metrics.jsonl", trackers
        with reporting_disk_errors(self._path):
            folder.mkdir(parents=True, exist_ok=True)
            content = self._path.read_bytes() if self._path.exists() else b""
            # `truncate` would make a file that is too short as long as it is told to, with zeros.
            if len(content) < offset_bytes or content[:offset_bytes][-1:] not in (b"", b"\n"):
                raise CheckpointError(
                    f"{self._path} has {len(content)} bytes, and the newest checkpoint counts on {offset_bytes} of "
                    "whole lines: somebody cut it. Put the file back, or begin a new run in another output folder"
                )
            # All of them, since the first save will need them all: what is damaged is better known before a step.
            self._newest = self._rows(content[:offset_bytes])[-1:]
            self._stream = self._path.open("ab")
            self._stream.truncate(offset_bytes)
            self._stream.seek(0, os.SEEK_END)

    @property
    def newest(self) -> dict[str, float]:
        """The values of the last row that counted when the log was opened; empty if there was none."""
        return {key: value for row in self._newest for key, value in row.items() if "/" in key}

    def append(self, row: Row) -> None:
        """Adds a row and hands it to the operating system, so that readers see it now."""
        with reporting_disk_errors(self._path):
            self._stream.write(json.dumps(row).encode() + b"\n")
            # No fsync before `commit`: a row that the machine's crash takes belongs to a step that is done again.
            self._stream.flush()
        for tracker in self._trackers:
            tracker.write(row)

    def commit(self) -> int:
        """Makes all rows durable, brings the Parquet file up to date, and returns the length in bytes."""
        import polars  # A quarter of a second that a restarted student does not wait for before its first step.

        with reporting_disk_errors(self._path):
            os.fsync(self._stream.fileno())
        rows = self._rows(self._path.read_bytes())
        if rows:
            buffer = io.BytesIO()
            # From all rows: held-out columns are in every tenth at most, and Polars would look at a hundred.
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

    def _rows(self, content: bytes) -> list[dict[str, Any]]:
        rows = []
        for number, line in enumerate(content.split(b"\n")[:-1], 1):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise CheckpointError(
                    f"{self._path}, line {number} is not a row of metrics: {error}. Put the file back, or begin a new "
                    "run in another output folder"
                ) from error
        return rows
