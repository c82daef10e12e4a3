"""A sampler whose writing is done elsewhere: Ray actors with copies of the student, which steps meanwhile.

A batch is cut into one share a writer, always the same way, and each share is written by whichever writer is free, with
the weights that the student had when it asked. So what is written depends on no clock and on nobody's death: what a
writer that died had begun is written again, by the same seeds, weights and share. No more shares wait than are in
`max_staleness` + 1 batches, since no more are begun.

Weights go through Ray's object store: in a node's shared memory, from which its writers compute, and to other nodes by
Ray's transfer of objects. Its tensor transports (`ray.experimental.rdt`, Ray 2.60) are not used: with gloo and NCCL
sender and receiver are members of one collective group, which nobody can join again after a restart, and a transfer
that fails ends both actors (`RDTManager._abort_transport`): a dead writer would take its student with it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from queue import PriorityQueue
from typing import Any

import numpy as np
import ray

from tutelage.errors import ConfigurationError, Conflict, TutelageError, as_known, one_line
from tutelage.trainer.config.student import StudentConfig
from tutelage.trainer.data.sequences import Completion, TokenIds
from tutelage.trainer.model.student import Student
from tutelage.trainer.rollout.base import OnPiece
from tutelage.trainer.rollout.student_copy import StudentWeights, digest_of
from tutelage.trainer.rollout.writer_actor import Pieces, Share, WriterActor

# So many writers may fail by one share; the next one would, too.
_ATTEMPTS = 3
_NAME_SECONDS, _POLL_SECONDS = 30.0, 0.2
_END_SECONDS = 30.0
_END = -1
_log = logging.getLogger(__name__)


@dataclass
class _Order:
    """A share that is to be written."""

    version: int
    """Of the weights: steps that they have seen."""
    weights: Any
    """In the object store, where they stay as long as an order has them."""
    share: Share
    on_piece: OnPiece | None
    written: Future[list[Completion]] = field(default_factory=Future)
    told: dict[int, int] = field(default_factory=dict)
    """Tokens of each index that were handed on, which may have been by a writer that died."""
    failures: int = 0


class Writers:
    """A `Sampler` that has others write; needs a connected Ray.

    Args:
        config: the student's, with `sampling.writers`.
        student: whose weights they take.

    Raises:
        ConfigurationError: this process is not part of a Ray.

    """

    def __init__(self, config: StudentConfig, student: Student) -> None:
        assert config.sampling.writers is not None
        if not ray.is_initialized():
            # Nor started here: half a dozen processes and ports that whoever calls a function did not ask for, and
            # whose end would be nobody's.
            raise ConfigurationError(
                "writers are actors of Ray, which this process is not connected to; train with `tutelage train`, call "
                "ray.init first, or leave them out",
                "sampling.writers",
            )
        self._config, self._student, self._count = config, student, config.sampling.writers.count
        self._version, self._weights = -1, None
        # By number, so that what is taken back is the next to be written.
        self._orders: PriorityQueue[tuple[int, _Order | None]] = PriorityQueue()
        self._numbers = count()
        self._open: set[Future[list[Completion]]] = set()
        self._closed = threading.Event()
        self._places: dict[int, str] = {}
        """Of each writer, as it answered last."""
        self._lost: list[TutelageError] = []
        """Of writers that are not started again, why."""
        self._actors = [self._started(number) for number in range(self._count)]
        self._threads = [
            threading.Thread(target=self._serve, args=(number, actor), name=f"writer-{number}", daemon=True)
            for number, actor in enumerate(self._actors)
        ]
        for thread in self._threads:
            thread.start()

    def write(
        self,
        step: int,
        indices: Sequence[int],
        prompts: Sequence[TokenIds],
        *,
        turn: int = 0,
        on_piece: OnPiece | None = None,
    ) -> Future[list[Completion]]:
        """As `Sampler.write`: asks for it, and returns at once."""
        allowed = self._config.sampling.max_staleness
        assert 0 <= step - self._version <= allowed, f"batch {step} of weights {self._version}, {allowed} older at most"
        orders = [
            _Order(
                self._version,
                self._weights,
                Share(step, [indices[at] for at in part], [prompts[at] for at in part], turn, on_piece is not None),
                on_piece,
            )
            for part in np.array_split(np.arange(len(indices)), self._count)
            if len(part)
        ]
        for order in orders:
            self._open.add(order.written)
            order.written.add_done_callback(self._open.discard)
            self._orders.put((next(self._numbers), order))
        self._end_if_all_are_lost()
        return _joined([order.written for order in orders])

    def take_weights(self, version: int) -> None:
        """As `Sampler.take_weights`; the first ones are also compared by a digest of all weights.

        Raises:
            TutelageError: a writer died of it.
            IdentityMismatch: a writer has, or makes, another model of them.
            ConfigurationError: a writer cannot write with this student.

        """
        if version == self._config.steps:
            return  # No batch follows.
        first = self._weights is None
        self._version, self._weights = version, ray.put(StudentWeights.of(self._student, version))
        if first:
            digest = digest_of(self._student.model)
            begun = [actor.begin.remote(self._weights, digest) for actor in self._actors]
            for number, ref in enumerate(begun):
                try:
                    ray.get(ref)
                except ray.exceptions.RayError as error:
                    self.close()
                    raise self._named(number, error) from error

    def close(self) -> None:
        """Ends the writers, and what they have begun."""
        self._closed.set()
        for future in list(self._open):
            future.cancel()
        for actor in self._actors:
            self._orders.put((_END, None))
            ray.kill(actor)
        deadline = time.monotonic() + _END_SECONDS
        for thread in self._threads:
            # Whoever waits for an answer of Ray's when it is shut down is ended by `SystemExit`, wherever it is.
            thread.join(max(0.0, deadline - time.monotonic()))

    def _name(self, number: int) -> str:
        return f"student-{self._config.id}-writer-{number}"

    def _started(self, number: int) -> Any:
        """A new actor. One of that name may be left of a student's process that has just died."""
        settings = self._config.sampling.writers
        assert settings is not None
        remote = ray.remote(WriterActor).options(  # type: ignore[attr-defined]
            name=self._name(number),
            num_cpus=settings.threads,
            num_gpus=settings.gpus,
            # What is too often is said of each share that is written, where it can be told who is to blame.
            max_restarts=-1,
        )
        end = time.monotonic() + _NAME_SECONDS
        while True:
            try:
                return remote.remote(self._config, number, self._student.end_ids, self._student.vocabulary_size)
            except ValueError as error:  # Ray has no class of its own for a name that is taken.
                if time.monotonic() > end:
                    raise Conflict(f"there is a {self._name(number)} already ({error}); end it first", "run") from error
                time.sleep(_POLL_SECONDS)

    def _serve(self, number: int, actor: Any) -> None:
        """One writer's thread: gives it one order after the other, and puts back what it could not fill."""
        there = self._is_there(number, actor)
        while there:
            place, order = self._orders.get()
            if order is None:
                return
            there = self._try(number, actor, place, order)
            del order  # It holds weights, which an idle thread would keep in the object store.

    def _try(self, number: int, actor: Any, place: int, order: _Order) -> bool:
        """Has an order filled, or written again by another; whether the writer is there then."""
        try:
            completions = self._filled(actor, order)
            with suppress(InvalidStateError):  # It was cancelled at the end.
                order.written.set_result(completions)
        except ray.exceptions.RayError as error:
            if self._closed.is_set():
                return False
            problem = self._named(number, error)
            order.failures += 1
            if order.failures < _ATTEMPTS:
                _log.warning("%s; what it had begun is written again", problem.message)
                self._orders.put((place, order))
            else:
                order.written.set_exception(problem)
            died = isinstance(error, ray.exceptions.RayActorError)
            if not died:
                ray.kill(actor, no_restart=False)  # What it has in memory is not what it should have.
            return self._is_there(number, actor, anew=not died)
        except Exception as error:  # Of whoever was told pieces; raised where the completions are asked for.
            order.written.set_exception(error)
        return True

    def _filled(self, actor: Any, order: _Order) -> list[Completion]:
        """What a writer writes of an order; hands on pieces of it meanwhile."""
        for ref in actor.write.remote(order.share, order.weights):
            answer: Pieces | list[Completion] = ray.get(ref)
            if isinstance(answer, list):
                return answer
            self._tell(order, answer)
        raise AssertionError("a writer ends with completions")

    def _tell(self, order: _Order, pieces: Pieces) -> None:
        for index, ids in pieces.items():
            if order.on_piece is not None and len(ids) > order.told.get(index, 0):
                order.told[index] = len(ids)
                order.on_piece(index, ids)

    def _is_there(self, number: int, actor: Any, *, anew: bool = False) -> bool:
        """Waits until a writer answers, `anew` as another process; whether it does, and this is not the end."""
        try:
            where = ray.get(actor.where.remote())
            # What was just killed answers on for a while, and would take the next share with it.
            while anew and where == self._places[number] and not self._closed.wait(_POLL_SECONDS):
                where = ray.get(actor.where.remote())
        except ray.exceptions.RayError as error:  # It is not started again: its place on the cluster is gone.
            if not self._closed.is_set():
                self._lost.append(self._named(number, error))
                _log.error("%s", self._lost[-1])
                self._end_if_all_are_lost()
            return False
        if self._places.get(number) != where:
            _log.info("%s is %s", self._name(number), where)
        self._places[number] = where
        return not self._closed.is_set()

    def _end_if_all_are_lost(self) -> None:
        if len(self._lost) == self._count:
            for future in list(self._open):
                with suppress(InvalidStateError):
                    future.set_exception(self._lost[-1])

    def _named(self, number: int, error: Exception) -> TutelageError:
        """What a writer raised, or that it died, with its name."""
        cause = getattr(error, "cause", None)
        if not isinstance(cause, Exception):  # Ray's first line says that it died, and the others what Ray knows of it.
            return TutelageError(f"{self._name(number)}: {str(error).partition(chr(10))[0]}", "sampling.writers")
        known = as_known(cause) or TutelageError(f"{type(cause).__name__}: {cause}")
        return type(known)(f"{self._name(number)}: {one_line(known.message)}", known.field)


def _joined(parts: Sequence[Future[list[Completion]]]) -> Future[list[Completion]]:
    """The results of all parts, one after the other; or the first error."""
    whole: Future[list[Completion]] = Future()
    lock = threading.Lock()

    def look(part: Future[list[Completion]]) -> None:
        with lock:
            if whole.done():
                return
            if part.cancelled():
                whole.cancel()
            elif (error := part.exception()) is not None:
                whole.set_exception(error)
            elif all(each.done() for each in parts):
                whole.set_result([completion for each in parts for completion in each.result()])

    for part in parts:
        part.add_done_callback(look)
    return whole
