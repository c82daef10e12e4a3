"""The workers: threads that take evaluations from the queue, each running one after the other."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import polars as pl

from tutelage.errors import TutelageError
from tutelage.evaluator.config import EvaluationSettings
from tutelage.evaluator.models.base import Engine
from tutelage.evaluator.results.frames import read_files, summarize, without_scores
from tutelage.evaluator.runner.evaluation import Progress, Stopped, evaluate, forget
from tutelage.evaluator.runner.requests import Evaluation
from tutelage.evaluator.service.queue import Queue, Score, State

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
            # Daemons: an interpreter that ends without `stop` must not wait for a batch of minutes. Parts are durable.
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

    @property
    def all_alive(self) -> bool:
        """Whether every thread that was started still works; one ends only if the queue cannot be written."""
        return all(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                # Short, because `stop` is only seen between two waits.
                entry = self._queue.take(timeout_seconds=0.2)
                if entry is not None:
                    self._work(entry.evaluation)
        except Exception:
            # What an evaluation raises ends that evaluation (see `_work`); here the queue itself cannot be written.
            _logger.exception("this worker cannot go on; the service is no longer healthy")

    def _work(self, evaluation: Evaluation) -> None:
        name = evaluation.evaluation_id
        _logger.info("evaluating %s", name)

        def note(progress: Progress) -> None:
            self._queue.change(
                name,
                items_done=progress.done,
                items_total=progress.total,
                items_failed=progress.failed,
                items_per_second=progress.items_per_second,
                seconds_left=progress.seconds_left,
            )

        def should_stop() -> bool:
            return self._stopping.is_set() or self._queue.get(name).ended

        try:
            paths = evaluate(
                evaluation,
                self._settings,
                self._frames,
                on_progress=note,
                should_stop=should_stop,
                engines=self._engines,
            )
            scores, unscored = scores_of(paths), without_scores(read_files(paths))
        except Stopped:
            # An entry that was cancelled meanwhile has ended and stays so; one of a stopping service waits again.
            if self._queue.change(name, state="queued").ended:
                _logger.info("cancelled %s", name)
                forget(self._frames, evaluation)
        except Exception as error:  # Whatever it is, it ends this evaluation and not the service.
            reason = str(error) if isinstance(error, TutelageError) else f"{type(error).__name__}: {error}"
            _logger.warning("%s failed: %s", name, reason, exc_info=not isinstance(error, TutelageError))
            forget(self._frames, evaluation)
            self._queue.change(name, state="failed", seconds_left=0.0, error=reason)
        else:
            state: State = "failed" if unscored else "done"
            self._queue.change(name, state=state, seconds_left=0.0, scores=scores, error="; ".join(unscored))


def scores_of(paths: Sequence[Path]) -> tuple[Score, ...]:
    """Mean scores of the rows in an evaluation's own files, of the tasks that have any."""
    return tuple(
        Score(
            task=row["task"],
            protocol=row["protocol"],
            metric=row["metric"],
            score=row["score"],
            standard_error=row["standard_error"] or 0.0,
            items=row["n"],
        )
        for row in summarize(read_files(paths)).filter(pl.col("n") > 0).collect().to_dicts()
    )
