"""The batches that a student learns from: whose sequences they hold, and what the teacher says about them.

Each sequence of a batch is the student's own with probability λ, drawn for that sequence alone (or for its
micro-batch); the others come from the data. The teacher scores in the background: the data's sequences of a batch while
the student writes its own, and later batches while it steps. A later batch is begun early if it does not depend on the
student's weights, or if `sampling.max_staleness` lets older weights write it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch

from tutelage.data.dataset_files import TokenizedExample
from tutelage.errors import DataError
from tutelage.trainer.checkpoint.trainer_state import Rollout
from tutelage.trainer.config.student import StudentConfig
from tutelage.trainer.data.seeding import numpy_generator
from tutelage.trainer.data.sequences import Mask, TokenIds, TokenSequence, token_sequence
from tutelage.trainer.losses.registry import objective_named
from tutelage.trainer.model.process_group import ALONE, Workers
from tutelage.trainer.model.student import Student
from tutelage.trainer.rollout.base import open_sampler
from tutelage.trainer.teacher.base import SignalArrays, Teacher
from tutelage.trainer.teacher.rows import TeacherRows, Unembedding
from tutelage.trainer.teacher.to_tensors import teacher_rows
from tutelage.trainer.training.objective import signal_spec

ExamplesOf = Callable[[int], Sequence[TokenizedExample]]
"""The `batch.sequences` examples of a step, for all workers together."""


@dataclass(frozen=True)
class MicroBatch:
    """Sequences that go through the student at once, and what the teacher says about them."""

    sequences: list[TokenSequence]
    teacher: TeacherRows | None
    counts: bool = True
    """Whether it is part of the loss; one that is not only accompanies the passes of other workers."""

    @property
    def rows(self) -> int:
        """Scored positions."""
        return sum(sequence.rows for sequence in self.sequences)


@dataclass(frozen=True)
class _PendingBatch:
    """A batch that is being scored; indices are those in the whole step's batch."""

    sequences: Mapping[int, TokenSequence]
    answers: Sequence[Future[dict[int, SignalArrays]]]
    rollout: Rollout
    """What the student wrote of it."""


