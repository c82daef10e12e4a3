"""One process that writes in a student's place: the Ray actor `student-<id>-writer-<n>`.

It holds a copy of the student (`student_copy`) and the sampler that the student would have had itself, and writes one
share of a batch after the other, each with the weights that come with it. Whoever asked is told while it writes.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Any

import numpy as np
import ray
import torch

from tutelage.errors import IdentityMismatch
from tutelage.trainer.config.student import StudentConfig
from tutelage.trainer.data.sequences import Completion, TokenIds
from tutelage.trainer.rollout.base import sampler_in_process
from tutelage.trainer.rollout.student_copy import StudentCopy, StudentWeights, digest_of

# Of a writer that dies while it loads the model.
_BEGINNINGS = 3
# That nobody has taken yet; a writer waits, and then hands on longer ones.
_PIECES_IN_FLIGHT = 4
Pieces = dict[int, TokenIds]
"""By index in the step's batch: all ids of its completion so far."""


@dataclass(frozen=True)
class Share:
    """What one writer writes at once: as much of a batch as is one writer's part."""

    step: int
    """Whose batch it is."""
    indices: Sequence[int]
    """In that batch."""
    prompts: Sequence[TokenIds]
    """One for each index."""
    turn: int
    """As for `Sampler.write`."""
    in_pieces: bool
    """Whether what is written is wanted while it is."""


class WriterActor:
    """Writes for one student.

    Args:
        config: the student's.
        number: which of its writers.
        end_ids: as `Student.end_ids`.
        vocabulary_size: as `Student.vocabulary_size`.

    """

    def __init__(self, config: StudentConfig, number: int, end_ids: frozenset[int], vocabulary_size: int) -> None:
        assert config.sampling.writers is not None
        self._config, self._number = config, number
        self._end_ids, self._vocabulary_size = end_ids, vocabulary_size
        # Nobody sets vLLM's cores apart for each of several engines on a machine; bound by itself, all have the same.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        # One: everything of the model is done in it, so that this process can hand on what it writes meanwhile. With
        # OpenMP every thread has its own set_num_threads.
        self._thread = ThreadPoolExecutor(1, "writer", torch.set_num_threads, (config.sampling.writers.threads,))
        self._copy: StudentCopy | None = None
        self._sampler: Any = None
        self._version: int | None = None

    def __repr__(self) -> str:
        """What the dashboard and Ray's logs call it."""
        return f"writer {self._number} of student {self._config.id}"

    # Until it is there again, however often that takes.
    @ray.method(max_task_retries=-1)
    def where(self) -> str:
        """Which process it is, and on which machine."""
        return f"process {os.getpid()} on {socket.gethostname()}"

    @ray.method(max_task_retries=_BEGINNINGS)
    def begin(self, weights: StudentWeights, digest: str) -> None:
        """Loads the model and takes the student's weights.

        Args:
            weights: the student's.
            digest: as `digest_of` of the student's model.

        Raises:
            IdentityMismatch: the copy is another model than the student.
            ConfigurationError: as the sampler that writes.

        """

        def load() -> None:
            self._take(weights)
            assert self._copy is not None
            if digest_of(self._copy.model) != digest:
                raise IdentityMismatch(
                    f"{self._config.init} holds other weights where this writer runs than where the student does; let "
                    "every node see the same folder",
                    "init",
                )

        self._thread.submit(load).result()

    @ray.method(num_returns="streaming", _generator_backpressure_num_objects=_PIECES_IN_FLIGHT)
    def write(self, share: Share, weights: StudentWeights) -> Iterator[Pieces | list[Completion]]:
        """Writes a share with some weights; gives pieces, if they are wanted, and at last the completions.

        Raises:
            IdentityMismatch: with those weights it says otherwise than the student.

        """
        told: SimpleQueue[tuple[int, TokenIds] | None] = SimpleQueue()

        def write() -> list[Completion]:
            self._take(weights)
            on_piece = (lambda index, ids: told.put((index, ids))) if share.in_pieces else None
            writing = self._sampler.write(share.step, share.indices, share.prompts, turn=share.turn, on_piece=on_piece)
            completions: list[Completion] = writing.result()
            return completions

        written = self._thread.submit(write)
        written.add_done_callback(lambda _: told.put(None))
        while (piece := told.get()) is not None:
            pieces = dict([piece])
            while not told.empty() and (piece := told.get()) is not None:
                pieces[piece[0]] = piece[1]  # A longer one says what the shorter ones did.
            yield pieces
            if piece is None:
                break
        yield [replace(each, versions=np.full(len(each.ids), weights.version, np.int32)) for each in written.result()]

    def _take(self, weights: StudentWeights) -> None:
        """Has these weights, and the model that they are of."""
        if self._version == weights.version:
            return
        self._version = None
        if self._copy is None:
            self._copy = StudentCopy(self._config, end_ids=self._end_ids, vocabulary_size=self._vocabulary_size)
        self._copy.take(weights)
        if self._sampler is None:
            self._sampler = sampler_in_process(self._config, self._copy)
        self._sampler.take_weights(weights.version)
        of_engine = self._config.sampling.written_by == "vllm"
        (self._sampler if of_engine else self._copy).require_same(weights.canary_V)
        self._version = weights.version
