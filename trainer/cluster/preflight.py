"""A cohort looked at without training it: `tutelage doctor --config cohort.yaml`.

Of each student what its training looks at as well: the model against its own code, what the loss reaches, its rows, its
teacher and all of that teacher's servers; and the teacher against itself, on rows of the student.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from tutelage.data.hub import local_model
from tutelage.errors import EXIT_UNREACHABLE, TutelageError
from tutelage.findings import Finding
from tutelage.identity import vocabulary_size
from tutelage.trainer.cluster.connections import open_teacher
from tutelage.trainer.config.run import CohortConfig
from tutelage.trainer.config.student import StudentConfig
from tutelage.trainer.data.sequences import TokenSequence, answered
from tutelage.trainer.data.shown import shown
from tutelage.trainer.teacher.base import SignalSpec, Teacher
from tutelage.trainer.teacher.same_teacher import bucketed_kl
from tutelage.trainer.teacher.several import members_of
from tutelage.trainer.training.findings import findings_of, of_model, of_teacher
from tutelage.trainer.training.sources import Data, read_data

_WAIT_SECONDS = 5.0
_KEPT_IDS = 32
_FLOORS = 10.0
"""So many noise floors a teacher may be from itself, or `_LEAST_KL`: the floor is that of another, short text."""
_LEAST_KL = 1e-3


def look_at(config: CohortConfig, student: StudentConfig) -> tuple[list[Finding], Any]:
    """The findings of one student, and a row of its data with what is scored marked (rich's text; None without one)."""
    found: list[Finding] = []
    student = student.model_copy(update={"init": config.root(student)})
    folder = local_model(student.start, "init")
    model = _model(student, found)
    if model is None:
        return found, None
    with ExitStack() as stack:
        teacher = _teacher(config, student, found, stack)
        try:
            data = read_data(student, model.tokenizer)
        except TutelageError as error:
            return [*found, Finding("data", "bad", str(error), error.exit_code)], None
        ends = teacher.identity.end_token_ids if teacher else ()
        found += findings_of(student, model.tokenizer, data, ends)
        rows = _rows(student, data)
        if teacher is not None and rows:
            found += _against_itself(teacher, rows, vocabulary_size(folder))
    return found, shown(rows[0], model.tokenizer, colour=True) if rows else None


def _model(student: StudentConfig, found: list[Finding]) -> Any:
    from tutelage.trainer.model.student import Student

    folder = local_model(student.start, "init")
    try:
        model = Student(
            folder,
            dtype=student.dtype,
            optimizer=student.optimizer,
            vocabulary_size=vocabulary_size(folder),
            lora=student.lora,
            router_loss=student.router_loss_weight > 0,
        )
    except TutelageError as error:
        found.append(Finding("model", "bad", str(error), error.exit_code))
        return None
    found.append(of_model(student, model.parameters_count))
    return model


def _teacher(config: CohortConfig, student: StudentConfig, found: list[Finding], stack: ExitStack) -> Teacher | None:
    """Who would score for it; with several servers, all of them were asked alike. None if nobody does."""
    if not student.objective.needs_teacher:
        found.append(of_teacher(student, None))
        return None

    def hurried(teacher: Any) -> Any:
        return None if teacher is None else teacher.model_copy(update={"wait_seconds": _WAIT_SECONDS})

    teachers = {name: hurried(each) for name, each in config.teachers.items()}
    config = config.model_copy(update={"teacher": hurried(config.teacher), "teachers": teachers})
    try:
        teacher = open_teacher(config, student, lambda seconds, reason: None, stack)
    except TutelageError as error:
        found.append(Finding("teacher", "bad", str(error), error.exit_code))
        return None
    assert teacher is not None
    found.append(of_teacher(student, teacher.identity))
    return teacher


def _rows(student: StudentConfig, data: Data) -> list[TokenSequence]:
    """The first rows that have an answer, as they are trained on."""
    examples = [row for _, dataset in data.read if dataset for row in dataset.examples if len(row.completion_ids)]
    return [answered(row, loss_on_prompt=student.loss_on_prompt) for row in examples[:4]]


def _against_itself(teacher: Teacher, rows: Sequence[TokenSequence], vocabulary: int) -> list[Finding]:
    """The same sequence alone and among others: 0 within the noise floor."""
    known = members_of(teacher)
    rows = [replace(row.for_teacher, mask=None) for row in rows if row.teacher in known]
    if not rows:
        return []
    try:
        own = known[rows[0].teacher]
        (alone,) = own.score(rows[:1], SignalSpec("topk", min(_KEPT_IDS, vocabulary), (1.0,)))
        asked = replace(rows[0], candidate_ids_RC=alone["ids_RK"])
        others = [replace(row, candidate_ids_RC=alone["ids_RK"][:1].repeat(row.rows, 0)) for row in rows[1:]]
        again = own.score([*others, asked], SignalSpec("candidates", 0, (1.0,)))[-1]
    except TutelageError as error:
        return [Finding("noise floor", "bad", str(error), error.exit_code)]
    kl, floor = abs(bucketed_kl(alone, again)), own.identity.noise_floor_kl
    text = f"the teacher is {kl:.2g} nats a token from itself, alone and among others (noise floor {floor:.2g})"
    if not kl <= max(_LEAST_KL, _FLOORS * floor):  # also if it is no number
        advice = "; its answers depend on what else it is asked: serve it with another dtype or without quantization"
        return [Finding("noise floor", "bad", text + advice, EXIT_UNREACHABLE)]
    return [Finding("noise floor", "ok", text)]
