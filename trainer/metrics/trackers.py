"""Copies of the metrics for trackers: TensorBoard, Weights & Biases, Trackio.

A tracker never holds the training up: rows wait in a bounded queue for a thread of the tracker's own, a row that
finds it full is left out, and a tracker that fails is given up with a warning. The files of `metrics` are complete
whatever happens here.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tutelage.errors import ConfigurationError

Values = Mapping[str, float]
Log = Callable[[int, Values], None]
"""Takes a step and its values."""
Finish = Callable[[], None]

_log = logging.getLogger(__name__)
_PROJECT = "tutelage"
_QUEUED_ROWS = 1000
_CLOSING_SECONDS = 10.0


def open_trackers(names: Sequence[str], folder: Path) -> list[Tracker]:
    """A running tracker for each name.

    Args:
        names: of `config.student.TrackerName`.
        folder: the student's; its name is that of the run, and what a tracker keeps locally is below it.

    Raises:
        ConfigurationError: a tracker's package is not installed.

    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigurationError(
                f"{name} is not installed here; pip install {name}, or leave it out: metrics.jsonl and metrics.parquet "
                "have everything",
                "report_to",
            )
    return [Tracker(name, _OPENERS[name], folder) for name in names]


class Tracker:
    """One tracker and its thread.

    Args:
        name: for messages.
        opener: connects to the tracker, which may take its time.
        folder: the student's.

    """

    def __init__(self, name: str, opener: Callable[[Path], tuple[Log, Finish]], folder: Path) -> None:
        self._name, self._opener, self._folder = name, opener, folder
        self._rows: queue.Queue[tuple[int, Values] | None] = queue.Queue(_QUEUED_ROWS)
        self._dropped = 0
        self._thread = threading.Thread(target=self._run, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def write(self, row: Mapping[str, float | int | str]) -> None:
        """Hands over a row of metrics, or drops it if the tracker is far behind."""
        values = {key: float(value) for key, value in row.items() if "/" in key}
        try:
            self._rows.put_nowait((int(row["step"]), values))
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Gives the tracker ten seconds for what is left."""
        try:
            self._rows.put(None, timeout=_CLOSING_SECONDS if self._thread.is_alive() else 0.0)
        except queue.Full:
            self._dropped += self._rows.qsize()
        else:
            self._thread.join(_CLOSING_SECONDS)
        if self._dropped:
            _log.warning("%s missed %d rows; metrics.jsonl has them", self._name, self._dropped)

    def _run(self) -> None:
        try:
            log, finish = self._opener(self._folder)
            while (item := self._rows.get()) is not None:
                log(*item)
            finish()
        except Exception as error:
            _log.warning("%s is given up: %r; metrics.jsonl has everything", self._name, error)


def _open_tensorboard(folder: Path) -> tuple[Log, Finish]:
    writer: Any = importlib.import_module("torch.utils.tensorboard").SummaryWriter(folder / "tensorboard")

    def log(step: int, values: Values) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return log, writer.close


def _open_wandb(folder: Path) -> tuple[Log, Finish]:
    run: Any = importlib.import_module("wandb").init(project=_PROJECT, name=folder.name, dir=folder)
    return lambda step, values: run.log(dict(values), step=step), run.finish


def _open_trackio(folder: Path) -> tuple[Log, Finish]:
    trackio: Any = importlib.import_module("trackio")
    trackio.init(project=_PROJECT, name=folder.name, resume="allow")
    return lambda step, values: trackio.log(dict(values), step=step), trackio.finish


_OPENERS: Mapping[str, Callable[[Path], tuple[Log, Finish]]] = {
    "tensorboard": _open_tensorboard,
    "wandb": _open_wandb,
    "trackio": _open_trackio,
}
