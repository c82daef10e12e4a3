"""One checkpoint on some tasks: batches in a fixed order, each durable when it is done, one frame a task.

Finished batches lie in `<frames>.unfinished/`, beside the frames, until their task is complete. Evaluating again after
a crash takes them as they are and does the rest, so that no item is done twice and none is missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import polars as pl

from tutelage import __version__
from tutelage.data.hub import local_model
from tutelage.errors import ConfigurationError, TutelageError
from tutelage.evaluator.config import EvaluationSettings
from tutelage.evaluator.models.base import Engine
from tutelage.evaluator.models.registry import open_engine
from tutelage.evaluator.protocols import PROTOCOLS
from tutelage.evaluator.protocols.base import LeftOut, Question
from tutelage.evaluator.results import frames as fr
from tutelage.evaluator.runner.checkpoint import pin, verified_digest
from tutelage.evaluator.runner.labels import refuse_other_rows_of_the_same_labels
from tutelage.evaluator.runner.requests import Evaluation, TaskRequest, check
from tutelage.evaluator.scoring.extraction import RULES_VERSION
from tutelage.evaluator.tasks import task_of_name
from tutelage.evaluator.tasks.base import Item, Task, default_data_dir

_PINNED = "checkpoint"
_logger = logging.getLogger(__name__)


class Stopped(Exception):
    """The evaluation was asked to stop; what is done is on disk."""


@dataclass(frozen=True)
class Progress:
    """How far an evaluation is; `resumed` of the items done were done before this start."""

    done: int
    total: int
    failed: int
    resumed: int
    seconds: float

    @property
    def items_per_second(self) -> float:
        """Since this start; 0 while unknown."""
        return (self.done - self.resumed) / self.seconds if self.seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float:
        """Estimate; negative while unknown."""
        if self.done == self.total:
            return 0.0
        return (self.total - self.done) / self.items_per_second if self.items_per_second > 0 else -1.0


def evaluate(
    evaluation: Evaluation,
    settings: EvaluationSettings,
    frames: Path,
    *,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
    engines: Callable[[Path], Engine] | None = None,
) -> list[Path]:
    """Runs what is missing of an evaluation and returns the files of its rows, one a task and protocol.

    Args:
        evaluation: what to do.
        settings: how.
        frames: folder of the frames.
        on_progress: told after each batch.
        should_stop: asked before each batch.
        engines: opens a checkpoint; by default as the settings say.

    Raises:
        CheckpointError: the checkpoint is not one, or not what its manifest says.
        Conflict: rows of another checkpoint have the same labels.
        DataError: a task's data is missing.
        Stopped: `should_stop` said so.

    """
    evaluation = check(evaluation)
    try:
        return _evaluate(evaluation, settings, frames, on_progress, should_stop, engines)
    except Stopped:  # of a service that goes on later, when the checkpoint may have been removed
        raise
    except BaseException:
        parts = parts_of(frames, evaluation)
        shutil.rmtree(parts / _PINNED, ignore_errors=True)
        _remove_empty(parts)
        raise


def _evaluate(
    evaluation: Evaluation,
    settings: EvaluationSettings,
    frames: Path,
    on_progress: Callable[[Progress], None],
    should_stop: Callable[[], bool],
    engines: Callable[[Path], Engine] | None,
) -> list[Path]:
    checkpoint = local_model(pinned(evaluation, frames), "checkpoint")
    digest = verified_digest(checkpoint)
    refuse_other_rows_of_the_same_labels(evaluation, digest, frames)
    data_dir = settings.data_dir or default_data_dir()
    work = [_TaskWork(evaluation, settings, frames, request, digest, data_dir) for request in evaluation.tasks]
    counter = _Counter(total=sum(one.count for one in work), on_progress=on_progress)
    engine: Engine | None = None
    try:
        for one in work:
            if one.is_done():
                counter.add(pl.read_parquet(one.path, columns=["finish_reason"]), resumed=True)
                continue
            if engine is None:
                engine = engines(checkpoint) if engines else _open(checkpoint, settings)
            one.run(engine, counter, should_stop)
    finally:
        if engine is not None:
            engine.close()
    forget(frames, evaluation)
    return [one.path for one in work]


def _open(checkpoint: Path, settings: EvaluationSettings) -> Engine:
    return open_engine(settings.engine, checkpoint, dtype=settings.dtype, batch_size=settings.engine_batch_size)


def parts_of(frames: Path, evaluation: Evaluation) -> Path:
    """Folder of what an evaluation has finished, and of its pinned checkpoint.

    Two evaluations of other tasks may share an id (a command's id leaves its tasks out, so that a further task joins
    the rows that are there) and run at the same time; each has its own folder.
    """
    tasks = hashlib.sha256(json.dumps([asdict(task) for task in evaluation.tasks]).encode()).hexdigest()
    return unfinished_of(frames) / evaluation.evaluation_id / tasks[:16]


def unfinished_of(frames: Path) -> Path:
    """The folder beside the frames of what is not done yet: the frames' own holds nothing but frames."""
    return frames.resolve().with_name(f"{frames.resolve().name}.unfinished")


