"""The batches that a student learns from: whose sequences they hold, and what the teacher says about them.

Each sequence of a batch is the student's own with probability λ, drawn for that sequence alone (or for its
micro-batch); the others come from the data. The teacher scores in the background: the data's sequences of a batch while
the student writes its own, and later batches while it steps. A later batch is begun early if it does not depend on the
student's weights, or if `sampling.max_staleness` lets older weights write it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from tutelage.data.dataset_files import TokenizedExample
from tutelage.errors import ConfigurationError, DataError
from tutelage.trainer.checkpoint.trainer_state import Rollout
from tutelage.trainer.config.objective import TermConfig
from tutelage.trainer.config.student import StudentConfig
from tutelage.trainer.data.seeding import numpy_generator
from tutelage.trainer.data.sequences import Completion, Mask, TokenIds, TokenSequence, token_sequence
from tutelage.trainer.model.process_group import ALONE, Workers
from tutelage.trainer.model.student import Student
from tutelage.trainer.rollout.base import OnPiece, done, open_sampler
from tutelage.trainer.rollout.tools import rollout_named, write_with
from tutelage.trainer.teacher.base import SignalArrays, Teacher
from tutelage.trainer.teacher.rows import TeacherRows, Unembedding
from tutelage.trainer.teacher.several import Name, members_of
from tutelage.trainer.teacher.streamed import StreamedScoring
from tutelage.trainer.teacher.to_tensors import row_counts, teacher_rows
from tutelage.trainer.training.objective import signal_spec

ExamplesOf = Callable[[int], Sequence[TokenizedExample]]
"""The examples of a step, for all workers together: `StudentConfig.prompts_per_step` of them."""
_Answers = Future[dict[int, SignalArrays]]
"""What a teacher says about sequences, by their index in the step's batch."""
_T = TypeVar("_T")
_Made = TypeVar("_Made")


@dataclass(frozen=True)
class MicroBatch:
    """Sequences that go through the student at once, and what the teacher says about them."""

    sequences: list[TokenSequence]
    teacher: TeacherRows | None
    counts: bool = True
    """Whether it is part of the loss; one that is not only accompanies the passes of other workers."""
    teacher_name: Name = None
    """Whom its rows were asked of, where there are several."""

    @property
    def rows(self) -> int:
        """Scored positions."""
        return sum(sequence.rows for sequence in self.sequences)

    @property
    def tokens(self) -> int:
        """All tokens, prompts included."""
        return sum(len(sequence.ids) for sequence in self.sequences)

    @property
    def teacher_tokens(self) -> int:
        """Tokens that the teacher read of them, prompts included."""
        return 0 if self.teacher is None else sum(len(sequence.for_teacher.ids) for sequence in self.sequences)

    def of_term(self, term: TermConfig) -> MicroBatch:
        """The sequences that a term of the objective is computed on."""
        sequences = [each for each in self.sequences if term.includes(own=each.is_own)]
        if len(sequences) == len(self.sequences):
            return self
        teacher = None if self.teacher is None else self.teacher.at(self.rows_of_term(term))
        return replace(self, sequences=sequences, teacher=teacher)

    def rows_of_term(self, term: TermConfig) -> Tensor:
        """Which rows are those of the sequences that a term is computed on, bool [N]."""
        included = torch.tensor([term.includes(own=sequence.is_own) for sequence in self.sequences])
        return included.repeat_interleave(row_counts(self.sequences))


@dataclass(frozen=True)
class _PendingBatch:
    """A batch that is being written and scored; indices are those in the whole step's batch."""

    data: Mapping[int, TokenSequence]
    of_data: _Answers
    rollout: Future[Rollout]
    """What the student writes of it."""
    own: Future[dict[int, TokenSequence]]
    """Its sequences."""
    of_own: Future[_Answers]


