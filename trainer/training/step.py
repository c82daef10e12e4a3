"""One optimizer step: a batch that the teacher has scored, the loss, the update."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tutelage.trainer.config.objective import TermConfig
from tutelage.trainer.config.student import StudentConfig
from tutelage.trainer.data.seeding import derived_seed
from tutelage.trainer.data.sequences import TokenSequence
from tutelage.trainer.losses.diagnostics import diagnostics, sampler_divergence
from tutelage.trainer.losses.losses import token_cross_entropy, token_divergence, token_policy_gradient
from tutelage.trainer.losses.reductions import reduce_micro_batch_token_mean, reduce_sequence_mean, reduce_token_mean
from tutelage.trainer.losses.registry import resolve_parameters
from tutelage.trainer.model.optimizer import learning_rate_at
from tutelage.trainer.model.process_group import ALONE, Workers
from tutelage.trainer.model.student import Student
from tutelage.trainer.teacher.rows import HiddenRows, Unembedding
from tutelage.trainer.teacher.several import Name
from tutelage.trainer.teacher.to_tensors import drawn_tokens, row_counts, sampler_logps_of, targets_of
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
    "teacher_mass_beyond",
)


@dataclass(frozen=True)
class Totals:
    """What a term of a step's loss is divided by: counts of what it is computed on, over all workers."""

    rows: int
    sequences: int
    micro_batches: int