def pinned(evaluation: Evaluation, frames: Path) -> Path:
    """Where the evaluation's checkpoint stays until it has ended.

    Raises:
        CheckpointError: it went away in this moment.

    """
    return pin(evaluation.checkpoint, parts_of(frames, evaluation) / _PINNED)


def forget(frames: Path, evaluation: Evaluation) -> None:
    """Removes the finished batches of an evaluation that has ended, and unpins its checkpoint."""
    parts = parts_of(frames, evaluation)
    shutil.rmtree(parts, ignore_errors=True)
    _remove_empty(parts)


def _remove_empty(parts: Path) -> None:
    # The folder above them stays: another evaluation may be about to make its own in it.
    with contextlib.suppress(OSError):  # parts are there, or another evaluation's of this id, or there never were any
        for folder in (parts, parts.parent):
            if folder.exists():
                folder.rmdir()


@dataclass
class _Counter:
    total: int
    on_progress: Callable[[Progress], None]
    progress: Progress = field(init=False)
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.progress = Progress(0, self.total, 0, 0, 0.0)

    def add(self, rows: pl.DataFrame, *, resumed: bool = False) -> None:
        self.progress = replace(
            self.progress,
            done=self.progress.done + len(rows),
            failed=self.progress.failed + int((rows["finish_reason"] == "error").sum()),
            resumed=self.progress.resumed + len(rows) * resumed,
            seconds=time.monotonic() - self.started,
        )
        self.on_progress(self.progress)