class BatchBuilder:
    """One worker's share of the batches of one student.

    Args:
        config: the student's.
        student: writes its own sequences.
        teacher: asked for signals; None if the objective needs none.
        heads: the teacher's unembedding, by the teacher's name, for the signal `hidden`.
        workers: who train the student together.
        rollouts: of later batches, as a checkpoint kept them.

    Raises:
        ConfigurationError: as `open_sampler` and `rollout_named`.

    """

    def __init__(
        self,
        config: StudentConfig,
        student: Student,
        teacher: Teacher | None,
        heads: Mapping[Name, Unembedding],
        workers: Workers = ALONE,
        rollouts: Iterable[Rollout] = (),
    ) -> None:
        self._config, self._student, self._workers = config, student, workers
        self._teacher = teacher if config.objective.needs_teacher else None
        self._heads = heads
        self._sampler = open_sampler(config, student)
        self._rollout = rollout_named(config.sampling.rollout) if config.sampling.rollout else None
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
        self._sampler.close()
        # Not waited for: what is under way may be waiting for a teacher that is away, for `teacher.wait_seconds`.
        self._background.shutdown(wait=False, cancel_futures=True)

    def rollouts(self) -> tuple[Rollout, ...]:
        """What the student wrote of batches that no step has taken yet, for a checkpoint; waits for what it writes.

        All workers ask at once, and are given what each of them wrote.
        """
        written = []
        for pending in self._pending.values():
            rollout = pending.rollout.result()
            if self._config.sampling.max_staleness and not self._workers.alone:
                own = {index: rollout.completions[index] for index in pending.own.result()}
                rollout = replace(rollout, completions=self._of_all_workers(own))
            written.append(rollout)
        return tuple(rollout for rollout in written if rollout.completions)

    def take_weights(self, version: int) -> None:
        """As `Sampler.take_weights`."""
        self._sampler.take_weights(version)

    @property
    def waited_seconds(self) -> float:
        """How long the teacher did not answer so far, since this process began."""
        return 0.0 if self._teacher is None else self._teacher.waited_seconds

    @property
    def teacher_names(self) -> list[str]:
        """Of those that rows name, where there are several."""
        return sorted(name for name in members_of(self._teacher) if name is not None)

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
        sequences = {**pending.data, **pending.own.result()}
        answers = {**pending.of_data.result(), **pending.of_own.result().result()}
        del self._pending[step]
        if self._config.objective.shuffle_teacher and self._teacher is not None:
            answers = shuffled(sequences, answers, self._config.sampling.completions)
        indices, size = sorted(sequences), self._config.batch.micro_batch_sequences
        if not self._config.micro_batches_matter:
            # Sequences of like length share a micro-batch, which then has little padding.
            indices.sort(key=lambda index: -len(sequences[index].ids))
        # The rows of a micro-batch are of one teacher, and have its width and its head.
        by_teacher: dict[Name, list[int]] = {}
        for index in indices:
            by_teacher.setdefault(sequences[index].teacher if self._teacher else None, []).append(index)
        batches = []
        for name, own in by_teacher.items():
            for start in range(0, len(own), size):
                part = own[start : start + size]
                together, rows = [sequences[index] for index in part], None
                if self._teacher is not None:
                    answered = [answers[index] for index in part]
                    rows = teacher_rows(together, answered, self._heads.get(name), self._student.device)
                batches.append(MicroBatch(together, rows, teacher_name=name))
        return batches

    @property
    def prefetch_steps(self) -> int:
        """How many batches are begun before it is their turn."""
        objective = self._config.objective
        if objective.on_policy_fraction > 0:
            return self._config.sampling.max_staleness
        return 0 if self._teacher is None or objective.signal == "candidates" else 1

    def _start(self, step: int, weights_version: int, prompts: Sequence[TokenizedExample]) -> _PendingBatch:
        """The worker's share of a batch: own samples where the draw says so, else the data's completions."""
        copies = self._config.sampling.completions
        # A prompt has an index for each completion that the student may write; the data's has the first of them.
        own_indices = [
            prompt * copies + copy for prompt in self._drawn_prompts(step, prompts) for copy in range(copies)
        ]
        examples = {index: prompts[index // copies] for index in range(len(prompts) * copies)}
        given = [index for index in range(0, len(examples), copies) if index not in own_indices]
        share = self._share_of_worker(sorted([*own_indices, *given]), own_indices)
        data = {index: self._sequence_of_data(examples[index]) for index in share if index in given}
        # Asked before the student generates: the teacher scores the data's sequences meanwhile.
        of_data = self._ask(data)
        mine = {index: examples[index] for index in share if index in own_indices}

        def own_sequences(rollout: Rollout) -> dict[int, TokenSequence]:
            return {index: self._own_sequence(example, rollout, index) for index, example in mine.items()}

        scoring = self._streamed(mine) if mine and step not in self._kept else None

        def on_piece(index: int, ids: TokenIds) -> None:
            assert scoring is not None
            scoring.piece(index, ids, over=self._is_over(mine[index], ids))

        rollout = self._write(step, weights_version, mine, on_piece if scoring else None)
        if self._config.objective.signal == "candidates":
            wait([rollout])  # The student chooses them here and now.
        own = _then(rollout, own_sequences)
        return _PendingBatch(data, of_data, rollout, own, _then(own, self._ask if scoring is None else scoring.finish))

    def _drawn_prompts(self, step: int, prompts: Sequence[TokenizedExample]) -> list[int]:
        """The prompts of a batch that the student continues itself."""
        config, count = self._config, len(prompts)
        unit = config.batch.micro_batch_sequences if config.on_policy_unit == "micro_batch" else 1
        # Of the step alone: the same after a resume, and with every worker, each of which makes all draws.
        draws = numpy_generator(config.seed, "on-policy", config.id, step).random(math.ceil(count / unit))
        fraction = config.objective.on_policy_fraction
        # Who writes at all also answers the prompts that have no answer in the data.
        unanswered = [fraction > 0 and not len(example.completion_ids) for example in prompts]
        return [index for index in range(len(prompts)) if draws[index // unit] < fraction or unanswered[index]]

    def _share_of_worker(self, indices: Sequence[int], own: Collection[int]) -> list[int]:
        """The worker's part of a step's indices: whole micro-batches if the loss depends on them.

        The indices in `own` are dealt first, so that the writing, which takes longest, is shared evenly.
        """
        size = self._config.batch.micro_batch_sequences if self._config.micro_batches_matter else 1
        units = [indices[start : start + size] for start in range(0, len(indices), size)]
        units.sort(key=lambda unit: unit[0] not in own)
        return sorted(index for unit in self._workers.share(units) for index in unit)

    def _streamed(self, examples: Mapping[int, TokenizedExample]) -> StreamedScoring | None:
        """Has what the student writes after these prompts scored meanwhile."""
        objective = self._config.objective
        if self._teacher is None or not self._config.sampling.stream or objective.signal == "candidates":
            return None
        scoring = StreamedScoring(self._teacher, signal_spec(objective), self._background)
        scoring.begin(
            {
                index: TokenSequence(
                    example.prompt_ids,
                    start=0 if self._config.loss_on_prompt else len(example.prompt_ids) - 1,
                    end=len(example.prompt_ids),
                    prompt_tokens=len(example.prompt_ids),
                    teacher=example.teacher,
                    teacher_prompt_ids=example.teacher_prompt_ids,
                )
                for index, example in examples.items()
            }
        )
        return scoring

    def _is_over(self, example: TokenizedExample, written: TokenIds) -> bool:
        """Whether a completion, or with tools the student's turn, has ended."""
        room = min(self._config.sampling.max_new_tokens, self._config.batch.max_tokens - len(example.prompt_ids))
        return int(written[-1]) in self._student.end_ids or len(written) >= room

    def _write(
        self, step: int, weights_version: int, examples: Mapping[int, TokenizedExample], on_piece: OnPiece | None
    ) -> Future[Rollout]:
        """The student's own completions by index; those that a checkpoint kept, with those of all workers."""
        if step in self._kept:
            return done(self._kept.pop(step))
        if not examples:
            written: Future[list[Completion]] = done([])
        elif self._rollout is not None:
            written = done(
                write_with(
                    self._rollout,
                    self._sampler,
                    step=step,
                    rows=examples,
                    tokenizer=self._student.tokenizer,
                    max_tokens=self._config.batch.max_tokens,
                    on_piece=on_piece,
                )
            )
        else:
            prompts = [example.prompt_ids for example in examples.values()]
            written = self._sampler.write(step, list(examples), prompts, on_piece=on_piece)
        return _then(written, lambda each: Rollout(step, weights_version, dict(zip(examples, each, strict=True))))

    def _of_all_workers(self, own: Mapping[int, Completion]) -> dict[int, Completion]:
        """What each worker wrote, for all of them."""
        # Each worker gives a table with its own rows filled in: per token 1, its id, ln p, whether it was written and
        # the weights' version. Their sum is the whole table, exactly, since `total` adds in float64.
        table = np.zeros((self._config.batch.sequences, 5, self._config.batch.max_tokens))
        for index, one in own.items():
            width = len(one.ids)
            logp = np.full(width, np.nan) if one.logp is None else one.logp
            mask = np.ones(width) if one.mask is None else one.mask
            versions = np.full(width, np.nan) if one.versions is None else one.versions
            table[index, :, :width] = np.ones(width), one.ids, logp, mask, versions
        full = np.reshape(self._workers.total(table.ravel().tolist()), table.shape)
        written = {}
        for index in np.flatnonzero(full[:, 0, 0]).tolist():
            _, ids, logp, mask, versions = full[index][:, full[index, 0] > 0]
            written[index] = Completion(
                ids.astype(np.int32),
                None if np.isnan(logp).any() else logp.astype(np.float32),
                None if mask.all() else mask.astype(bool),
                None if np.isnan(versions).any() else versions.astype(np.int32),
            )
        return written

    def _ask(self, sequences: Mapping[int, TokenSequence]) -> _Answers:
        """Has the teacher score some sequences in the background; nothing if there are none, or no teacher."""
        teacher = self._teacher
        if teacher is None or not sequences:
            return done({})
        spec = signal_spec(self._config.objective)

        def answers() -> dict[int, SignalArrays]:
            asked = [sequence.for_teacher for sequence in sequences.values()]
            return dict(zip(sequences, teacher.score(asked, spec), strict=True))

        return self._background.submit(answers)

    def _sequence_of_data(self, example: TokenizedExample) -> TokenSequence:
        """What is learned from a row as the data has it."""
        if not len(example.completion_ids):
            raise DataError(
                f"a row of {', '.join(str(source.path) for source in self._config.sources)} has no completion, and the "
                "student writes none; give completions, or objective.on_policy_fraction above 0",
                "data.path",
            )
        return self._sequence(example, example.completion_ids, example.mask)

    def _own_sequence(self, example: TokenizedExample, rollout: Rollout, index: int) -> TokenSequence:
        """What is learned from what the student wrote after a row's prompt; as old as its oldest token."""
        written, mask = rollout.completions[index], None
        logp = written.logp
        if written.mask is not None:
            mask = np.concatenate([np.zeros(len(example.prompt_ids), bool), written.mask])
            logp = None if logp is None else np.where(written.mask, logp, np.float32(np.nan))
        version = rollout.weights_version if written.versions is None else int(written.versions.min())
        sequence = self._sequence(example, written.ids, mask)
        return replace(sequence, weights_version=version, sampler_logp=logp)

    def _sequence(self, example: TokenizedExample, completion_ids: TokenIds, mask: Mask | None) -> TokenSequence:
        """What is scored and learned from; with the signal `candidates`, with the ids that the student chose."""
        sequence = token_sequence(
            example.prompt_ids,
            completion_ids,
            loss_on_prompt=self._config.loss_on_prompt,
            loss_on_last_token=self._config.loss_on_last_token,
            mask=mask,
            teacher=example.teacher,
            teacher_prompt_ids=example.teacher_prompt_ids,
        )
        if self._teacher is None or self._config.objective.signal != "candidates":
            return sequence
        return replace(sequence, candidate_ids_RC=self._student.likeliest_ids(sequence, self._config.objective.k))


def shuffled(
    sequences: Mapping[int, TokenSequence], answers: Mapping[int, SignalArrays], completions: int
) -> dict[int, SignalArrays]:
    """For each sequence what the teacher said about the next one of another prompt, repeated or cut to its length.

    Args:
        sequences: of a batch, by index.
        answers: of each, its rows from `start` to `end`.
        completions: indices of one prompt.

    Raises:
        ConfigurationError: there is no other prompt of the same teacher in the batch.

    """
    indices, given = sorted(sequences), {}
    for place, index in enumerate(indices):
        following = [*indices[place + 1 :], *indices[:place]]
        other = next(
            (
                each
                for each in following
                if each // completions != index // completions and sequences[each].teacher == sequences[index].teacher
            ),
            None,
        )
        if other is None:
            raise ConfigurationError(
                "a batch has one prompt only that its teacher is asked about; have more batch.sequences",
                "objective.shuffle_teacher",
            )
        # As many rows as each array has of this sequence: `target_logits` has none of the last position.
        given[index] = {
            name: np.resize(answers[other][name], array.shape[:1] + answers[other][name].shape[1:])
            for name, array in answers[index].items()
        }
    return given


def _then(future: Future[_T], function: Callable[[_T], _Made]) -> Future[_Made]:
    """What a function makes of a result: here and now if it is there, else in the thread that brings it."""
    made: Future[_Made] = Future()

    def make(there: Future[_T]) -> None:
        try:
            made.set_result(function(there.result()))
        except BaseException as error:  # Whatever it is, it is raised where the result is asked for.
            made.set_exception(error)

    future.add_done_callback(make)
    return made
