"""The training of one student, from its start or from its last checkpoint to its end.

    outcome = train(config, folder=folder, teacher=client, report=print)

`train` is the same in a test, in a Ray actor and anywhere else: what it does depends on its arguments and
on what it finds in `folder`, where it keeps `student.yaml`, `data.json`, `metrics.jsonl`, `metrics.parquet`,
`held_out.safetensors`, `checkpoints/step-…/`, `outcome.json` and, if asked for, the link `checkpoints/best`.

Several workers (`model.process_group`) call `train` at once with the same arguments. The first one does what one alone
does: it measures, writes, decides when to save and to stop. The others take their share of its steps, and are there
when the weights of a sharded student come together.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from tutelage.config import to_yaml
from tutelage.data.dataset_files import TokenizedExample
from tutelage.data.hub import local_model
from tutelage.data.prompts import completion_end_id
from tutelage.errors import ConfigurationError
from tutelage.files import write_durably
from tutelage.findings import refuse_bad
from tutelage.identity import vocabulary_size
from tutelage.manifest import is_committed
from tutelage.trainer.checkpoint.run_lock import folder_lock
from tutelage.trainer.checkpoint.store import Checkpoint, CheckpointStore
from tutelage.trainer.checkpoint.trainer_state import State, config_digest, differing_settings, read_state
from tutelage.trainer.config.student import StudentConfig
from tutelage.trainer.data.seeding import derived_seed
from tutelage.trainer.data.sequences import TokenSequence, answered
from tutelage.trainer.metrics.log import MetricsLog
from tutelage.trainer.metrics.progress import Outcome, Progress
from tutelage.trainer.metrics.trackers import open_trackers
from tutelage.trainer.model.process_group import ALONE, Workers
from tutelage.trainer.model.student import Student
from tutelage.trainer.teacher.base import Teacher
from tutelage.trainer.teacher.several import members_of, require_named, unembeddings
from tutelage.trainer.training import findings
from tutelage.trainer.training.batch_builder import BatchBuilder
from tutelage.trainer.training.control import Control
from tutelage.trainer.training.equal_teacher import EqualTeacher
from tutelage.trainer.training.preflight import check_saving
from tutelage.trainer.training.sources import read_data
from tutelage.trainer.training.step import TrainStep
from tutelage.trainer.training.validation import Validation

_log = logging.getLogger(__name__)


class Evaluations(Protocol):
    """Where checkpoints are sent for scoring."""

    every_steps: int
    """Besides before and after training; 0 means only those."""

    def submit(self, step: int, checkpoint: Path, *, finished: bool = False) -> None:
        """Hands a checkpoint over without waiting; `finished` says that no later process does what this one cannot."""

    def submit_again(self, step: int, checkpoint: Path) -> None:
        """Hands over what another process of this student had to, unless it did."""


class NoEvaluations:
    """Sends nothing."""

    every_steps = 0

    def submit(self, step: int, checkpoint: Path, *, finished: bool = False) -> None:
        """Does nothing."""

    def submit_again(self, step: int, checkpoint: Path) -> None:
        """Does nothing."""


def _ignore(_progress: Progress) -> None:
    pass


def train(
    config: StudentConfig,
    *,
    folder: Path,
    teacher: Teacher | None,
    report: Callable[[Progress], None] = _ignore,
    evaluations: Evaluations | None = None,
    control: Control | None = None,
    workers: Workers = ALONE,
    predecessor_seconds: float = 0.0,
) -> Outcome:
    """Trains a student to its last step, or until it is asked to stop.

    Args:
        config: the student's.
        folder: its own; one process writes it at a time. Several workers must all see it.
        teacher: who scores; None if the objective needs no teacher.
        report: told of every phase.
        evaluations: sent the first, the last and the best checkpoint, and some between.
        control: asked between steps whether to pause or stop.
        workers: who train it together; `report`, `evaluations` and `control` are the first one's.
        predecessor_seconds: how long to wait for another process that trains this student to end.

    Returns:
        How it ended; the checkpoint is known to the first worker only.

    Raises:
        Conflict: another process trains this student, and does not end in time.
        CheckpointError: the folder holds another configuration's training, or cannot be written.
        ConfigurationError: the objective or the metric of the best checkpoint needs a teacher and there is none; or
            as `Student` and `open_trackers`.
        DataError: the data is not as it must be.
        IdentityMismatch: the folder's training began with another teacher.
        Stopped: it was asked to stop while it waited for the teacher or another process.
        TutelageError: as the teacher's `score`.

    """
    control = control or Control()
    if teacher is None and config.objective.needs_teacher:
        raise ConfigurationError(f"{config.objective.label} needs a teacher; give teacher.address", "teacher")
    if teacher is None and config.best and config.best.metric != "heldout/cross_entropy":
        raise ConfigurationError("compares with a teacher; use heldout/cross_entropy", "best.metric")
    # Whatever OMP_NUM_THREADS says: Ray sets it for its processes, a shell perhaps for all.
    torch.set_num_threads(config.threads)
    if not workers.first:
        with closing(_Training(config, folder, teacher, _ignore, workers)) as training:
            return training.follow()

    def waiting(holder: str) -> None:
        control.check_stopped()
        report(Progress(config.id, 0, config.steps, f"waiting for the end of {holder}, which trains this student"))

    # The lock first: what is read after it may be what another process is writing.
    with (
        folder_lock(
            folder,
            advice="stop that one, or give this student another id",
            field="students.id",
            wait_seconds=predecessor_seconds,
            waiting=waiting,
        ),
        closing(_Training(config, folder, teacher, report, workers)) as training,
    ):
        trackers = open_trackers(config.report_to, folder, training=training.digest, next_step=training.next_row_step)
        with MetricsLog(folder, offset_bytes=training.metrics_bytes, trackers=trackers) as metrics:
            return training.run(metrics, control, evaluations or NoEvaluations())


class _Training:
    """The parts of one training, and how far it is."""

    def __init__(
        self,
        config: StudentConfig,
        folder: Path,
        teacher: Teacher | None,
        report: Callable[[Progress], None],
        workers: Workers,
    ) -> None:
        self._config, self._send_report, self._workers, self._folder = config, report, workers, folder
        self._newest: dict[str, float] = {}
        self._step = 0
        self._notes: tuple[str, ...] = ()
        self._report("loading the student and its data")
        self._init = init = local_model(config.start, "init")
        self._student = Student(
            init,
            dtype=config.dtype,
            optimizer=config.optimizer,
            vocabulary_size=vocabulary_size(init),
            lora=config.lora,
            adapter_seed=derived_seed(config.seed, "adapters"),
            gradient_checkpointing=config.gradient_checkpointing,
            sharded=config.sharding == "full",
            router_loss=config.router_loss_weight > 0,
        )
        tokenizer = self._student.tokenizer
        ends = {completion_end_id(source.template, tokenizer, source.chat) for source in config.sources}
        templates = {source.chat.template for source in config.sources if source.template == "chat"}
        if len(templates) == 1 and None not in templates:
            tokenizer.chat_template = templates.pop()  # who asks a checkpoint asks as it has learned to be asked
        self._student.end_with(ends.union(teacher.identity.end_token_ids if teacher else ()))
        # Here, where a refusal costs seconds: a first save comes after `save_every_steps` steps.
        if workers.first:
            check_saving(self._student, init, folder)
        self._data = data = read_data(config, tokenizer)
        self._notes = data.cost_of_length(config.batch.max_tokens)
        found = [findings.of_model(config, self._student.parameters_count)]
        found.append(findings.of_teacher(config, teacher.identity if teacher else None))
        found += findings.findings_of(config, tokenizer, data, teacher.identity.end_token_ids if teacher else ())
        refuse_bad(found)
        self._notes += tuple(f"{each.topic}: {each.text}" for each in found if each.state == "note")
        held_out = [answered(example, loss_on_prompt=config.loss_on_prompt) for example in data.held_out]
        if config.epochs is not None:
            steps = max(1, config.epochs * data.rows // config.prompts_per_step)
            config = self._config = config.model_copy(update={"steps": steps})
        if teacher is not None:
            here = (example for _, dataset in data.read if dataset for example in dataset.examples)
            _require_teachers(config, teacher, [*here, *held_out])
        teacher_digest = teacher.identity.weights_digest if teacher else ""
        self._state = State(0, 0, config_digest(config), data.fingerprint, teacher_digest)
        self._checkpoints = CheckpointStore(folder / "checkpoints", keep=config.keep_checkpoints)
        equal = EqualTeacher(self._student) if config.objective.equal_teacher else None
        self._checkpoint = self._resume(folder)
        if workers.first:
            # Not before: a training that was just refused leaves the file of the one that it would have gone on with.
            write_durably(folder / "student.yaml", to_yaml(config))
            findings.write(found, folder)
            write_durably(folder / "data.json", json.dumps(data.counts()) + "\n")
        self._report("asking the teacher about held-out sequences")
        if teacher is not None:
            self._require_signal(teacher)
        device, vocabulary = self._student.device, self._student.vocabulary_size
        heads = unembeddings(teacher, device, vocabulary)
        self._validation = Validation(
            held_out if workers.first else [],
            folder=folder,
            teacher=teacher,
            heads=heads,
            batch=config.batch.micro_batch_sequences,
        )
        if equal is not None:
            teacher, heads = equal, unembeddings(equal, device, vocabulary)
        self._batches = BatchBuilder(config, self._student, teacher, heads, workers, self._state.rollouts)
        self._batches.take_weights(self._step)
        self._train_step = TrainStep(config, self._student, self._batches, workers)

    def _require_signal(self, teacher: Teacher) -> None:
        """Refuses kinds of signal that a teacher normalises over ids of its own as well."""
        objective, own = self._config.objective, self._student.vocabulary_size
        largest = max(each.identity.vocabulary_size for each in members_of(teacher).values())
        if objective.needs_teacher and largest > own and objective.signal != "hidden":
            raise ConfigurationError(
                f"{objective.signal}, but the teacher has {largest - own} ids that the student has not and normalises "
                "over them as well; allowed is hidden, from which they are left out",
                "objective.signal",
            )

    def close(self) -> None:
        """Asks the teacher for nothing more."""
        self._batches.close()

    @property
    def digest(self) -> str:
        """Of what is trained: settings, data, teacher."""
        return self._state.training_digest

    @property
    def next_row_step(self) -> int:
        """The step of the first row of metrics that is to come; before training there is one of step 0."""
        return self._step + 1 if self._state.metrics_bytes else 0

    @property
    def metrics_bytes(self) -> int:
        """Length of the metrics that count."""
        return self._state.metrics_bytes

    def run(self, metrics: MetricsLog, control: Control, evaluations: Evaluations) -> Outcome:
        """Steps, measures, saves, until the end or a stop."""
        self._newest |= metrics.newest
        # Without a checkpoint all of this is done again; the evaluator takes the same submission twice for one.
        if self._state.metrics_bytes == 0:
            evaluations.submit(0, self._init)
            self._record(metrics, self._validation.run(self._student))
        else:
            evaluations.submit_again(0, self._init)
            for step in self._scored_steps(evaluations):
                if is_committed(self._checkpoints.path(step)):  # it was not kept if `every_steps` was another
                    evaluations.submit_again(step, self._checkpoints.path(step))
        while self._all_do(not self._finished and not control.stopped):
            row = self._do_step()
            self._record(metrics, row)
            if self._all_do(self._is_best_so_far(row) or self._step % self._config.save_every_steps == 0):
                self._save(metrics, evaluations)
            control.wait_while_paused()
        if self._all_do(self._checkpoint is None or self._checkpoint.step != self._step):
            self._save(metrics, evaluations)
        checkpoint = self._checkpoint
        assert checkpoint is not None
        finished, best_step = self._finished, self._state.best.step
        if finished:
            evaluations.submit(self._step, checkpoint.path, finished=True)
        if finished:
            write_durably(self._folder / "outcome.json", json.dumps({"step": self._step}) + "\n")
        if finished and best_step not in (0, self._step):
            evaluations.submit(best_step, self._checkpoints.path(best_step), finished=True)
        self._report("finished" if finished else "stopped")
        return Outcome(self._config.id, self._step, finished, checkpoint.path)

    def follow(self) -> Outcome:
        """What a worker that is not the first does: its share of each step, of each measurement and each checkpoint."""
        if self._state.metrics_bytes == 0:
            self._validation.run(self._student)
        while self._all_do(False):
            self._do_step()
            if self._all_do(False):
                self._help_save()
        if self._all_do(False):
            self._help_save()
        return Outcome(self._config.id, self._step, self._finished, None)

    def _help_save(self) -> None:
        """What `_save` takes of a worker that is not the first."""
        self._batches.rollouts()
        self._student.save(None)

    def _all_do(self, wanted: bool) -> bool:
        """Whether to, which the first worker says: take another step, save."""
        # A collective call: every worker comes here at the same points, or one's sum would meet another's broadcast.
        return bool(self._workers.of_first(wanted))

    @property
    def _finished(self) -> bool:
        """Whether all steps are done, or the best checkpoint is too long ago."""
        best = self._config.best
        patience = best.patience if best else None
        return (self._step >= self._config.steps or self._spent_share == 1.0) or (
            patience is not None and self._state.best.measurements_since >= patience
        )

    @property
    def _spent_share(self) -> float | None:
        """Of its budget, at most 1; None without one."""
        budget = self._config.budget
        return None if budget is None else min(1.0, self._state.spent_tokens / budget.amount)

    def _is_best_so_far(self, row: dict[str, float]) -> bool:
        """Takes a measurement into account, if this step had one."""
        best = self._config.best
        if best is None or best.metric not in row:
            return False
        after = self._state.best.after(self._step, best.metric, row[best.metric])
        self._state = replace(self._state, best=after)
        return after.step == self._step

    def _do_step(self) -> dict[str, float]:
        """One step, and the held-out measures where they are due."""
        row = self._train_step.train_step(self._step, self._examples_of, self._report, self._spent_share)
        self._step += 1
        if self._config.budget is not None:
            spent = self._state.spent_tokens + int(row[self._config.budget.metric])
            self._state = replace(self._state, spent_tokens=spent)
        if self._data.labels:
            shares = self._data.mixture.shares(self._step * self._config.prompts_per_step)
            row |= {f"train/share/{label}": share for label, share in zip(self._data.labels, shares, strict=True)}
        is_last = self._step == self._config.steps or self._spent_share == 1.0
        if self._step % self._config.held_out.every_steps == 0 or is_last:
            self._report("measuring on held-out sequences")
            row |= self._validation.run(self._student)
        return row

    def _examples_of(self, step: int) -> Sequence[TokenizedExample]:
        size = self._config.prompts_per_step
        return self._data.mixture.take(step * size, size)

    def _record(self, metrics: MetricsLog, values: dict[str, float]) -> None:
        metrics.append({"step": self._step, "time_seconds": time.time(), "student": self._config.id, **values})
        self._newest |= values

    def _save(self, metrics: MetricsLog, evaluations: Evaluations) -> None:
        """Commits this step."""
        self._report("saving")
        state = replace(self._state, step=self._step, metrics_bytes=metrics.commit(), rollouts=self._batches.rollouts())

        def write(folder: Path) -> None:
            self._student.save(folder)
            state.save(folder)

        # Kept, however old: the evaluator may not have got to them yet, and only then makes links of its own (`pin`).
        scored = self._scored_steps(evaluations)
        self._checkpoint = self._checkpoints.save(self._step, write, protected=scored, best=self._state.best.step)
        if self._step in scored:
            evaluations.submit(self._step, self._checkpoint.path)

    def _scored_steps(self, evaluations: Evaluations) -> range:
        """Those until now that are scored between the first and the last."""
        every = evaluations.every_steps
        return range(every, self._step + (not self._finished), every) if every else range(0)

    def _resume(self, folder: Path) -> Checkpoint | None:
        """Takes the state of the newest checkpoint, if there is one."""
        newest = self._checkpoints.latest() if self._workers.first else None
        # The first worker says which, so that all go on from the same step: a folder on a network may not yet look the
        # same to all of them, and verifying it reads every byte.
        step = self._workers.of_first(newest.step if newest else -1)
        if step < 0:
            return None
        checkpoint = Checkpoint(self._checkpoints.path(step), step)
        state = read_state(checkpoint.path)
        state.require_same_training(self._state, differing_settings(self._config, folder))
        self._student.load_state(checkpoint.path)
        self._state, self._step = state, state.step
        if state.best.step and self._workers.first:
            # The link is made after the checkpoint: a kill between them leaves it one behind.
            self._checkpoints.link_best(state.best.step)
        _log.info("%s goes on from step %d", self._config.id, state.step)
        return checkpoint

    def _report(self, phase: str) -> None:
        config = self._config
        # A copy: the actor's `status` reads it in another thread, while the next step changes `_newest`.
        self._send_report(Progress(config.id, self._step, config.steps, phase, dict(self._newest), self._notes))


def _require_teachers(
    config: StudentConfig, teacher: Teacher, rows: Sequence[TokenizedExample | TokenSequence]
) -> None:
    """Refuses rows that name a teacher that is not there.

    Raises:
        DataError: as `require_named`.
        ConfigurationError: the loss is a mean over micro-batches, which several teachers would divide otherwise.

    """
    paths = ", ".join(str(source.path) for source in config.sources)
    require_named((row.teacher for row in rows), teacher, paths)
    if config.micro_batches_matter and len({row.teacher for row in rows}) > 1:
        raise ConfigurationError(
            f"{paths} has rows of several teachers, whose micro-batches are apart; use a reduction and an "
            "on_policy_unit that do not depend on micro-batches (token_mean, sequence)",
            "reduction",
        )