@dataclass
class _Seen:
    """What a step is of all workers together, and what the passes of this one found in it."""

    rows: int
    """Scored positions."""
    tokens: int
    """All tokens, prompts included."""
    totals: Sequence[Totals]
    """Of each term."""
    values: list[float]
    """Of each term's mean, this worker's part."""
    router_loss: float = 0.0
    """Likewise."""
    diagnostics: list[tuple[Name, dict[str, Tensor]]] = field(default_factory=list)
    """Of some rows of each micro-batch."""
    sampler_kl: list[Tensor] = field(default_factory=list)
    """Of some tokens of each micro-batch that the student drew."""
    importance_weights: list[Tensor] = field(default_factory=list)
    """Of each micro-batch's sampled tokens, before they are clipped."""


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
        self._terms = config.objective.weighted_terms
        self._distribution = teacher_distribution_of(config.objective, derived_seed(config.seed, "noise"))

    def train_step(
        self, step: int, examples_of: ExamplesOf, report: Callable[[str], None], share: float | None = None
    ) -> dict[str, float]:
        """Does step number `step` (0, 1, …).

        Args:
            step: steps done before.
            examples_of: asked for the examples of this step, and of later ones whose batches are begun early.
            report: told the phase: sampling, scoring, stepping.
            share: of the tokens that it may spend, what is spent, 0 … 1; None if it ends by steps.

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
        metrics = self._update(step, batches, share)
        self._batches.take_weights(step + 1)
        clock.lap("stepping")
        return metrics | self._rollout_metrics(step, batches) | clock.metrics()

    def _update(self, step: int, batches: Sequence[MicroBatch], share: float | None) -> dict[str, float]:
        """Forward and backward over all micro-batches, then the optimizer."""
        counts = [sum(getattr(batch, each) for batch in batches) for each in ("rows", "tokens", "teacher_tokens")]
        rows, tokens, teacher_tokens = map(int, self._workers.total(counts))
        seen = _Seen(rows, tokens, [self._totals(term, batches) for term in self._terms], [0.0] * len(self._terms))
        if self._student.sharded:
            # A pass brings weights together, which takes all workers: each goes through it as often as the one with
            # the most micro-batches, the last time with weight 0.
            missing = self._workers.largest(len(batches)) - len(batches)
            batches = [*batches, *[replace(batches[-1], counts=False)] * missing]
        for batch in batches:
            self._forward_and_backward(batch, seen)
        learning_rate = learning_rate_at(step, self._config.steps, self._config.optimizer, share)
        self._student.sum_gradients(self._workers)
        norm = self._student.step(learning_rate)
        return {
            **self._losses(seen),
            **self._means([values for _, values in seen.diagnostics]),
            **self._means_by_teacher(seen.diagnostics),
            **self._sampler_kl(seen.sampler_kl),
            **self._importance(seen.importance_weights),
            "train/gradient_norm": norm,
            "train/learning_rate": learning_rate,
            "train/tokens": rows,
            "train/teacher_tokens": teacher_tokens,
        }

    def _forward_and_backward(self, batch: MicroBatch, seen: _Seen) -> None:
        """One micro-batch: its part of the step's gradients, and what is to be told of it."""
        hidden_ND, router_loss = self._hidden(batch)
        head = self._student.head()
        if batch.teacher is not None and batch.counts:
            some = slice(None, None, max(1, seen.rows // _DIAGNOSED_ROWS))  # Evenly spread.
            measured = diagnostics(
                hidden_ND.detach()[some], head, batch.teacher.at(some), distribution=self._distribution
            )
            if isinstance(batch.teacher, HiddenRows):
                beyond_N = batch.teacher.unembedding.mass_beyond(batch.teacher.hidden_ND[some])
                measured |= {} if beyond_N is None else {"teacher_mass_beyond": beyond_N}
            if batch.teacher.kind != "topk":  # Where the support is the student's: the teacher's mass on it.
                measured["support_mass"] = 1.0 - measured["tail_mass"]
            seen.diagnostics.append((batch.teacher_name, measured))
        if self._draws_whole_distribution and batch.counts:
            seen.sampler_kl.append(self._sampler_divergence(batch, hidden_ND.detach(), head, seen.rows))
        each = zip(self._terms, seen.totals, strict=True)
        parts = [self._term(term, batch, hidden_ND, head, totals, seen) for term, totals in each]
        # Times 0 instead of left out: the backward pass of a sharded student takes part in what the others do.
        weighted = [term.weight * part for term, part in zip(self._terms, parts, strict=True)]
        loss = torch.stack(weighted).sum() * batch.counts
        if router_loss is not None:  # Each micro-batch's, as its share of the step's tokens.
            part = router_loss * (batch.tokens / seen.tokens)
            loss = loss + self._config.router_loss_weight * part
            seen.router_loss += float(part.detach())
        loss.backward()
        self._student.collect_gradients()
        if batch.counts:
            # Parts of one mean: their sum is the step's, however it was divided.
            seen.values = [value + float(part.detach()) for value, part in zip(seen.values, parts, strict=True)]

    @property
    def _draws_whole_distribution(self) -> bool:
        """Whether the student writes, and draws from all of its distribution."""
        sampling = self._config.sampling
        writes = self._config.objective.on_policy_fraction > 0
        return writes and sampling.top_p == 1.0 and sampling.repetition_penalty == 1.0

    def _sampler_divergence(self, batch: MicroBatch, hidden_ND: Tensor, head: Unembedding, rows: int) -> Tensor:
        """`sampler_divergence` of some of the tokens of a micro-batch that the student drew."""
        every = max(1, rows // _DIAGNOSED_ROWS)
        place_N, ids_N, logp_N = (each[::every].to(self._student.device) for each in drawn_tokens(batch.sequences))
        temperature = self._config.sampling.temperature
        return sampler_divergence(hidden_ND[place_N], head, ids_N, logp_N, temperature=temperature)

    def _hidden(self, batch: MicroBatch) -> tuple[Tensor, Tensor | None]:
        """The student's states of a micro-batch, and its router's loss if that is trained."""
        if self._config.router_loss_weight:
            return self._student.hidden_and_router_loss(batch.sequences)
        return self._student.hidden(batch.sequences), None

    def _totals(self, term: TermConfig, batches: Sequence[MicroBatch]) -> Totals:
        """Counts over the sequences that a term is computed on."""
        parts = [batch.of_term(term) for batch in batches]
        rows = sum(part.rows for part in parts)
        counts = [rows, sum(len(part.sequences) for part in parts), sum(part.rows > 0 for part in parts)]
        return Totals(*map(int, self._workers.total(counts)))

    def _term(
        self, term: TermConfig, batch: MicroBatch, hidden_ND: Tensor, head: Unembedding, totals: Totals, seen: _Seen
    ) -> Tensor:
        """A term's mean of the whole step, as far as this micro-batch has a part in it."""
        part = batch.of_term(term)
        if not part.rows:  # Gradients of zero, for the other workers of a sharded student.
            return token_cross_entropy(hidden_ND[:0], head, torch.zeros(0, dtype=torch.int64)).sum()
        if part is not batch:
            hidden_ND = hidden_ND[batch.rows_of_term(term)]
        return self._reduce(self._token_loss(term, hidden_ND, head, part, seen), part.sequences, totals)

    def _token_loss(
        self, term: TermConfig, hidden_ND: Tensor, head: Unembedding, batch: MicroBatch, seen: _Seen
    ) -> Tensor:
        """What a term says of each row, [N]."""
        objective = self._config.objective
        if not term.entry.needs_teacher:
            return token_cross_entropy(hidden_ND, head, targets_of(batch.sequences).to(self._student.device))
        assert batch.teacher is not None
        if not term.entry.sampled_token:
            return token_divergence(
                hidden_ND,
                head,
                batch.teacher,
                objective=term.name,
                parameters=term.parameters,
                distribution=self._distribution,
                approximate=objective.approximate,
            )
        sampler_logp_N = None
        if objective.importance_weights:
            sampler_logp_N = sampler_logps_of(batch.sequences).to(self._student.device)
        value_N, weight_N = token_policy_gradient(
            hidden_ND,
            head,
            batch.teacher,
            targets_of(batch.sequences).to(self._student.device),
            estimator=str(resolve_parameters(term.name, term.parameters)["estimator"]),
            sampler_logp_N=sampler_logp_N,
            importance_clip=objective.importance_clip,
            distribution=self._distribution,
        )
        if weight_N is not None and batch.counts:
            seen.importance_weights.append(weight_N)
        return value_N

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

    def _losses(self, seen: _Seen) -> dict[str, float]:
        """The step's loss, and each term's mean if there are several; of one without a row there is none."""
        *values, router_loss = self._workers.total([*seen.values, seen.router_loss])
        weighted = sum(term.weight * value for term, value in zip(self._terms, values, strict=True))
        losses = {"train/loss": weighted + self._config.router_loss_weight * router_loss}
        if len(self._terms) > 1:
            each = zip(self._terms, values, seen.totals, strict=True)
            losses |= {f"train/term/{term.label}": value for term, value, of in each if of.rows}
        if self._config.router_loss_weight:
            losses["train/router_loss"] = router_loss
        return losses

    def _sampler_kl(self, measured: Sequence[Tensor]) -> dict[str, float]:
        """How far the samplers were from the student on what they drew, on average; nothing if they drew nothing."""
        if not self._draws_whole_distribution:
            return {}
        kl_N = torch.cat([*measured, torch.zeros(0, device=self._student.device)]).double()
        count, total = self._workers.total([len(kl_N), float(kl_N.sum())])
        return {"train/sampler_kl": total / count} if count else {}

    def _importance(self, weights: Sequence[Tensor]) -> dict[str, float]:
        """What the importance weights of the step were like: 1 on average where the sampler cut nothing off."""
        if not self._config.objective.importance_weights:
            return {}
        clip = self._config.objective.importance_clip
        weight_N = torch.cat([*weights, torch.zeros(0, device=self._student.device)]).double()
        clipped = 0.0 if clip is None else float((weight_N > clip).sum())
        count, total, squares, clipped = self._workers.total(
            [len(weight_N), float(weight_N.sum()), float(weight_N.square().sum()), clipped]
        )
        if not count:
            return {}
        # Kish's effective sample size: so much of the sample an unweighted one of the same variance would have.
        metrics = {"train/importance_weight": total / count, "train/effective_share": total**2 / (count * squares)}
        return metrics | ({} if clip is None else {"train/clipped_share": clipped / count})

    def _means(self, measured: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
        """Means over all measured rows of the step."""
        if not measured:
            return {}
        names = [name for name in _MEASURES if name in measured[0]]
        # In float64, as `total` adds: then the mean does not depend on which worker measured which rows.
        columns = [torch.cat([values[name] for values in measured]).double() for name in names]
        rows, *sums = self._workers.total([len(columns[0]), *(float(column_N.sum()) for column_N in columns)])
        return {f"train/{name}": value / rows for name, value in zip(names, sums, strict=True)}

    def _means_by_teacher(self, measured: Sequence[tuple[Name, Mapping[str, Tensor]]]) -> dict[str, float]:
        """The same over the rows of each teacher, where there are several, by name `train/TEACHER/…`."""
        names = self._batches.teacher_names
        columns = [name for name in _MEASURES if measured and name in measured[0][1]]
        # All in one call, so that workers without rows of a teacher take part.
        sums = torch.zeros(len(names), 1 + len(columns), dtype=torch.float64)
        for teacher, values in measured:
            if teacher is not None:
                own = [values[name].double().sum().cpu() for name in columns]
                sums[names.index(teacher)] += torch.stack([torch.tensor(float(len(values[columns[0]]))), *own])
        total = torch.tensor(self._workers.total(sums.ravel().tolist()) if names else []).reshape(sums.shape)
        return {
            f"train/{teacher}/{name}": float(value / row[0])
            for teacher, row in zip(names, total, strict=True)
            for name, value in zip(columns, row[1:], strict=True)
            if row[0] > 0
        }

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