class _TaskWork:
    """One task under one protocol: its items, its parts on disk, its frame."""

    def __init__(
        self,
        evaluation: Evaluation,
        settings: EvaluationSettings,
        frames: Path,
        request: TaskRequest,
        checkpoint_digest: str,
        data_dir: Path | None,
    ) -> None:
        self.evaluation, self.settings, self.checkpoint_digest = evaluation, settings, checkpoint_digest
        self.task: Task = task_of_name(request.task)
        self.name = request.protocol
        self.protocol = PROTOCOLS[request.protocol]
        self.items = self.task.items(data_dir, request.limit)
        self.seeds = self.protocol.seeds_of(evaluation.seed)
        self.count = len(self.items) * len(self.seeds)
        self.digest = self._work_digest()
        self.path = fr.frame_path(
            frames, evaluation.labels.run, self.task.name, evaluation.evaluation_id, request.protocol
        )
        self.parts = parts_of(frames, evaluation) / f"{self.task.name}--{self.name}--{self.digest[:16]}"

    def _work_digest(self) -> str:
        """Of everything that decides a row, so that finished work is taken over only if it is this work."""
        settings = self.settings.model_dump(mode="json", include=set(EvaluationSettings.model_fields) - {"data_dir"})
        content = [
            __version__,
            asdict(self.evaluation.labels),
            self.evaluation.seed,
            str(self.evaluation.checkpoint),
            self.checkpoint_digest,
            self.task.name,
            self.task.version,
            RULES_VERSION,
            self.name,
            settings,
            [item.item_hash for item in self.items],
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def is_done(self) -> bool:
        """Whether the rows are there; what cannot be read, or has an error in every row, is done again."""
        if not self.path.exists():
            return False
        try:
            same = pl.read_parquet_metadata(self.path).get("tutelage.work") == self.digest
            return same and not fr.without_scores(fr.read_files([self.path]))
        except pl.exceptions.PolarsError as error:
            _logger.warning("%s cannot be read and is written anew: %s", self.path, error)
            return False

    def run(self, engine: Engine, counter: _Counter, should_stop: Callable[[], bool]) -> None:
        questions, failures = self._questions(engine)
        rows = [fr.frame_of_rows(failures)]
        if failures:
            counter.add(rows[0])
        size = engine.batch_size
        for index, start in enumerate(range(0, len(questions), size)):
            part = self.parts / f"{index:05}.parquet"
            finished = _finished(part)
            if finished is not None:
                rows.append(finished)
                counter.add(finished, resumed=True)
                continue
            if should_stop():
                raise Stopped
            rows.append(self._answer(questions[start : start + size], engine))
            fr.write_frame(rows[-1], part)
            counter.add(rows[-1])
        # Ids are text in the rows; as text, 10 would stand before 2.
        frame = pl.concat(rows).sort(pl.col("item_id").cast(pl.UInt32), "seed")
        chance = str(self.task.chance(self.name))
        fr.write_frame(frame, self.path, metadata={"tutelage.work": self.digest, fr.CHANCE_LEVEL: chance})

    def _questions(self, engine: Engine) -> tuple[list[Question], list[dict[str, Any]]]:
        """Questions, shortest first, and the rows of the items that cannot be asked."""
        questions, failures = [], []
        for item, seed in product(self.items, self.seeds):
            try:
                questions.append(self.protocol.prepare(self.task, item, engine, self.settings, seed))
            except ConfigurationError:
                raise
            except TutelageError as error:
                failures.append(self._row(item, seed, "", engine, 0.0, _failure(error)))
        # Of like length in a batch, so that little is padding; `sorted` is stable, so batches are cut alike every time.
        return sorted(questions, key=lambda question: question.tokens), failures

    def _answer(self, batch: Sequence[Question], engine: Engine) -> pl.DataFrame:
        started = time.perf_counter()
        answers = list(self._surviving(batch, engine))
        seconds = (time.perf_counter() - started) / len(batch)
        return fr.frame_of_rows(
            [
                self._row(question.item, question.seed, question.prompt_hash, engine, seconds, answer)
                for question, answer in zip(batch, answers, strict=True)
            ]
        )

    def _surviving(self, batch: Sequence[Question], engine: Engine) -> Iterator[dict[str, Any]]:
        """The batch's answers; if it fails, each item's alone, so that one bad item costs only itself."""
        try:
            yield from self.protocol.answer(self.task, batch, engine, self.settings)
        except ConfigurationError:  # an engine that cannot do this at all; no item's fault either
            raise
        # What torch, tokenizers and a task's own functions raise for an item. An OSError is none: a full disk, or
        # vLLM's process gone (Unreachable), would fail every further item as well.
        except (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError) as error:
            if len(batch) == 1:
                _logger.warning("item %s of %s failed: %r", batch[0].item.item_id, self.task.name, error)
                yield _failure(error)
                return
            for question in batch:
                yield from self._surviving([question], engine)

    def _row(
        self, item: Item, seed: int, prompt_hash: str, engine: Engine, seconds: float, answer: dict[str, Any]
    ) -> dict[str, Any]:
        return {
            **dict.fromkeys(fr.SCHEMA),
            **asdict(self.evaluation.labels),
            "evaluation_id": self.evaluation.evaluation_id,
            "checkpoint": str(self.evaluation.checkpoint),
            "checkpoint_digest": self.checkpoint_digest,
            "task": self.task.name,
            "task_version": self.task.version,
            "protocol": self.name,
            "template": self.protocol.template_of(self.settings),
            "engine": engine.name,
            "dtype": engine.dtype,
            "seed": seed,
            "item_id": item.item_id,
            "item_hash": item.item_hash,
            "prompt_hash": prompt_hash,
            "target": item.target,
            "metric": self.protocol.METRIC,
            "seconds": seconds,
            "error": "",
            **answer,
        }


def _failure(error: Exception) -> dict[str, Any]:
    reason = error.finish_reason if isinstance(error, LeftOut) else "error"
    return {"finish_reason": reason, "error": f"{type(error).__name__}: {error}"}


def _finished(part: Path) -> pl.DataFrame | None:
    """Rows of a batch that an earlier start finished; None if there are none that can be read."""
    if not part.exists():
        return None
    try:
        return pl.read_parquet(part)
    except pl.exceptions.PolarsError as error:
        _logger.warning("%s cannot be read and is done again: %s", part, error)
        return None
