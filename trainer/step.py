"""One optimizer step: whose sequences, what the teacher says about them, the loss, the update.

Each sequence of a batch is the student's own with probability λ, drawn for that sequence alone (or for its
micro-batch); the others come from the data. Samples and scores are of this very step: nothing is stale.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tutelage.errors import DataError
from tutelage.examples import Example, TokenIds

from trainer.config import StudentConfig
from trainer.frames import SignalRequest, Signals
from trainer.objectives.diagnostics import diagnostics
from trainer.objectives.loss import token_cross_entropy, token_divergence, token_policy_gradient
from trainer.objectives.reductions import reduce_micro_batch_token_mean, reduce_sequence_mean, reduce_token_mean
from trainer.objectives.table import objective_named, resolve_parameters
from trainer.parallel import ALONE, Workers
from trainer.rows import Scored, row_counts, scored, signal_spec, smoothing_of, targets_of, teacher_rows
from trainer.sampling import open_sampler
from trainer.seeds import derived_seed, numpy_generator
from trainer.signals import TeacherRows, Unembedding
from trainer.student import Student, learning_rate_at
from trainer.teacher_client import Teacher

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
class MicroBatch:
    """Sequences that go through the student at once, and what the teacher says about them."""

    sequences: list[Scored]
    teacher: TeacherRows | None

    @property
    def rows(self) -> int:
        """Scored positions."""
        return sum(sequence.rows for sequence in self.sequences)


@dataclass(frozen=True)
class Totals:
    """What a step's loss is divided by: counts over all micro-batches of all workers."""

    rows: int
    sequences: int
    micro_batches: int


