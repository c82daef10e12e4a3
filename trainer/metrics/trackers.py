"""Copies of the metrics for trackers: TensorBoard, Weights & Biases, Trackio.

A tracker never holds the training up: rows wait in a bounded queue for a thread of the tracker's own, a row that
finds it full is left out, and a tracker that fails is given up with a warning. The files of `metrics` are complete
whatever happens here.

A training that was killed repeats the steps since its last checkpoint, with the same numbers. A tracker sees each step
once all the same, in one run: `trackers/<name>.json` in the student's folder keeps the run's id and the last step that
was sent.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import queue
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tutelage.errors import ConfigurationError
from tutelage.files import write_atomically

Values = Mapping[str, float]
Log = Callable[[int, Values], None]
"""Takes a step and its values."""
Finish = Callable[[], None]

_log = logging.getLogger(__name__)
_PROJECT = "tutelage"
_QUEUED_ROWS = 1000
# At the end of a training, which has saved by then: a network that hangs delays the next student by so much.
_CLOSING_SECONDS = 10.0


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker shows of one training."""

    training: str
    """Digest of what is trained; another training in the same folder is another run."""
    run_id: str
    last_step: int = -1
    """The last step that was sent, by this process or by an earlier one."""


Opener = Callable[[Path, TrackedRun, int], tuple[Log, Finish]]
"""From the student's folder, the run, and the first step that is to come; takes its time to connect."""


def open_trackers(names: Sequence[str], folder: Path, *, training: str, next_step: int) -> list[Tracker]:
    """A running tracker for each name.

    Args:
        names: of `config.student.TrackerName`.
        folder: the student's; its name is that of the run, and what a tracker keeps locally is below it.
        training: digest of what is trained.
        next_step: the first step whose row is to come; rows of it and of later ones may have been sent before.

    Raises:
        ConfigurationError: a tracker's package is not installed.

    """
    for name in names:
        # Looked for, not imported: importing is slow, and the tracker's own thread does it.
        if importlib.util.find_spec(name) is None:
            raise ConfigurationError(
                f"{name} is not installed here; pip install {name}, or leave it out: metrics.jsonl and metrics.parquet "
                "have everything",
                "report_to",
            )
    return [Tracker(name, _OPENERS[name], folder, training=training, next_step=next_step) for name in names]


class Tracker:
    """One tracker and its thread.

    Args:
        name: for messages.
        opener: connects to the tracker.
        folder: the student's.
        training: digest of what is trained.
        next_step: the first step whose row is to come.

    """

    def __init__(self, name: str, opener: Opener, folder: Path, *, training: str, next_step: int) -> None:
        self._name, self._opener, self._folder = name, opener, folder
        self._training, self._next_step = training, next_step
        self._rows: queue.Queue[tuple[int, Values] | None] = queue.Queue(_QUEUED_ROWS)
        self._dropped = 0
        # A daemon: one that hangs must not keep the process from ending.
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
            path = self._folder / "trackers" / f"{self._name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            tracked = TrackedRun(**json.loads(path.read_bytes())) if path.exists() else None
            if tracked is None or tracked.training != self._training:
                tracked = TrackedRun(self._training, secrets.token_hex(4))
            log, finish = self._opener(self._folder, tracked, self._next_step)
            while (item := self._rows.get()) is not None:
                step, values = item
                if step > tracked.last_step or self._name in _FORGETS:
                    # Noted first: a kill between the two costs the tracker a row, and never gives it one twice.
                    tracked = replace(tracked, last_step=max(step, tracked.last_step))
                    write_atomically(path, json.dumps(asdict(tracked)))
                    log(step, values)
            finish()
        except Exception as error:  # Whatever a tracker raises, of its network or of its own: no training ends of it.
            _log.warning("%s is given up: %r; metrics.jsonl has everything", self._name, error)


def open_tensorboard(folder: Path, _tracked: TrackedRun, next_step: int) -> tuple[Log, Finish]:
    """Event files below the student's folder.

    Each process writes a file of its own. `purge_step` has readers leave out what earlier ones say of that step and of
    later ones, and those rows are sent again: the killed writer's buffer, two minutes of them, never reached its file.
    """
    module: Any = importlib.import_module("torch.utils.tensorboard")
    writer = module.SummaryWriter(folder / "tensorboard", purge_step=next_step)

    def log(step: int, values: Values) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return log, writer.close


def open_wandb(folder: Path, tracked: TrackedRun, _next_step: int) -> tuple[Log, Finish]:
    """A run of Weights & Biases that goes on under its id; without one, every process would begin another run."""
    run: Any = importlib.import_module("wandb").init(
        project=_PROJECT, name=folder.name, id=tracked.run_id, resume="allow", dir=folder
    )
    return lambda step, values: run.log(dict(values), step=step), run.finish


def open_trackio(folder: Path, tracked: TrackedRun, _next_step: int) -> tuple[Log, Finish]:
    """A run of Trackio, which knows runs by their names alone: students of one id in two cohorts must not share one."""
    trackio: Any = importlib.import_module("trackio")
    trackio.init(project=_PROJECT, name=f"{folder.name}-{tracked.run_id}", resume="allow")
    return lambda step, values: trackio.log(dict(values), step=step), trackio.finish


_OPENERS: Mapping[str, Opener] = {"tensorboard": open_tensorboard, "wandb": open_wandb, "trackio": open_trackio}
_FORGETS = ("tensorboard",)
"""Trackers that forget the steps from `next_step` on when they are opened."""
