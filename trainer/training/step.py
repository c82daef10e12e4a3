"""One optimizer step: a batch that the teacher has scored, the loss, the update."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tutelage.trainer.config.student import StudentConfig
from tutelage.trainer.data.seeding import derived_seed
from tutelage.trainer.data.sequences import TokenSequence
from tutelage.trainer.losses.diagnostics import diagnostics
from tutelage.trainer.losses.losses import token_cross_entropy, token_divergence, token_policy_gradient
from tutelage.trainer.losses.reductions import reduce_micro_batch_token_mean, reduce_sequence_mean, reduce_token_mean
from tutelage.trainer.losses.registry import objective_named, resolve_parameters
from tutelage.trainer.model.optimizer import learning_rate_at
from tutelage.trainer.model.process_group import ALONE, Workers
from tutelage.trainer.model.student import Student
from tutelage.trainer.teacher.rows import Unembedding
from tutelage.trainer.teacher.to_tensors import row_counts, targets_of
from tutelage.trainer.training.batch_builder import BatchBuilder, ExamplesOf, MicroBatch
from tutelage.trainer.training.objective import teacher_distribution_of

# Divergences of each row take three times as long as the loss itself; so many rows show where a step is.
_DIAGNOSED_ROWS = 64
_MEASURES = (
    "forward_kl",
    "reverse_kl",
    "tail_mass",
    "student_tail_mass",
    "support_mass",
    "teacher_entropy",
    "student_entropy",
    "top1_agreement",
)


@dataclass(frozen=True)
class Totals:
    """What a step's loss is divided by: counts over all micro-batches of all workers."""

    rows: int
    sequences: int
    micro_batches: int