class Stepper:
    """Takes optimizer steps of one student.

    Args:
        config: the student's.
        student: its weights.
        teacher: asked for signals if the objective needs them.
        unembedding: the teacher's, for the signal `hidden`.
        workers: who train the student together; each takes its share of a step's sequences.

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
    ) -> None:
        self._config, self._student, self._unembedding, self._workers = config, student, unembedding, workers
        self._entry = objective_named(config.objective.name)
        self._sampler = open_sampler(config, student)
        self._teacher = teacher if self._entry.needs_teacher else None
        self._smoothing = smoothing_of(config.objective, derived_seed(config.seed, "noise"))

    def step(self, step: int, examples: Sequence[Example], report: Callable[[str], None]) -> dict[str, float]:
        """Does step number `step` (0, 1, …) on these examples.

        Args:
            step: steps done before.
            examples: `batch.sequences` of them, for all workers together.
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
        clock = _Clock(self._teacher)
        report("sampling")
        sequences = self._compose(step, examples)
        clock.lap("sampling")
        report("scoring")
        batches = self._score(sequences)
        clock.lap("scoring")
        report("stepping")
        metrics = self._update(step, batches)
        clock.lap("stepping")
        return metrics | self._lengths(sequences) | clock.metrics()

    def _compose(self, step: int, examples: Sequence[Example]) -> list[Scored]:
        """The worker's share: own samples where the draw says so, else the data's completions."""
        config = self._config
        unit = config.batch.micro_batch_sequences if config.on_policy_unit == "micro_batch" else 1
        draws = numpy_generator(config.seed, "on-policy", config.id, step).random(math.ceil(len(examples) / unit))
        drawn = {place for place in range(len(examples)) if draws[place // unit] < config.objective.own_fraction}
        places = self._share(len(examples), drawn)
        own = [place for place in places if place in drawn]
        completions = {place: examples[place].completion_ids for place in places}
        versions = dict.fromkeys(own, step)
        if own:
            prompts = [examples[place].prompt_ids for place in own]
            completions |= dict(zip(own, self._sampler.write(step, own, prompts), strict=True))
        return [self._scored(examples[place], completions[place], versions.get(place)) for place in places]

    def _share(self, count: int, own: Collection[int]) -> list[int]:
        """The worker's places of a step's `count`: whole micro-batches if the loss depends on them.

        The places in `own` are dealt first, so that the writing, which takes longest, is shared evenly.
        """
        size = self._config.batch.micro_batch_sequences if self._config.micro_batches_matter else 1
        units = [range(start, min(start + size, count)) for start in range(0, count, size)]
        units.sort(key=lambda unit: unit[0] not in own)
        return sorted(place for unit in self._workers.share(units) for place in unit)

    def _score(self, sequences: Sequence[Scored]) -> list[MicroBatch]:
        """Micro-batches of sequences of like length, unless the loss depends on them, with the teacher's rows."""
        size = self._config.batch.micro_batch_sequences
        ordered = list(sequences)
        if not self._config.micro_batches_matter:
            ordered.sort(key=lambda sequence: -len(sequence.ids))
        batches = [ordered[start : start + size] for start in range(0, len(ordered), size)]
        if self._teacher is None:
            return [MicroBatch(batch, None) for batch in batches]
        requests = [[self._request(sequence) for sequence in batch] for batch in batches]
        spec = signal_spec(self._config.objective)
        signals = iter(self._teacher.score([request for batch in requests for request in batch], spec))
        return [
            MicroBatch(batch, self._rows(batch, asked, [next(signals) for _ in batch]))
            for batch, asked in zip(batches, requests, strict=True)
        ]

    def _rows(
        self, batch: Sequence[Scored], asked: Sequence[SignalRequest], answered: Sequence[Signals]
    ) -> TeacherRows:
        return teacher_rows(batch, asked, answered, self._unembedding, self._student.device)

    def _request(self, sequence: Scored) -> SignalRequest:
        if self._config.objective.signal != "candidates":
            return sequence.request()
        return sequence.request(self._student.likeliest_ids(sequence, self._config.objective.k))

    def _update(self, step: int, batches: Sequence[MicroBatch]) -> dict[str, float]:
        """Forward and backward over all micro-batches, then the optimizer."""
        totals = self._totals(batches)
        loss, measured = 0.0, []
        for batch in batches:
            hidden_ND, head = self._student.hidden(batch.sequences), self._student.head()
            if batch.teacher is not None:
                measured.append(self._measure(hidden_ND.detach(), head, batch.teacher, totals.rows))
            part = self._reduce(self._loss(hidden_ND, head, batch), batch.sequences, totals)
            part.backward()
            self._student.collect_gradients()
            loss += float(part.detach())
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

    def _totals(self, batches: Sequence[MicroBatch]) -> Totals:
        sequences = sum(len(batch.sequences) for batch in batches)
        counts = self._workers.total([sum(batch.rows for batch in batches), sequences, len(batches)])
        return Totals(*map(int, counts))

    def _measure(
        self, hidden_ND: Tensor, head: Unembedding, teacher: TeacherRows, total_rows: int
    ) -> dict[str, Tensor]:
        """Divergences of evenly spread rows, about `_DIAGNOSED_ROWS` of the whole step."""
        places = slice(None, None, max(1, total_rows // _DIAGNOSED_ROWS))
        values = diagnostics(hidden_ND[places], head, teacher.at(places), smoothing=self._smoothing)
        if teacher.kind != "topk":  # Where the support is the student's: the teacher's mass that it covers.
            values["support_mass"] = 1.0 - values["tail_mass"]
        return values

    def _loss(self, hidden_ND: Tensor, head: Unembedding, batch: MicroBatch) -> Tensor:
        """Per row, [N]."""
        objective = self._config.objective
        if batch.teacher is None:
            return token_cross_entropy(hidden_ND, head, self._targets(batch))
        if self._entry.sampled_token:
            estimator = str(resolve_parameters(objective.name, objective.parameters)["estimator"])
            return token_policy_gradient(
                hidden_ND, head, batch.teacher, self._targets(batch), estimator=estimator, smoothing=self._smoothing
            )
        return token_divergence(
            hidden_ND,
            head,
            batch.teacher,
            objective=objective.name,
            parameters=objective.parameters,
            smoothing=self._smoothing,
            approximate=objective.approximate,
        )

    def _targets(self, batch: MicroBatch) -> Tensor:
        return targets_of(batch.sequences).to(self._student.device)

    def _reduce(self, loss_N: Tensor, sequences: Sequence[Scored], totals: Totals) -> Tensor:
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
        columns = [torch.cat([values[name] for values in measured]).double() for name in names]
        rows, *sums = self._workers.total([len(columns[0]), *(float(column_N.sum()) for column_N in columns)])
        return {f"train/{name}": value / rows for name, value in zip(names, sums, strict=True)}

    def _lengths(self, sequences: Sequence[Scored]) -> dict[str, float]:
        """How many sequences the student wrote, and how long they are on average (0 if none)."""
        own = [sequence.completion_tokens for sequence in sequences if sequence.weights_version is not None]
        count, tokens = self._workers.total([len(own), sum(own)])
        return {"train/own_sequences": int(count), "train/sample_length": tokens / count if count else 0.0}

    def _scored(self, example: Example, completion_ids: TokenIds, version: int | None) -> Scored:
        if not len(completion_ids):
            raise DataError(
                f"a row of {self._config.data.path} has no completion, and the student was not to write one; give "
                "completions, or set objective.on_policy_fraction: 1",
                "data.path",
            )
        return scored(
            example.prompt_ids,
            completion_ids,
            loss_on_prompt=self._config.loss_on_prompt,
            loss_on_last_token=self._config.loss_on_last_token,
            weights_version=version,
        )


class _Clock:
    """Seconds by phase; what the teacher client spent waiting is taken out of scoring."""

    def __init__(self, teacher: Teacher | None) -> None:
        self._teacher = teacher
        self._waited = self._waited_seconds()
        self._last = time.perf_counter()
        self._seconds: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """Ends a phase."""
        now = time.perf_counter()
        self._seconds[phase], self._last = now - self._last, now

    def metrics(self) -> dict[str, float]:
        """By name `seconds/…`."""
        waiting = self._waited_seconds() - self._waited
        seconds = self._seconds | {"scoring": self._seconds["scoring"] - waiting, "waiting": waiting}
        return {f"seconds/{phase}": value for phase, value in seconds.items()}

    def _waited_seconds(self) -> float:
        return 0.0 if self._teacher is None else self._teacher.waited_seconds