class BatchBuilder:
    """One worker's share of the batches of one student.

    Args:
        config: the student's.
        student: writes its own sequences.
        teacher: asked for signals; None if the objective needs none.
        unembedding: the teacher's, for the signal `hidden`.
        workers: who train the student together.
        rollouts: of later batches, as a checkpoint kept them.

    Raises:
        ConfigurationError: as `open_sampler`.

    """

    def __init__(
        self,
        config: StudentConfig,
        student: Student,
        teacher: Teacher | None,
        unembedding: Unembedding | None,
        workers: Workers = ALONE,
        rollouts: Iterable[Rollout] = (),
    ) -> None:
        self._config, self._student, self._workers = config, student, workers
        self._teacher = teacher if objective_named(config.objective.name).needs_teacher else None
        self._unembedding = unembedding
        self._sampler = open_sampler(config, student)
        self._kept = {batch.step: batch for batch in rollouts}
        self._pending: dict[int, _PendingBatch] = {}
        self._background = ThreadPoolExecutor(
            # One: batches are scored in the order of their steps. With OpenMP every thread has its own set_num_threads.
            1,
            thread_name_prefix="scoring",
            initializer=torch.set_num_threads,
            initargs=(config.threads,),
        )

    def close(self) -> None:
        """Asks for nothing more."""
        # Not waited for: what is under way may be waiting for a teacher that is away, for `teacher.wait_seconds`.
        self._background.shutdown(wait=False, cancel_futures=True)

    @property
    def rollouts(self) -> tuple[Rollout, ...]:
        """What the student wrote of batches that no step has taken yet, for a checkpoint."""
        return tuple(pending.rollout for pending in self._pending.values() if pending.rollout.completions)

    @property
    def waited_seconds(self) -> float:
        """How long the teacher did not answer so far, since this process began."""
        return 0.0 if self._teacher is None else self._teacher.waited_seconds

    def prefetch(self, step: int, examples_of: ExamplesOf) -> None:
        """Writes what step number `step` learns from, and as many later batches as may be, and has them scored.

        Raises:
            DataError: an example has no completion to learn from.

        """
        objective = self._config.objective
        last = min(step + self.prefetch_steps, self._config.steps - 1)
        # All workers of a sharded student enter `unsharded` at once, also one that has nothing to generate this time.
        asks_student = objective.on_policy_fraction > 0 or objective.signal == "candidates"
        with self._student.unsharded() if asks_student else nullcontext():
            for later in range(step, max(step, last) + 1):
                if later not in self._pending:
                    self._pending[later] = self._start(later, step, examples_of(later))

    def take(self, step: int) -> list[MicroBatch]:
        """The batch of a step that was begun: micro-batches of sequences of like length, unless the loss depends on
        them.

        Raises:
            TutelageError: as the teacher's `score`.

        """
        pending = self._pending[step]
        answers = {index: answer for future in pending.answers for index, answer in future.result().items()}
        del self._pending[step]
        indices, size = sorted(pending.sequences), self._config.batch.micro_batch_sequences
        if not self._config.micro_batches_matter:
            # Sequences of like length share a micro-batch, which then has little padding.
            indices.sort(key=lambda index: -len(pending.sequences[index].ids))
        batches = []
        for start in range(0, len(indices), size):
            part = indices[start : start + size]
            sequences, rows = [pending.sequences[index] for index in part], None
            if self._teacher is not None:
                answered = [answers[index] for index in part]
                rows = teacher_rows(sequences, answered, self._unembedding, self._student.device)
            batches.append(MicroBatch(sequences, rows))
        return batches

    @property
    def prefetch_steps(self) -> int:
        """How many batches are begun before it is their turn."""
        objective = self._config.objective
        if objective.on_policy_fraction > 0:
            return self._config.sampling.max_staleness
        return 0 if self._teacher is None or objective.signal == "candidates" else 1

    def _start(self, step: int, weights_version: int, examples: Sequence[TokenizedExample]) -> _PendingBatch:
        """The worker's share of a batch: own samples where the draw says so, else the data's completions."""
        drawn = self._drawn_indices(step, len(examples))
        indices = self._share_of_worker(len(examples), drawn)
        data = {
            index: self._sequence(examples[index], examples[index].completion_ids, examples[index].mask)
            for index in indices
            if index not in drawn
        }
        # Asked before the student generates: the teacher scores the data's sequences meanwhile.
        answers = self._ask(data)
        own_indices = [index for index in indices if index in drawn]
        rollout = self._kept.pop(step, None) or self._generate(step, weights_version, own_indices, examples)
        own = {
            index: self._sequence(examples[index], rollout.completions[index], weights_version=rollout.weights_version)
            for index in own_indices
        }
        return _PendingBatch(data | own, [*answers, *self._ask(own)], rollout)

    def _drawn_indices(self, step: int, count: int) -> set[int]:
        """The indices of a batch whose sequences the student writes itself."""
        config = self._config
        unit = config.batch.micro_batch_sequences if config.on_policy_unit == "micro_batch" else 1
        # Of the step alone: the same after a resume, and with every worker, each of which makes all draws.
        draws = numpy_generator(config.seed, "on-policy", config.id, step).random(math.ceil(count / unit))
        return {index for index in range(count) if draws[index // unit] < config.objective.on_policy_fraction}

    def _share_of_worker(self, count: int, own: Collection[int]) -> list[int]:
        """The worker's indices of a step's `count`: whole micro-batches if the loss depends on them.

        The indices in `own` are dealt first, so that the writing, which takes longest, is shared evenly.
        """
        size = self._config.batch.micro_batch_sequences if self._config.micro_batches_matter else 1
        units = [range(start, min(start + size, count)) for start in range(0, count, size)]
        units.sort(key=lambda unit: unit[0] not in own)
        return sorted(index for unit in self._workers.share(units) for index in unit)

    def _generate(
        self, step: int, weights_version: int, indices: Sequence[int], examples: Sequence[TokenizedExample]
    ) -> Rollout:
        """The student's own completions at these indices; of all workers, if a checkpoint may have to keep them."""
        prompts = [examples[index].prompt_ids for index in indices]
        completions = self._sampler.generate(step, indices, prompts) if indices else []
        own = dict(zip(indices, completions, strict=True))
        if self._config.sampling.max_staleness and not self._workers.alone:
            # Each worker gives a table with its own rows filled in (length, token ids); their sum is the whole one,
            # exactly, since `total` adds in float64.
            table = np.zeros((len(examples), 1 + self._config.sampling.max_new_tokens))
            for index, ids in own.items():
                table[index, 0], table[index, 1 : 1 + len(ids)] = len(ids), ids
            full = np.reshape(self._workers.total(table.ravel().tolist()), table.shape).astype(np.int32)
            own = {index: row[1 : 1 + row[0]] for index, row in enumerate(full) if row[0]}
        return Rollout(step, weights_version, own)

    def _ask(self, sequences: Mapping[int, TokenSequence]) -> list[Future[dict[int, SignalArrays]]]:
        """Has the teacher score some sequences in the background; nothing if there are none, or no teacher."""
        teacher = self._teacher
        if teacher is None or not sequences:
            return []
        spec = signal_spec(self._config.objective)

        def answers() -> dict[int, SignalArrays]:
            return dict(zip(sequences, teacher.score(list(sequences.values()), spec), strict=True))

        return [self._background.submit(answers)]

    def _sequence(
        self,
        example: TokenizedExample,
        completion_ids: TokenIds,
        mask: Mask | None = None,
        weights_version: int | None = None,
    ) -> TokenSequence:
        """What is scored and learned from; with the signal `candidates`, with the ids that the student chose."""
        if not len(completion_ids):
            raise DataError(
                f"a row of {self._config.data.path} has no completion, and the student was not to write one; give "
                "completions, or set objective.on_policy_fraction: 1",
                "data.path",
            )
        sequence = token_sequence(
            example.prompt_ids,
            completion_ids,
            loss_on_prompt=self._config.loss_on_prompt,
            loss_on_last_token=self._config.loss_on_last_token,
            mask=mask,
            weights_version=weights_version,
            teacher=example.teacher,
        )
        if self._teacher is None or self._config.objective.signal != "candidates":
            return sequence
        return replace(sequence, candidate_ids_RC=self._student.likeliest_ids(sequence, self._config.objective.k))