class TrainStep:
    """Takes optimizer steps of one student.

    Args:
        config: the student's.
        student: its weights.
        batches: of the same student; closed by whoever made them.
        workers: who train the student together; each takes its share of a step's sequences.

    """

    def __init__(
        self,
        config: StudentConfig,
        student: Student,
        batches: BatchBuilder,
        workers: Workers = ALONE,
    ) -> None:
        self._config, self._student, self._batches, self._workers = config, student, batches, workers
        self._entry = objective_named(config.objective.name)
        self._distribution = teacher_distribution_of(config.objective, derived_seed(config.seed, "noise"))

    def train_step(self, step: int, examples_of: ExamplesOf, report: Callable[[str], None]) -> dict[str, float]:
        """Does step number `step` (0, 1, …).

        Args:
            step: steps done before.
            examples_of: asked for the examples of this step, and of later ones whose batches are begun early.
            report: told the phase: sampling, scoring, stepping.

        Returns:
            The step's metrics by name, of all workers together but for the seconds.

        Raises:
            DataError: an example has no completion to learn from.
            TutelageError: as the teacher's `score`.

        """
        # Dropout, where a model has it, is all that draws from the global generator.
        others = () if self._workers.first else (self._workers.rank,)
        torch.manual_seed(derived_seed(self._config.seed, "dropout", self._config.id, step, *others))
        clock = _Clock(self._batches)
        report("sampling")
        self._batches.prefetch(step, examples_of)
        clock.lap("sampling")
        report("scoring")
        batches = self._batches.take(step)
        clock.lap("scoring")
        report("stepping")
        metrics = self._update(step, batches)
        clock.lap("stepping")
        return metrics | self._rollout_metrics(step, batches) | clock.metrics()

    def _update(self, step: int, batches: Sequence[MicroBatch]) -> dict[str, float]:
        """Forward and backward over all micro-batches, then the optimizer."""
        sequences = sum(len(batch.sequences) for batch in batches)
        counts = self._workers.total([sum(batch.rows for batch in batches), sequences, len(batches)])
        totals = Totals(*map(int, counts))
        if self._student.sharded:
            # A pass brings weights together, which takes all workers: each goes through it as often as the one with
            # the most micro-batches, the last time with weight 0.
            missing = self._workers.largest(len(batches)) - len(batches)
            batches = [*batches, *[replace(batches[-1], counts=False)] * missing]
        loss, measured = 0.0, list[dict[str, Tensor]]()
        for batch in batches:
            hidden_ND = self._student.hidden(batch.sequences)
            head = self._student.head()
            if batch.teacher is not None and batch.counts:
                some = slice(None, None, max(1, totals.rows // _DIAGNOSED_ROWS))  # Evenly spread.
                values = diagnostics(
                    hidden_ND.detach()[some], head, batch.teacher.at(some), distribution=self._distribution
                )
                if batch.teacher.kind != "topk":  # Where the support is the student's: the teacher's mass on it.
                    values["support_mass"] = 1.0 - values["tail_mass"]
                measured.append(values)
            # Times 0 instead of left out: the backward pass of a sharded student takes part in what the others do.
            part = self._reduce(self._token_loss(hidden_ND, head, batch), batch.sequences, totals) * batch.counts
            part.backward()
            self._student.collect_gradients()
            loss += float(part.detach())  # Parts of one mean: their sum is the step's loss, however it was divided.
        learning_rate = learning_rate_at(step, self._config.steps, self._config.optimizer)
        self._student.sum_gradients(self._workers)
        norm = self._student.step(learning_rate)
        (loss,) = self._workers.total([loss])
        return {
            "train/loss": loss,
            **self._means(measured),
            "train/gradient_norm": norm,
            "train/learning_rate": learning_rate,
            "train/tokens": totals.rows,
        }

    def _token_loss(self, hidden_ND: Tensor, head: Unembedding, batch: MicroBatch) -> Tensor:
        """What the objective says of each row, [N]."""
        objective = self._config.objective
        targets_N = targets_of(batch.sequences).to(self._student.device)
        if batch.teacher is None:
            return token_cross_entropy(hidden_ND, head, targets_N)
        if self._entry.sampled_token:
            estimator = str(resolve_parameters(objective.name, objective.parameters)["estimator"])
            return token_policy_gradient(
                hidden_ND, head, batch.teacher, targets_N, estimator=estimator, distribution=self._distribution
            )
        return token_divergence(
            hidden_ND,
            head,
            batch.teacher,
            objective=objective.name,
            parameters=objective.parameters,
            distribution=self._distribution,
            approximate=objective.approximate,
        )

    def _reduce(self, loss_N: Tensor, sequences: Sequence[TokenSequence], totals: Totals) -> Tensor:
        """The part of the step's loss that comes from one of its micro-batches."""
        match self._config.reduction:
            case "token_mean":
                return reduce_token_mean(loss_N, totals.rows)
            case "sequence_mean":
                counts_B = row_counts(sequences).to(loss_N.device)
                return reduce_sequence_mean(loss_N, counts_B.repeat_interleave(counts_B), totals.sequences)
            case "micro_batch_token_mean":
                return reduce_micro_batch_token_mean(loss_N, totals.micro_batches)

    def _means(self, measured: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
        """Means over all measured rows of the step."""
        if not measured:
            return {}
        names = [name for name in _MEASURES if name in measured[0]]
        # In float64, as `total` adds: then the mean does not depend on which worker measured which rows.
        columns = [torch.cat([values[name] for values in measured]).double() for name in names]
        rows, *sums = self._workers.total([len(columns[0]), *(float(column_N.sum()) for column_N in columns)])
        return {f"train/{name}": value / rows for name, value in zip(names, sums, strict=True)}

    def _rollout_metrics(self, step: int, batches: Sequence[MicroBatch]) -> dict[str, float]:
        """How many sequences the student wrote; on average, how long they are and how old their weights (0 if none)."""
        own = [sequence for batch in batches for sequence in batch.sequences if sequence.weights_version is not None]
        ages = [step - sequence.weights_version for sequence in own if sequence.weights_version is not None]
        tokens = sum(sequence.completion_tokens for sequence in own)
        count, length, age = self._workers.total([len(own), tokens, sum(ages)])
        return {
            "train/own_sequences": int(count),
            "train/sample_length": length / count if count else 0.0,
            "train/staleness": age / count if count else 0.0,
        }


class _Clock:
    """Seconds by phase. Scoring is what the step stood still for; what of it the teacher was away is waiting."""

    def __init__(self, batches: BatchBuilder) -> None:
        self._batches = batches
        self._waited = batches.waited_seconds
        self._last = time.perf_counter()
        self._seconds: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """Ends a phase."""
        now = time.perf_counter()
        self._seconds[phase], self._last = now - self._last, now

    def metrics(self) -> dict[str, float]:
        """By name `seconds/…`."""
        # The teacher may have been away in the background, while the student generated: that cost the step nothing.
        waiting = min(self._batches.waited_seconds - self._waited, self._seconds["scoring"])
        seconds = self._seconds | {"scoring": self._seconds["scoring"] - waiting, "waiting": waiting}
        return {f"seconds/{phase}": value for phase, value in seconds.items()}
