"""The workers: threads that take evaluations from the queue, each running one after the other."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from tutelage.errors import TutelageError
from tutelage.evaluator.config import EvaluationSettings
from tutelage.evaluator.models.base import Engine
from tutelage.evaluator.results.frames import read, summarize
from tutelage.evaluator.runner.evaluation import Progress, Stopped, evaluate, forget
from tutelage.evaluator.service.queue import Entry, Queue, Score

_logger = logging.getLogger(__name__)


class Workers:
    """Run a queue until they are stopped; they stop between two batches.

    Args:
        queue: what to do.
        settings: how.
        frames: folder of the frames.
        count: threads; each has a model of its own in memory while it works.
        engines: opens a checkpoint; by default as the settings say.

    """

    def __init__(
        self,
        queue: Queue,
        settings: EvaluationSettings,
        frames: Path,
        count: int = 1,
        engines: Callable[[Path], Engine] | None = None,
    ) -> None:
        self._queue, self._settings, self._frames, self._engines = queue, settings, frames, engines
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, name=f"evaluator-worker-{number}", daemon=True)
            for number in range(count)
        ]

    def start(self) -> None:
        """Begins with the oldest queued evaluations."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Waits until the batches at hand are on disk, and ends the threads."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while not self._stopping.is_set():
            entry = self._queue.take(timeout_seconds=0.2)
            if entry is not None:
                self._work(entry)

    def _work(self, entry: Entry) -> None:
        evaluation = entry.evaluation
        _logger.info("evaluating %s", evaluation.evaluation_id)

        def note(progress: Progress) -> None:
            self._queue.change(
                evaluation.evaluation_id,
                items_done=progress.done,
                items_total=progress.total,
                items_failed=progress.failed,
                items_per_second=progress.items_per_second,
                seconds_left=progress.seconds_left,
            )

        def should_stop() -> bool:
            return self._stopping.is_set() or self._queue.get(evaluation.evaluation_id).ended

        try:
            evaluate(
                evaluation,
                self._settings,
                self._frames,
                on_progress=note,
                should_stop=should_stop,
                engines=self._engines,
            )
        except Stopped:
            if self._queue.change(evaluation.evaluation_id, state="queued").ended:
                _logger.info("cancelled %s", evaluation.evaluation_id)
                forget(self._frames, evaluation.evaluation_id)
        except TutelageError as error:
            self._fail(evaluation.evaluation_id, str(error))
        except Exception as error:  # One evaluation that cannot run must not end the service.
            _logger.exception("%s failed", evaluation.evaluation_id)
            self._fail(evaluation.evaluation_id, f"{type(error).__name__}: {error}")
        else:
            scores = scores_of(self._frames, evaluation.labels.run, evaluation.evaluation_id)
            self._queue.change(evaluation.evaluation_id, state="done", seconds_left=0.0, scores=scores)

    def _fail(self, evaluation_id: str, error: str) -> None:
        _logger.warning("%s failed: %s", evaluation_id, error)
        forget(self._frames, evaluation_id)
        self._queue.change(evaluation_id, state="failed", seconds_left=0.0, error=error)


def scores_of(frames: Path, run: str, evaluation_id: str) -> tuple[Score, ...]:
    """Mean scores of an evaluation, derived from its rows; 0 where every item failed."""
    rows = read(frames).filter(run=run, evaluation_id=evaluation_id)
    return tuple(
        Score(
            task=row["task"],
            protocol=row["protocol"],
            metric=row["metric"],
            score=row["score"] or 0.0,
            standard_error=row["standard_error"] or 0.0,
            items=row["n"],
        )
        for row in summarize(rows).collect().to_dicts()
    )
